"""``mvlm bench step --profile``: where a step's time goes, as a table, a chart and a trace for Perfetto."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from mvlm.parts import MATCHING, PARTS, PREFIX
from mvlm_benchmarks.step.contenders import Contender, Inputs
from mvlm_benchmarks.step.parts import OTHER, parts_of

BACKWARD, OPTIMIZER = "backward", "optimizer"
NODE = "autograd::engine::evaluate_function"
COLORS: dict[str, str] = dict(
    zip(
        (*PARTS, OTHER, OPTIMIZER),
        ("#1f77b4", "#ff7f0e", "#2ca02c", "#98df8a", "#d62728", "#9467bd", "#c5b0d5", "#8c564b", "#e377c2", "#bbbbbb",
         "#333333"),
        strict=True,
    )
)  # fmt: skip
Breakdown = dict[str, dict[str, float]]
"""Part -> milliseconds of its forward and of its backward; the optimizer has a forward alone."""


def profile_steps(ready: list[Contender], inputs: Inputs, folder: Path) -> dict[str, Breakdown]:
    """Profile one step of each contender: print the table, write CONTENDER.trace.json and breakdown.png to `folder`.

    Compiled code has no parts: all of it is `other`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for contender in ready:
        path = folder / f"{contender.name}.trace.json"
        found[contender.name] = profile_step(contender, inputs, path)
        print(table(contender.name, found[contender.name]), f"\n{path}", flush=True)
    chart(found, folder / "breakdown.png")
    print(folder / "breakdown.png")
    return found


def profile_step(contender: Contender, inputs: Inputs, path: Path) -> Breakdown:
    """One step under the profiler, after one that is not; the trace is written to `path`."""
    contender.backward(inputs)
    contender.update()
    cuda = inputs.batch.images.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with parts_of(contender.module), profile(activities=activities, acc_events=True) as seen:
        losses = contender.losses(inputs)
        with record_function(PREFIX + BACKWARD):
            losses.total.backward()
        with record_function(PREFIX + OPTIMIZER):
            contender.update()
        if cuda:
            torch.cuda.synchronize()
    seen.export_chrome_trace(str(path))
    return breakdown(list(seen.events() or ()), "device_time_total" if cuda else "cpu_time_total")


def breakdown(events: list[Any], time: str) -> Breakdown:
    """Milliseconds by part. `time` is the event's field to add up: the host's time, or the device's.

    A node of the backward belongs to the part whose forward operator made it, which the profiler tells by a sequence
    number. What no part holds (gradients being accumulated, the engine, code between parts) is `other`.
    """
    host = sorted((e for e in events if str(e.device_type).endswith("CPU")), key=lambda e: e.time_range.start)
    found: Breakdown = {OTHER: {"forward": 0.0, "backward": 0.0}}
    made_by: dict[int, str] = {}
    inside: list[Any] = []  # the parts that are open, but for those inside ITM
    outermost: list[Any] = []
    for event in host:
        while inside and event.time_range.start >= inside[-1].time_range.end:
            inside.pop()
        part = _name(inside[-1]) if inside else OTHER
        if event.name.startswith(PREFIX) and part != MATCHING:
            if inside:
                _add(found, part, "forward", -getattr(event, time))
            else:
                outermost.append(event)
            _add(found, _name(event), "forward", getattr(event, time))
            inside.append(event)
        elif event.name.startswith(NODE):
            _add(found, made_by.get(event.sequence_nr, OTHER), "backward", getattr(event, time))
        elif event.sequence_nr >= 0 and part not in (BACKWARD, OPTIMIZER):
            # Of several operators with one number the last made the node: the number rises when it does.
            made_by[event.sequence_nr] = part
    whole = found.pop(BACKWARD, {"forward": 0.0})["forward"]
    booked = sum(by_pass["backward"] for by_pass in found.values())
    found[OTHER]["backward"] += max(0.0, whole - booked)
    if time == "cpu_time_total":
        _add(found, OTHER, "forward", sum(b.time_range.start - a.time_range.end for a, b in pairwise(outermost)))
    return found


def _name(event: Any) -> str:
    return event.name.removeprefix(PREFIX)


def _add(found: Breakdown, part: str, which: str, microseconds: float) -> None:
    by_pass = found.setdefault(part, {"forward": 0.0, "backward": 0.0})
    by_pass[which] += microseconds / 1e3


def _ordered(found: Breakdown) -> list[str]:
    return [name for name in (*PARTS, OTHER, OPTIMIZER) if name in found]


def table(name: str, found: Breakdown) -> str:
    """Milliseconds and per cent of each part."""
    whole = sum(value for by_pass in found.values() for value in by_pass.values())
    lines = ["", f"{name:28}{'forward ms':>12}{'backward ms':>13}{'%':>7}"]
    for part in _ordered(found):
        forward, backward = found[part]["forward"], found[part]["backward"]
        lines.append(f"{part:28}{forward:12.1f}{backward:13.1f}{100 * (forward + backward) / whole:7.1f}")
    forward, backward = (sum(by_pass[which] for by_pass in found.values()) for which in ("forward", "backward"))
    return "\n".join([*lines, f"{'in all':28}{forward:12.1f}{backward:13.1f}{100.0:7.1f}"])


def chart(found: dict[str, Breakdown], path: Path) -> None:
    """A bar for each contender, forward and backward of each part in one colour, the backward hatched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.8 * len(found) + 2), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(part for breakdown in found.values() for part in _ordered(breakdown)))
    for which, hatch in (("forward", None), ("backward", "////")):
        for part in names:
            values = [breakdown.get(part, {}).get(which, 0.0) for breakdown in found.values()]
            before = [_before(breakdown, part, which, names) for breakdown in found.values()]
            label = part if which == "forward" else None
            axes.barh(
                range(len(found)), values, left=before, color=COLORS[part], hatch=hatch, edgecolor="white", label=label
            )
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds of one step under the profiler; hatched is the backward pass", fontsize=8)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120)


def _before(found: Breakdown, part: str, which: str, names: list[str]) -> float:
    """Milliseconds left of this piece: all forward pieces come before all backward ones."""
    earlier = names[: names.index(part)]
    before = sum(found.get(name, {}).get(which, 0.0) for name in earlier)
    return before + (sum(by_pass["forward"] for by_pass in found.values()) if which == "backward" else 0.0)
