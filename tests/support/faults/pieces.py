"""Pieces that a worker process reads: one whose readings are noted, and one whose images end the process."""

import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from unittest.mock import patch

from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.sources.record import Record

DEADLY = b"deadly"
"""Images that end with it end the process that decodes them."""


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
    """Number of times that the reading of each piece has begun, and has ended."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    numbers = sorted({int(number) for _, number in lines})
    return {n: (lines.count(["begin", str(n)]), lines.count(["end", str(n)])) for n in numbers}


@dataclass(frozen=True)
class DeadlyPiece:
    """Records whose deadly images abort the worker process, or the first four times get it killed."""

    split: str
    listed: Sequence[Record]
    deaths: Path | None = None
    """A file with a sign for each kill, as by a machine without memory. None: the decoder aborts."""

    @property
    def label(self) -> str:
        return f"{self.split} from {self.listed[0].key}"

    def records(self, max_bytes: int) -> Iterator[Record]:
        assert parent_process() is not None, "only in a worker process"
        decode = ImageDecoder.__call__

        def deadly(decoder: ImageDecoder, images: Sequence[bytes]) -> Iterator:
            if any(image.endswith(DEADLY) for image in images):
                self._die()
            yield from decode(decoder, images)

        patch.object(ImageDecoder, "__call__", deadly).start()
        yield from self.listed

    def _die(self) -> None:
        if self.deaths is None:
            os.abort()
        times = len(self.deaths.read_text()) if self.deaths.exists() else 0
        if times < 4:
            self.deaths.write_text("x" * (times + 1))
            os.kill(os.getpid(), signal.SIGKILL)
