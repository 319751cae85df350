"""The process behind ``--base``: a JSON request a line on standard input, a JSON answer a line on standard output.

Run as ``python -m mvlm_benchmarks.kernels.base_worker DEVICE QUICK`` with the exported revision first on the path. What
imports ``mvlm_kernels`` is imported when it is asked for, so that a revision too old for these benchmarks is an answer
and not a crash.
"""

import json
import sys
from pathlib import Path
from typing import IO, Any


def serve(device: str, quick: bool, requests: IO[str], answers: IO[str]) -> None:
    """Answer every request with {"value": ..} or {"error": a line}."""
    worker = _Contender(device, quick)
    for line in requests:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("what"))(**request)}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer), file=answers, flush=True)


class _Contender:
    """Our op of that revision at one case at a time; every method is a request."""

    def __init__(self, device: str, quick: bool) -> None:
        self._device, self._quick = device, quick
        self._local: Any = None

    def where(self) -> str:
        import mvlm_benchmarks.kernels.measure  # noqa: F401  (fails here where the revision lacks what it needs)
        import mvlm_kernels

        return str(Path(mvlm_kernels.__file__).resolve())

    def open(self, op: str, shape: str, batch: int, dtype: str) -> dict[str, list[str]]:
        import torch

        from mvlm_benchmarks.clock import make_clock, settings
        from mvlm_benchmarks.kernels.cases import cases
        from mvlm_benchmarks.kernels.measure import Local, expect, tolerance
        from mvlm_benchmarks.kernels.peers import ours

        self._local = None  # the last case's tensors go first
        case = next(c for c in cases(batch, getattr(torch, dtype)) if (c.op, c.shape) == (op, shape))
        with settings(self._device):
            inputs = case.make(self._device)
            expected = expect(case, inputs)
            clock = make_clock(self._device, self._quick)
            self._local = Local(case, inputs, ours(case, inputs), expected.incoming, clock)
            outcomes = self._local.check(expected, tolerance(case, self._device))
        return {name: [o.status, o.note] for name, o in outcomes.items()}

    def time(self, name: str) -> list[float]:
        from mvlm_benchmarks.clock import settings

        with settings(self._device):
            timing = self._local.time(name)
        return [timing.us, timing.p20, timing.p80]

    def graph(self, name: str) -> float | None:
        from mvlm_benchmarks.clock import settings

        with settings(self._device):
            return self._local.graph(name)

    def peak_mb(self, name: str) -> float | None:
        from mvlm_benchmarks.clock import settings

        with settings(self._device):
            return self._local.peak_mb(name)


def forget_editable_kernels() -> None:
    """An editable install finds modules of ours that the revision lacks, and would mix the two: take ours out of it."""
    for finder in sys.meta_path:
        module = sys.modules.get(getattr(finder, "__module__", ""))
        getattr(module, "MAPPING", {}).pop("mvlm_kernels", None)


if __name__ == "__main__":
    forget_editable_kernels()
    # Whatever a library prints goes to the error stream, so that answers stand alone on the other.
    answers, sys.stdout = sys.stdout, sys.stderr
    serve(sys.argv[1], sys.argv[2] == "1", sys.stdin, answers)
