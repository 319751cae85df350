"""Comparison of all contenders at one case: check against the float64 reference, timing in rounds, checks afterwards.

In each round every contender runs every pass, so that a drifting clock rate or another process affects all contenders.
Reported figures are medians over rounds, with bootstrap intervals of their ratios to ours.
"""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from mvlm_benchmarks.budget import Budget, OutOfTime
from mvlm_benchmarks.ceilings import MemoryRates, gemm_seconds
from mvlm_benchmarks.clock import Clock, Refused, Timing, WrongValue
from mvlm_benchmarks.gpu_state import GpuState
from mvlm_benchmarks.intervals import Ratio, ratio
from mvlm_benchmarks.kernels.checks import REPEATS, torch_reasons
from mvlm_benchmarks.kernels.measure import LocalContender, Outcome
from mvlm_benchmarks.kernels.peers import Peer, ours_as_peer
from mvlm_benchmarks.kernels.reference import CaseData, passes_of
from mvlm_benchmarks.machine import roofline_us
from mvlm_benchmarks.unavailable import Missing, NotApplicable, one_line
from mvlm_kernels.case import Case
from mvlm_kernels.hardware import Gpu

Row = dict[str, Any]
LATE = Outcome("not timed", "--seconds were over")
PREPARED = 0.6
"""Share of the time left to a case on a CPU after which no contender is prepared. One round and checks follow."""


@dataclass
class Entry:
    """One contender at one case: outcomes and measurements by pass."""

    contender: str
    outcomes: dict[str, Outcome]
    runner: LocalContender | None = None
    timings: dict[str, list[Timing]] = field(default_factory=dict)
    graph_us: dict[str, float | None] = field(default_factory=dict)
    peak_mb: dict[str, float | None] = field(default_factory=dict)
    repeats: str = ""
    kernels: str = ""
    state: Row = field(default_factory=dict)
    """State of the GPU after the last timed pass."""

    def attempt(self, what: Literal["time", "graph", "peak_mb"], name: str) -> Any:
        """Measure a figure of a pass. Returns None if the pass fails, or failed before; other passes continue."""
        outcome = self.outcomes[name]
        if outcome.status != "ok":
            return None
        try:
            return getattr(self.runner, what)(name)
        except WrongValue as error:
            self.outcomes[name] = Outcome("WRONG", str(error))
        except Refused as error:
            self.refuse(str(error))
        except Exception as error:
            # A pass without a peak or a CUDA graph still has its time.
            status = "error" if what == "time" else "ok"
            self.outcomes[name] = Outcome(status, f"{outcome.note} {what}: {one_line(error)}".strip())
            _free_memory()
        return None

    def refuse(self, reason: str, status: str = "REFUSED") -> None:
        """Replace the outcome of every pass by a refusal, so that no figure is reported."""
        self.outcomes = dict.fromkeys(self.outcomes, Outcome(status, reason))

    def check_after(self, device: str) -> None:
        """Check kept results, repeats and kernels, after everything is timed. A contender that fails has no figures."""
        runner, good = self.runner, [name for name, outcome in self.outcomes.items() if outcome.status == "ok"]
        if runner is None or not good:
            return
        try:
            runner.check_kept_results(good[-1])
            self.repeats = runner.repeats(good[-1], REPEATS[device])
            if self.contender == "ours" and ", the first" in self.repeats:
                self.refuse(f"repeats differ: {self.repeats}", "WRONG")
            if self.contender == "ours" and device == "cuda" and runner.has_kernels:
                self.kernels = runner.kernels(good[-1])
        except Refused as error:
            self.refuse(str(error))
        except Exception as error:
            self.refuse(f"checks after timing: {one_line(error)}", "error")
            _free_memory()


def _free_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def bench_case(
    case: Case,
    device: str,
    peers: Iterable[Peer],
    clock: Clock,
    rounds: int,
    state: GpuState | None = None,
    budget: Budget | None = None,
) -> list[Entry]:
    """Measure all contenders: ours, and the peers that have a builder for the op.

    On a CPU a preparation that does not fit into the budget is broken off, such as a compiler's, and rounds are left
    out. On a GPU a case is finished.
    """
    names, limit = passes_of(case), budget if budget is not None and device == "cpu" else Budget()
    prepared = limit.used + PREPARED * limit.left
    contenders = [ours_as_peer(case), *(peer for peer in peers if case.op in peer.builders)]
    try:
        data = CaseData.make(case, device)
    except Exception as error:
        outcome = Outcome("error", f"the float64 reference did not run: {one_line(error)}")
        _free_memory()
        return [Entry(peer.name, dict.fromkeys(names, outcome)) for peer in contenders]
    entries = []
    for peer in contenders:
        try:
            with limit.until((limit.used + prepared) / 2):  # a slow one leaves as much to the others
                entries.append(prepare(peer, data, clock))
        except OutOfTime:
            entries.append(Entry(peer.name, dict.fromkeys(names, LATE)))
    if device == "cuda" and entries[0].runner is not None and (note := torch_reasons(case, data.sets[0])):
        # A fallback is never timed as ours. The peers have its figures.
        entries[0] = Entry("ours", dict.fromkeys(names, Outcome("torch", f"runs torch: {note}")))

    start = limit.used
    for number in range(rounds):
        if number and limit.left < 2 * (limit.used - start) / number:  # of a round, and of the checks
            break
        for entry in entries:
            for name in names:
                if (timing := entry.attempt("time", name)) is not None:
                    entry.timings.setdefault(name, []).append(timing)
            entry.state = state.read() if state is not None else {}
    for entry in entries:
        for name in names:
            entry.peak_mb[name] = entry.attempt("peak_mb", name)
    for entry in entries:
        entry.check_after(device)
    # Graphs come last: a failed capture may leave the device in a state that spoils later measurements.
    for entry in entries:
        for name in names:
            entry.graph_us[name] = entry.attempt("graph", name)
    return entries


def prepare(peer: Peer, data: CaseData, clock: Clock) -> Entry:
    """Build a peer's functions for the case, and compare forward and backward with the reference."""
    names = passes_of(data.case)
    try:
        functions = [peer.builders[data.case.op](inputs) for inputs in data.sets]
    except (ImportError, Missing) as error:
        return Entry(peer.name, dict.fromkeys(names, Outcome("missing", str(error))))
    except NotApplicable as error:
        return Entry(peer.name, dict.fromkeys(names, Outcome("not applicable", str(error))))
    except Exception as error:
        _free_memory()
        return Entry(peer.name, dict.fromkeys(names, Outcome("error", one_line(error))))
    local = LocalContender(data, functions, clock, peer.context)
    return Entry(peer.name, local.check(), local)


@dataclass(frozen=True)
class Ceilings:
    """Rates to compare with: those of the data sheet, None for an unknown machine, and those measured in this run.

    The data sheet's are for bfloat16 and float16, so float32 has no `roofline_pct`.
    """

    gpu: Gpu | None = None
    measured: MemoryRates | None = None
    gemm_us: float | None = None
    """Microseconds of torch's matrix product at the sizes of the case."""


def case_ceilings(case: Case, device: str, gpu: Gpu | None, measured: MemoryRates | None) -> Ceilings:
    """The ceilings of a case. Times the matrix product that it contains."""
    gemm_us = None
    if case.product is not None:
        try:
            gemm_us = 1e6 * gemm_seconds(case.product, case.dtype, device)
        except RuntimeError:  # out of memory
            _free_memory()
    return Ceilings(gpu, measured, gemm_us)


def rows_of(case: Case, entries: list[Entry], ceilings: Ceilings = Ceilings()) -> list[Row]:
    """Rows of results, one per contender and pass. Missing figures are None."""
    gpu, measured = ceilings.gpu, ceilings.measured
    roofline = roofline_us(case.minimum, case.flops, gpu) if gpu and case.dtype != torch.float32 else {}
    forward, backward = case.minimum
    bytes_minimum = {"forward": forward, "backward": backward, "both": forward + backward}
    # A pass that failed in a later round has no figures.
    timings = {
        entry.contender: {n: found for n, found in entry.timings.items() if entry.outcomes[n].status == "ok"}
        for entry in entries
    }
    rows = []
    for entry in entries:
        for name, outcome in entry.outcomes.items():
            found = timings[entry.contender].get(name)
            timing = _median(found) if found else None
            ok = outcome.status == "ok"
            us = timing.us if timing else None
            over_ours = _ratio(found, timings.get("ours", {}).get(name))
            rate = bytes_minimum[name] / us * 1e6 if us else None
            # Peers divide the work between the passes in another way, so a bound of one pass is none of theirs.
            bounded = entry.contender == "ours" or name == "both" or not case.gradients_in_forward
            row = {
                "op": case.op,
                "pass": name,
                "shape": case.label,
                "dtype": str(case.dtype).removeprefix("torch."),
                "contender": entry.contender,
                "status": outcome.status,
                "note": outcome.note,
                "us": us,
                "us_p20": timing.p20 if timing else None,
                "us_p80": timing.p80 if timing else None,
                "cpu_us": timing.cpu_us if timing else None,
                "graph_us": entry.graph_us.get(name) if ok else None,
                "gb_per_s": rate / 1e9 if rate else None,
                "roofline_pct": 100 * roofline[name] / us if us and roofline and bounded else None,
                "gemm_us": ceilings.gemm_us,
                "peak_mb": entry.peak_mb.get(name) if ok else None,
                "vs_ours": over_ours.value if over_ours else None,
                "vs_ours_low": over_ours.low if over_ours else None,
                "vs_ours_high": over_ours.high if over_ours else None,
                "verdict": over_ours.verdict if over_ours and entry.contender != "ours" else "",
                "bytes_minimum": bytes_minimum[name],
                "repeats": entry.repeats,
                "kernels": entry.kernels,
                **entry.state,
            }
            for ceiling in ("copy", "read", "triad"):
                row[f"{ceiling}_pct"] = 100 * rate / getattr(measured, ceiling) if rate and measured else None
            rows.append({key: _rounded(value) for key, value in row.items()})
    return rows


def _ratio(found: list[Timing] | None, others: list[Timing] | None) -> Ratio | None:
    """Ratio of the times of rounds that both have."""
    if not found or not others:
        return None
    both = list(zip(found, others, strict=False))  # a pass may have failed in a later round
    return ratio([a.calls or (a.us,) for a, _ in both], [b.calls or (b.us,) for _, b in both])


def _median(timings: list[Timing]) -> Timing:
    cpu = [t.cpu_us for t in timings if t.cpu_us is not None]
    us, p20, p80 = (statistics.median(getattr(t, k) for t in timings) for k in ("us", "p20", "p80"))
    return Timing(us, p20, p80, cpu_us=statistics.median(cpu) if cpu else None)


def _rounded(value: Any) -> Any:
    return round(value, 3) if isinstance(value, float) else value
