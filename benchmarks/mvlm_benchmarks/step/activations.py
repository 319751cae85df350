"""The peak of activation memory of a step: everything that is allocated, but for parameters, gradients and optimizer
state.

On a CPU every allocation of torch is recorded by the profiler, temporaries inside an operator included, and replayed
here; scratch memory that oneDNN or MKL take from the system is not torch's and is left out for everyone. On a GPU the
caching allocator keeps the peak itself.
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Event = dict[str, Any]


def peak_mb(backward: Callable[[], Any], parameters: Iterable[nn.Parameter], device: str) -> float:
    """Megabytes (10^6 bytes) at the highest point of `backward`, one forward and backward pass.

    Afterwards no parameter has a gradient. The parameters' own gradients do not count, not even those that are already
    there while activations are still alive.
    """
    parameters = list(parameters)
    backward()  # what is made once (caches, compiled code) is made here
    if device == "cuda":
        return _cuda_peak(backward)
    for parameter in parameters:
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        backward()
    gradients = {p.grad.untyped_storage().data_ptr() for p in parameters if p.grad is not None}
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        found.export_chrome_trace(str(trace))
        events = [e["args"] for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    for parameter in parameters:
        parameter.grad = None
    return replay(events, gradients) / 1e6


def replay(events: list[Event], gradients: set[int]) -> int:
    """The largest number of bytes alive at once, from the profiler's allocations and frees in their order.

    An allocation that is never freed at one of the addresses `gradients` is a gradient, and left out from its start.
    Memory that was there before is freed without having been allocated here, and is left out too.
    """
    events = sorted((e for e in events if e["Device Type"] == 0), key=lambda e: e["Ev Idx"])
    born: dict[int, int] = {}  # address -> number of the event that allocated what lies there now
    for number, event in enumerate(events):
        if event["Bytes"] > 0:
            born[event["Addr"]] = number
        else:
            born.pop(event["Addr"], None)
    left_out = {number for address, number in born.items() if address in gradients}
    alive: dict[int, int] = {}
    now = peak = 0
    for number, event in enumerate(events):
        address, size = event["Addr"], event["Bytes"]
        if size > 0 and number not in left_out:
            alive[address] = size
            now += size
            peak = max(peak, now)
        elif size < 0:
            now -= alive.pop(address, 0)
    return peak


def _cuda_peak(backward: Callable[[], Any]) -> float:
    """The gradients of the first pass stay, so the second adds to them: one of its own at a time is counted."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    backward()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def parameter_mb(parameters: Iterable[Tensor]) -> float:
    """Megabytes of the parameters themselves."""
    return sum(p.numel() * p.element_size() for p in parameters) / 1e6
