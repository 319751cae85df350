"""Comparison of all contenders at one case: preparation, check against the float64 reference, timing in rounds.

In each round every contender runs every pass, so that a drifting clock rate or another process affects all contenders.
Reported figures are medians over rounds.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import mvlm_kernels
from mvlm_benchmarks.clock import Clock, Timing
from mvlm_benchmarks.kernels.base_revision import BaseWorker
from mvlm_benchmarks.kernels.cases import Case
from mvlm_benchmarks.kernels.inputs import Inputs
from mvlm_benchmarks.kernels.measure import Expected, LocalContender, Outcome, passes_of, run_reference, tolerance
from mvlm_benchmarks.kernels.peers import Peer, ours_as_peer
from mvlm_benchmarks.machine import roofline_us
from mvlm_benchmarks.unavailable import Missing, NotApplicable, one_line
from mvlm_kernels.hardware import Gpu

Row = dict[str, Any]


@dataclass
class Entry:
    """One contender at one case: outcomes and measurements by pass."""

    contender: str
    outcomes: dict[str, Outcome]
    runner: LocalContender | BaseWorker | None = None
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    graph_us: dict[str, float | None] = field(default_factory=dict)
    peak_mb: dict[str, float | None] = field(default_factory=dict)

    def attempt(self, what: Literal["time", "graph", "peak_mb"], name: str) -> Any:
        """Measure a figure of a pass. Returns None if the pass fails, or failed before; other passes continue."""
        outcome = self.outcomes[name]
        if outcome.status != "ok":
            return None
        try:
            return getattr(self.runner, what)(name)
        except Exception as error:
            # A pass without a peak or a CUDA graph still has its time.
            status = "error" if what == "time" else "ok"
            self.outcomes[name] = Outcome(status, f"{outcome.note} {what}: {one_line(error)}".strip())
            return None


def bench_case(
    case: Case, device: str, peers: Iterable[Peer], clock: Clock, rounds: int, worker: BaseWorker | None = None
) -> list[Entry]:
    """Measure all contenders: ours, `base` (the worker), and the peers that have a builder for the op."""
    names = passes_of(case)
    contenders = [ours_as_peer(case), *(peer for peer in peers if case.op in peer.builders)]
    try:
        inputs = case.make(device)
        expected = run_reference(case, inputs)
    except Exception as error:
        outcome = Outcome("error", f"the float64 reference did not run: {one_line(error)}")
        return [Entry(peer.name, dict.fromkeys(names, outcome)) for peer in contenders]
    entries = [prepare(peer, case, inputs, expected, clock, device) for peer in contenders]
    if device == "cuda" and (note := _torch_fallback(case, inputs)):
        entries[0].outcomes = {
            k: Outcome(o.status, note) if o.status == "ok" else o for k, o in entries[0].outcomes.items()
        }
    if worker is not None:
        entries.insert(1, _open_base(worker, case, names))
    del expected

    for _ in range(rounds):
        for entry in entries:
            for name in names:
                if (timing := entry.attempt("time", name)) is not None:
                    entry.timings.setdefault(name, []).append(timing)
    for entry in entries:
        for name in names:
            entry.peak_mb[name] = entry.attempt("peak_mb", name)
    # Graphs come last: a failed capture may leave the device in a state that spoils later measurements.
    for entry in entries:
        for name in names:
            entry.graph_us[name] = entry.attempt("graph", name)
    return entries


def prepare(peer: Peer, case: Case, inputs: Inputs, expected: Expected, clock: Clock, device: str) -> Entry:
    """Build a peer's function for the case, and compare forward and backward with the reference."""
    names = passes_of(case)
    try:
        function = peer.builders[case.op](inputs)
    except (ImportError, Missing) as error:
        return Entry(peer.name, dict.fromkeys(names, Outcome("missing", str(error))))
    except NotApplicable as error:
        return Entry(peer.name, dict.fromkeys(names, Outcome("not applicable", str(error))))
    except Exception as error:
        return Entry(peer.name, dict.fromkeys(names, Outcome("error", one_line(error))))
    local = LocalContender(case, inputs, function, expected.incoming, clock, peer.context)
    return Entry(peer.name, local.check(expected, tolerance(case, device)), local)


def _torch_fallback(case: Case, inputs: Inputs) -> str:
    """Note with the reasons if our op runs torch instead of Triton, else ""."""
    choice = mvlm_kernels.explain(case.ours, **inputs.leaves, **inputs.fixed)
    return "" if choice.backend == "triton" else f"runs torch: {'; '.join(choice.reasons)}"


def _open_base(worker: BaseWorker, case: Case, names: tuple[str, ...]) -> Entry:
    try:
        return Entry("base", worker.open(case), worker)
    except RuntimeError as error:
        return Entry("base", dict.fromkeys(names, Outcome("error", str(error))))


def rows_of(case: Case, entries: list[Entry], gpu: Gpu | None = None) -> list[Row]:
    """Rows of results, one per contender and pass. Missing figures are None.

    Args:
        gpu: peak rates from the data sheet, or None for an unknown machine. They are for bfloat16 and float16, so
            float32 has no `roofline_pct`.
    """
    roofline = roofline_us(case.minimum, case.flops, gpu) if gpu and case.dtype != torch.float32 else {}
    forward, backward = case.minimum
    bytes_minimum = {"forward": forward, "backward": backward, "both": forward + backward}
    # A pass that failed in a later round has no figures.
    medians = {
        entry.contender: {
            n: _median(timings) for n, timings in entry.timings.items() if entry.outcomes[n].status == "ok"
        }
        for entry in entries
    }
    rows = []
    for entry in entries:
        for name, outcome in entry.outcomes.items():
            timing = medians[entry.contender].get(name)
            ours_us, base_us = (
                medians[who][name].us if name in medians.get(who, {}) else None for who in ("ours", "base")
            )
            us = timing.us if timing else None
            rows.append(
                {
                    "op": case.op,
                    "pass": name,
                    "shape": case.shape,
                    "dtype": str(case.dtype).removeprefix("torch."),
                    "contender": entry.contender,
                    "status": outcome.status,
                    "note": outcome.note,
                    "us": _rounded(us),
                    "us_p20": _rounded(timing.p20 if timing else None),
                    "us_p80": _rounded(timing.p80 if timing else None),
                    "graph_us": _rounded(entry.graph_us.get(name)),
                    "gb_per_s": _rounded(bytes_minimum[name] / us / 1e3 if us else None),
                    "roofline_pct": _rounded(100 * roofline[name] / us if us and roofline else None),
                    "peak_mb": _rounded(entry.peak_mb.get(name)),
                    "vs_ours": _rounded(us / ours_us if us and ours_us else None),
                    "base": _rounded(base_us),
                    "vs_base": _rounded(us / base_us if us and base_us else None),
                    "bytes_minimum": bytes_minimum[name],
                }
            )
    return rows


def _median(timings: list[Timing]) -> Timing:
    return Timing(*(statistics.median(getattr(t, k) for t in timings) for k in ("us", "p20", "p80")))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
