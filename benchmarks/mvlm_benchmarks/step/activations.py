"""Peak activation memory of a step: all allocations except parameters, their gradients and optimizer state.

On a CPU, torch's profiler records every allocation, including temporaries inside operators, and `replay` finds the
peak. Scratch memory that oneDNN and MKL allocate from the system is not recorded, for any contender. On a GPU, the
caching allocator reports the peak.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mvlm_benchmarks.clock import cuda_peak_mb

Event = dict[str, Any]
"""A memory event in the profiler's trace: Ev Idx, Addr, Bytes (negative for a free), Device Type (0 = CPU)."""


def peak_mb(backward: Callable[[], Any], parameters: Iterable[Tensor], device: str) -> float:
    """Measure the peak memory of `backward`, which runs one forward and backward pass, in megabytes (10^6 bytes).

    Gradients of parameters never count. On a CPU, no parameter has a gradient afterwards.
    """
    parameters = list(parameters)
    backward()  # warm-up: fills caches and compiles
    if device == "cuda":
        # The warm-up has allocated the gradients. One of this pass counts until it is added to the earlier one.
        return cuda_peak_mb(backward)
    for parameter in parameters:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        backward()
    gradients = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    for parameter in parameters:
        parameter.grad = None
    return replay(events, gradients) / 1e6


def replay(events: list[Event], gradients: set[int]) -> int:
    """Maximum number of bytes alive at the same time, from the profiler's allocations and frees.

    Memory that was allocated before the trace does not count, because only its free is recorded.

    Args:
        events: memory events in any order.
        gradients: addresses of gradients. An allocation at one of them that is never freed does not count.
    """
    events = sorted((e for e in events if e["Device Type"] == 0), key=lambda e: e["Ev Idx"])
    allocated_by: dict[int, int] = {}  # address -> number of the event that allocated its current block
    for number, event in enumerate(events):
        if event["Bytes"] > 0:
            allocated_by[event["Addr"]] = number
        else:
            allocated_by.pop(event["Addr"], None)
    excluded = {number for address, number in allocated_by.items() if address in gradients}
    alive: dict[int, int] = {}
    total = peak = 0
    for number, event in enumerate(events):
        address, size = event["Addr"], event["Bytes"]
        if size > 0 and number not in excluded:
            alive[address] = size
            total += size
            peak = max(peak, total)
        elif size < 0:
            total -= alive.pop(address, 0)
    return peak
