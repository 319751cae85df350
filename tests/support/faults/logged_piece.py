"""A piece whose reading is slow and noted in a file, so that a test can see how often each piece was read."""

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mvlm_dataloading.sources.record import Record


@dataclass(frozen=True, slots=True)
class LoggedPiece:
    """Records that are listed in advance. Each reading appends `begin N` and `end N` to `log`."""

    split: str
    listed: Sequence[Record]
    number: int
    log: Path
    seconds: float
    """Time that a reading takes at least."""

    @property
    def label(self) -> str:
        return f"{self.split} {self.number}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        self._note("begin")
        for record in self.listed:
            time.sleep(self.seconds / len(self.listed))
            yield record
        self._note("end")

    def _note(self, what: str) -> None:
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(file, f"{what} {self.number}\n".encode())
        os.close(file)


def readings(log: Path) -> dict[int, tuple[int, int]]:
    """How often the reading of each piece has begun, and how often it has ended."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    numbers = sorted({int(number) for _, number in lines})
    return {n: (lines.count(["begin", str(n)]), lines.count(["end", str(n)])) for n in numbers}
