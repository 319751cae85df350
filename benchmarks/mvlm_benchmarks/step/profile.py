"""`mvlm bench step --profile`: breakdown of a step's time as tables, a chart and traces for Perfetto."""

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm_benchmarks.results import save_figure
from mvlm_benchmarks.step.contenders import COMPILED, Contender, StepInputs
from mvlm_benchmarks.step.parts import MATCHING, OTHER, PARTS, PREFIX, mark_model_parts

BACKWARD, OPTIMIZER = "backward", "optimizer"
BACKWARD_NODE = "autograd::engine::evaluate_function"
"""Prefix of the profiler events of backward nodes."""
COLORS: dict[str, str] = dict(
    zip(
        (*PARTS, OTHER, OPTIMIZER),
        ("#1f77b4", "#ff7f0e", "#2ca02c", "#98df8a", "#d62728", "#9467bd", "#c5b0d5", "#8c564b", "#e377c2", "#bbbbbb",
         "#333333"),
        strict=True,
    )
)  # fmt: skip
Breakdown = dict[str, dict[str, float]]
"""Part -> {"forward": ms, "backward": ms}. The optimizer counts as forward."""


def profile_steps(contenders: list[Contender], inputs: StepInputs, folder: Path) -> dict[str, Breakdown]:
    """Profile one step of each contender, and print a table of each.

    Writes CONTENDER.trace.json and breakdown.png to `folder`. Compiled code has no parts, so all of it is `other`. On a
    CPU a second table has the processor time by operation, of code that is not compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    breakdowns = {}
    for contender in contenders:
        path = folder / f"{contender.name}.trace.json"
        breakdowns[contender.name] = profile_step(contender, inputs, path)
        print(table(contender.name, breakdowns[contender.name]), f"\n{path}", flush=True)
        if not inputs.batch.images.is_cuda and contender.name not in COMPILED:
            print(operations_table(contender.name, time_operations(contender, inputs)), flush=True)
    plot_breakdowns(breakdowns, folder / "breakdown.png")
    print(folder / "breakdown.png")
    return breakdowns


def profile_step(contender: Contender, inputs: StepInputs, path: Path) -> Breakdown:
    """Profile one step after a warm-up step, and write its trace to `path`."""
    contender.backward(inputs)
    contender.update()
    cuda = inputs.batch.images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with mark_model_parts(contender.module), profile(activities=activities, acc_events=True) as profiler:
        losses = contender.losses(inputs)
        with record_function(PREFIX + BACKWARD):
            losses.total.backward()
        with record_function(PREFIX + OPTIMIZER):
            contender.update()
        if cuda:
            torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return break_down(list(profiler.events() or ()), "device_time_total" if cuda else "cpu_time_total")


class OperationTimes(TorchDispatchMode):
    """Calls and milliseconds of the calling thread, by operation. An op of ours counts as one operation.

    Processor time, because on a busy machine most of the wall-clock time belongs to others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, tuple[int, float]] = {}
        """Name of the operation -> (calls, ms)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.thread_time()
        result = func(*args, **(kwargs or {}))
        spent = 1e3 * (time.thread_time() - started)
        name = f"{func.namespace}.{func.overloadpacket.__name__}"
        calls, milliseconds = self.rows.get(name, (0, 0.0))
        self.rows[name] = calls + 1, milliseconds + spent
        return result


def time_operations(contender: Contender, inputs: StepInputs) -> dict[str, tuple[int, float]]:
    """Calls and milliseconds of one step by operation, the longest first."""
    with OperationTimes() as operations:
        contender.backward(inputs)
        contender.update()
    return dict(sorted(operations.rows.items(), key=lambda row: -row[1][1]))


def operations_table(name: str, operations: dict[str, tuple[int, float]], rows: int = 20) -> str:
    """Table of the longest operations, and the sum of all."""
    whole = sum(milliseconds for _, milliseconds in operations.values())
    lines = ["", f"{name + ', by operation':48}{'calls':>7}{'cpu ms':>9}{'%':>7}"]
    for operation, (calls, milliseconds) in list(operations.items())[:rows]:
        lines.append(f"{operation:48}{calls:7}{milliseconds:9.1f}{100 * milliseconds / whole:7.1f}")
    calls = sum(count for count, _ in operations.values())
    return "\n".join([*lines, f"{'total':48}{calls:7}{whole:9.1f}{100.0:7.1f}"])


def break_down(events: list[Any], time: str) -> Breakdown:
    """Sum up the profiler's events as milliseconds by part.

    A backward node counts for the part whose forward operator created it. The two have the same sequence number. Time
    outside all parts is `other`: accumulation of gradients, the autograd engine, code between parts.

    Args:
        time: field of an event that is summed, with host time or device time.
    """
    host = sorted((e for e in events if str(e.device_type).endswith("CPU")), key=lambda e: e.time_range.start)
    result: Breakdown = {OTHER: {"forward": 0.0, "backward": 0.0}}
    creators: dict[int, str] = {}  # sequence number -> part
    open_parts: list[Any] = []  # without parts inside ITM, which count as ITM
    outermost: list[Any] = []
    for event in host:
        while open_parts and event.time_range.start >= open_parts[-1].time_range.end:
            open_parts.pop()
        part = _part_name(open_parts[-1]) if open_parts else OTHER
        if event.name.startswith(PREFIX) and part != MATCHING:
            if open_parts:
                _add(result, part, "forward", -getattr(event, time))
            else:
                outermost.append(event)
            _add(result, _part_name(event), "forward", getattr(event, time))
            open_parts.append(event)
        elif event.name.startswith(BACKWARD_NODE):
            _add(result, creators.get(event.sequence_nr, OTHER), "backward", getattr(event, time))
        elif event.sequence_nr >= 0 and part not in (BACKWARD, OPTIMIZER):
            # Sequence numbers increase when an operator creates a node. The last operator with a number is its creator.
            creators[event.sequence_nr] = part
    whole = result.pop(BACKWARD, {"forward": 0.0})["forward"]
    booked = sum(by_pass["backward"] for by_pass in result.values())
    result[OTHER]["backward"] += max(0.0, whole - booked)
    if time == "cpu_time_total":
        _add(result, OTHER, "forward", sum(b.time_range.start - a.time_range.end for a, b in pairwise(outermost)))
    return result


def _part_name(event: Any) -> str:
    return event.name.removeprefix(PREFIX)


def _add(breakdown: Breakdown, part: str, which: str, microseconds: float) -> None:
    by_pass = breakdown.setdefault(part, {"forward": 0.0, "backward": 0.0})
    by_pass[which] += microseconds / 1e3


def _ordered(breakdown: Breakdown) -> list[str]:
    return [part for part in (*PARTS, OTHER, OPTIMIZER) if part in breakdown]


def table(name: str, breakdown: Breakdown) -> str:
    """Table of milliseconds and percentage by part."""
    whole = sum(value for by_pass in breakdown.values() for value in by_pass.values())
    lines = ["", f"{name:28}{'forward ms':>12}{'backward ms':>13}{'%':>7}"]
    for part in _ordered(breakdown):
        forward, backward = breakdown[part]["forward"], breakdown[part]["backward"]
        lines.append(f"{part:28}{forward:12.1f}{backward:13.1f}{100 * (forward + backward) / whole:7.1f}")
    forward, backward = (sum(by_pass[which] for by_pass in breakdown.values()) for which in ("forward", "backward"))
    return "\n".join([*lines, f"{'total':28}{forward:12.1f}{backward:13.1f}{100.0:7.1f}"])


def plot_breakdowns(breakdowns: dict[str, Breakdown], path: Path) -> None:
    """Draw one stacked bar per contender. Each part has a colour; backward is hatched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 * len(breakdowns) + 2), layout="constrained")
    axes = figure.subplots()
    parts = list(dict.fromkeys(part for breakdown in breakdowns.values() for part in _ordered(breakdown)))
    for which, hatch in (("forward", None), ("backward", "////")):
        for part in parts:
            values = [breakdown.get(part, {}).get(which, 0.0) for breakdown in breakdowns.values()]
            left = [_left_edge(breakdown, part, which, parts) for breakdown in breakdowns.values()]
            label = part if which == "forward" else None
            axes.barh(
                range(len(breakdowns)), values, left=left, color=COLORS[part], hatch=hatch, edgecolor="white",
                label=label,
            )  # fmt: skip
    axes.set_yticks(range(len(breakdowns)), list(breakdowns), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step under the profiler; hatched: backward pass", fontsize=8)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    save_figure(figure, path, dpi=120)


def _left_edge(breakdown: Breakdown, part: str, which: str, parts: list[str]) -> float:
    """Left edge of a segment of a bar, in milliseconds. All forward segments come before all backward segments."""
    earlier = parts[: parts.index(part)]
    left = sum(breakdown.get(name, {}).get(which, 0.0) for name in earlier)
    return left + (sum(by_pass["forward"] for by_pass in breakdown.values()) if which == "backward" else 0.0)
