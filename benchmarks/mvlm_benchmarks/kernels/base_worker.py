"""Worker process of `--base`: one JSON request per line on standard input, one JSON answer per line on its output.

    python -m mvlm_benchmarks.kernels.base_worker DEVICE QUICK

The exported revision comes first on the path. Only requests import modules that use `mvlm_kernels`, so a revision that
is too old for these benchmarks gives an error answer, not a crash.
"""

import json
import sys
from pathlib import Path
from typing import IO, Any

from mvlm_benchmarks.unavailable import one_line


def serve(device: str, quick: bool, requests: IO[str], answers: IO[str]) -> None:
    """Answer each request with {"value": ..} or {"error": one line, "type": name of the exception}."""
    handler = _RequestHandler(device, quick)
    for line in requests:
        message = json.loads(line)
        try:
            answer = {"value": getattr(handler, message.pop("request"))(**message)}
        except Exception as error:
            answer = {"error": one_line(error), "type": type(error).__name__}
        print(json.dumps(answer), file=answers, flush=True)


class _RequestHandler:
    """Measures the revision's op at one case at a time. Each public method answers the request of its name."""

    def __init__(self, device: str, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._contender: Any = None

    def kernels_path(self) -> str:
        """File of the imported mvlm_kernels. Fails if the revision lacks something that the benchmarks use."""
        import mvlm_benchmarks.kernels.measure  # noqa: F401
        import mvlm_kernels

        return str(Path(mvlm_kernels.__file__).resolve())

    def open(self, op: str, shape: str, batch: int, dtype: str) -> dict[str, list[str]]:
        """Prepare and check a case. Returns [status, note] of each pass."""
        import torch

        from mvlm_benchmarks.clock import make_clock, torch_settings
        from mvlm_benchmarks.kernels.cases import cases
        from mvlm_benchmarks.kernels.measure import LocalContender
        from mvlm_benchmarks.kernels.peers import ours
        from mvlm_benchmarks.kernels.reference import CaseData

        self._contender = None  # free the previous case's tensors first
        case = next(c for c in cases(batch, getattr(torch, dtype)) if (c.op, c.shape) == (op, shape))
        with torch_settings(self._device):
            data = CaseData.make(case, self._device)
            functions = [ours(case, inputs) for inputs in data.sets]
            self._contender = LocalContender(data, functions, make_clock(self._device, self._quick))
            outcomes = self._contender.check()
        return {name: [outcome.status, outcome.note] for name, outcome in outcomes.items()}

    def time(self, name: str) -> list[float]:
        """Microseconds of a pass: median, 20th and 80th percentile, and those of each call."""
        timing = self._measure("time", name)
        return [timing.us, timing.p20, timing.p80, timing.calls]

    def graph(self, name: str) -> float | None:
        return self._measure("graph", name)

    def peak_mb(self, name: str) -> float | None:
        return self._measure("peak_mb", name)

    def check_kept_results(self, name: str) -> None:
        self._contender.check_kept_results(name)

    def repeats(self, name: str, count: int) -> str:
        return self._contender.repeats(name, count)

    def _measure(self, figure: str, name: str) -> Any:
        from mvlm_benchmarks.clock import torch_settings

        with torch_settings(self._device):
            return getattr(self._contender, figure)(name)


def forget_editable_kernels() -> None:
    """Remove mvlm_kernels from editable installs, whose finders would supply modules that the revision lacks."""
    for finder in sys.meta_path:
        module = sys.modules.get(getattr(finder, "__module__", ""))
        getattr(module, "MAPPING", {}).pop("mvlm_kernels", None)


if __name__ == "__main__":
    forget_editable_kernels()
    # Libraries may print. Their output goes to standard error, so that standard output carries only answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(sys.argv[1], sys.argv[2] == "1", sys.stdin, answers)
