"""``--base REV``: our ops as of another revision, timed in a process of their own.

Both revisions register their ops under ``torch.library``'s namespace ``mvlm_kernels``, which one process can define
once only, and under a rewritten name it would not be the code of that revision. So a worker process imports the
exported folder under its real name, and the two take turns: one waits while the other measures.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_benchmarks.clock import Timing
from mvlm_benchmarks.kernels.cases import Case
from mvlm_benchmarks.kernels.measure import Outcome
from mvlm_benchmarks.machine import git


def export(root: Path, revision: str, folder: Path) -> str:
    """Write the revision's ``kernels/`` into folder and return its commit. ConfigError where there is none."""
    commit = git(root, "rev-parse", "--short=12", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None or commit.returncode:
        raise ConfigError(
            f"base: wanted a git revision in a checkout, got {revision!r} in {root}; try HEAD, a tag or a commit"
        )
    name = commit.stdout.decode().strip()
    archive = git(root, "archive", "--format=tar", name, "kernels/mvlm_kernels")
    if archive is None or archive.returncode:
        raise ConfigError(f"base: wanted a revision that has kernels/mvlm_kernels, got {revision!r} ({name})")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return name


class Worker:
    """The other process. It answers one JSON line to each; an error there is an error of the contender."""

    def __init__(self, folder: Path, device: str, quick: bool, batch: int) -> None:
        self._batch = batch
        here = Path(__file__).parents[2]
        # The exported package first, then this one; what a path of the caller's holds comes after both.
        paths = [folder / "kernels", here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            # -P: the working folder, which may be kernels/, must not come before the paths.
            [sys.executable, "-P", "-m", "mvlm_benchmarks.kernels.base_worker", device, str(int(quick))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if str(p))},
        )
        try:
            loaded = Path(self._ask(what="where"))
            wrong = "" if loaded.is_relative_to(folder.resolve()) else f"the worker imported {loaded}"
        except RuntimeError as error:
            wrong = str(error)
        if wrong:
            self.close()
            raise ConfigError(f"base: wanted a revision whose kernels load with these benchmarks, got: {wrong}")

    def open(self, case: Case) -> dict[str, Outcome]:
        """Make the case there, run it once against that revision's reference; the outcome of each pass.

        RuntimeError with a line where the case cannot be made.
        """
        dtype = str(case.dtype).removeprefix("torch.")
        found = self._ask(what="open", op=case.op, shape=case.shape, batch=self._batch, dtype=dtype)
        return {name: Outcome(*outcome) for name, outcome in found.items()}

    def time(self, name: str) -> Timing:
        return Timing(*self._ask(what="time", name=name))

    def graph(self, name: str) -> float | None:
        return self._ask(what="graph", name=name)

    def peak_mb(self, name: str) -> float | None:
        return self._ask(what="peak_mb", name=name)

    def close(self) -> None:
        """End the process; nothing it holds is needed any more."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker of --base ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["value"]
