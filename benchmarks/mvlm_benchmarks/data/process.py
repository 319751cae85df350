"""A loader in its own process, which runs only during its turns."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class LoaderProcess:
    """A loader under test: a process that runs `mvlm_benchmarks.data.worker`.

    It is stopped (SIGSTOP) and continued together with its own workers.
    """

    def __init__(
        self,
        name: str,
        recipe: str,
        data: Path,
        batch: int,
        size: int,
        threads: int = 2,
        environment: Mapping[str, str] = os.environ,
        folder: Path | None = None,
    ) -> None:
        """Start the process, wait for its first batch and stop it. `status` and `note` describe a failure.

        environment, folder: variables of the process, and the folder in which it starts.
        """
        self.name, self.recipe, self.batch = name, recipe, batch
        # Workers of earlier checkouts (`before.py`) have two threads and take no number of them.
        numbers = map(str, (batch, size) if threads == 2 else (batch, size, threads))
        command = [sys.executable, "-m", "mvlm_benchmarks.data.worker", name, recipe, str(data), *numbers]
        # start_new_session gives the loader and its workers one process group, so one signal stops all of them.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**environment, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}, cwd=folder,
        )  # fmt: skip
        self.rates: list[float] = []
        """Images per second, by turn."""
        self.cpu_ms: list[float] = []
        """Milliseconds of processor time per image, by turn."""
        try:
            answer = self._read()
        except BaseException:  # such as a signal to this process
            self.close()
            raise
        self.status, self.note = answer["status"], answer["note"]
        if self.status == "ok":
            self._signal(signal.SIGSTOP)

    def turn(self, batches: int) -> dict[str, Any]:
        """Make `batches` batches. Returns the process's answer: seconds, rss_mb.

        If the process ends, `status` and `note` say so, and it has no figures.
        """
        before = group_cpu_seconds(self._process.pid)
        with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # it has ended, and `_read` says so
            self._signal(signal.SIGCONT)
            assert self._process.stdin is not None
            self._process.stdin.write(f"{batches}\n")
            self._process.stdin.flush()
        answer = self._read()
        if "status" in answer:
            self.status, self.note = answer["status"], answer["note"]
            self.rates.clear()
            self.cpu_ms.clear()
            return answer
        self._signal(signal.SIGSTOP)
        self.rates.append(batches * self.batch / answer["seconds"])
        self.cpu_ms.append(1e3 * (group_cpu_seconds(self._process.pid) - before) / (batches * self.batch))
        return answer

    def close(self) -> None:
        """Kill the process and its workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            return {"status": "error", "note": f"ended with code {self._process.returncode}", "seconds": float("inf")}
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def group_cpu_seconds(group: int) -> float:
    """Processor time of the running and stopped processes of a process group. Ended processes do not count."""
    total = 0.0
    for process in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):  # the process has ended in the meantime
            if os.getpgid(process) == group:
                total += time.clock_gettime((~process << 3) | 2)  # Linux's clock id of a process's CPU time
    return total
