"""`--base REV`: our ops at another git revision, timed in a separate process.

Both revisions register their ops in the `torch.library` namespace `mvlm_kernels`, which a process can define only once.
A worker process therefore imports the exported revision under its real name. The two processes take turns: one waits
while the other measures. Both run the benchmarks of this checkout.
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
from mvlm_benchmarks.clock import Refused, Timing
from mvlm_benchmarks.kernels.inputs import Case
from mvlm_benchmarks.kernels.measure import Outcome, WrongValue
from mvlm_benchmarks.machine import git


def export_kernels(root: Path, revision: str, folder: Path) -> str:
    """Write `kernels/` of a git revision to `folder`. Returns the commit.

    Raises:
        ConfigError: `root` is not a git checkout, or the revision is unknown or has no kernels.
    """
    commit = git(root, "rev-parse", "--short=12", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None or commit.returncode:
        raise ConfigError(
            f"base: wanted a git revision in a checkout, got {revision!r} in {root}; try HEAD, a tag or a commit"
        )
    commit_name = commit.stdout.decode().strip()
    archive = git(root, "archive", "--format=tar", commit_name, "kernels/mvlm_kernels")
    if archive is None or archive.returncode:
        raise ConfigError(f"base: wanted a revision that has kernels/mvlm_kernels, got {revision!r} ({commit_name})")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return commit_name


class BaseWorker:
    """The contender `base`: a process that runs `base_worker`. Errors in the process are errors of the contender."""

    def __init__(self, folder: Path, device: str, quick: bool, batch: int) -> None:
        self._batch = batch
        benchmarks = Path(__file__).parents[2]
        # Order of the paths: exported kernels, these benchmarks, the caller's paths.
        paths = [folder / "kernels", benchmarks, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        self._process = subprocess.Popen(
            # -P: the working directory, which may be kernels/, must not be on the path.
            [sys.executable, "-P", "-m", "mvlm_benchmarks.kernels.base_worker", device, str(int(quick))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(str(p) for p in paths if str(p))},
        )
        try:
            loaded = Path(self._ask(request="kernels_path"))
            problem = "" if loaded.is_relative_to(folder.resolve()) else f"the worker imported {loaded}"
        except RuntimeError as error:
            problem = str(error)
        if problem:
            self.close()
            raise ConfigError(f"base: wanted a revision whose kernels load with these benchmarks, got: {problem}")

    def open(self, case: Case) -> dict[str, Outcome]:
        """Prepare a case in the worker, and compare it with the reference of its revision.

        Returns:
            The outcome of each pass.

        Raises:
            RuntimeError: the case cannot be prepared.
        """
        dtype = str(case.dtype).removeprefix("torch.")
        outcomes = self._ask(request="open", op=case.op, shape=case.shape, batch=self._batch, dtype=dtype)
        return {name: Outcome(*outcome) for name, outcome in outcomes.items()}

    def time(self, name: str) -> Timing:
        us, p20, p80, calls = self._ask(request="time", name=name)
        return Timing(us, p20, p80, tuple(calls))

    def graph(self, name: str) -> float | None:
        return self._ask(request="graph", name=name)

    def peak_mb(self, name: str) -> float | None:
        return self._ask(request="peak_mb", name=name)

    def check_kept_results(self, name: str) -> None:
        self._ask(request="check_kept_results", name=name)

    def repeats(self, name: str, count: int) -> str:
        return self._ask(request="repeats", name=name, count=count)

    def close(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, **message: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker of --base ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            # The worker's own refusals are refusals here; anything else is an error of the contender.
            raise {"WrongValue": WrongValue, "Refused": Refused}.get(answer["type"], RuntimeError)(answer["error"])
        return answer["value"]
