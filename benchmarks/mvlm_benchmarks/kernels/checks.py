"""Checks of results, inputs and kernels, by which a contender is refused.

A benchmark is also read by people who do not trust its authors. Each check here shows one way of looking fast without
being fast: results that are not computed, kept from an earlier call, or finished when the timer has stopped; inputs
that are changed; another implementation under the same name. `mvlm_benchmarks.clock` refuses replaced timers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.clock import Refused, Results
from mvlm_kernels import dispatch
from mvlm_kernels.case import Case, Inputs

REPEATS = {"cuda": 50, "cpu": 5}
"""Repeats that are compared bit for bit, by type of device."""


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest error over the largest wanted value. Infinite if a shape differs or a value is not finite."""
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return float("inf")
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def difference(found: Results, wanted: Results, limit: float, what: str) -> str:
    """Description of the first result that is off by more than the limit, or ""."""
    if len(found) != len(wanted):
        return f"{what} has {len(found)} tensors, wanted {len(wanted)}"
    for number, (got, want) in enumerate(zip(found, wanted, strict=True), 1):
        error = relative_error(got.detach(), want)
        if not error <= limit:
            place = f" {number} of {len(wanted)}" if len(wanted) > 1 else ""
            return f"{what}{place} is off by {error:.2g} of its largest value, allowed {limit:.0e}"
    return ""


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: NaN equals itself, and 0 does not equal -0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


@torch.no_grad()
def exchange_values(first: Inputs, second: Inputs) -> None:
    """Exchange the values of two inputs of one case, in place."""
    for a, b in zip(first.values(), second.values(), strict=True):
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)


def poison(like: Results) -> None:
    """Allocate tensors like these, fill them with NaN (integers with 1) and free them. The next ones get the memory.

    Three of each, because an allocator may have several free blocks of a size.
    """
    held = [torch.empty_like(x, requires_grad=False) for x in like for _ in range(3)]
    for x in held:
        x.fill_(float("nan") if x.is_floating_point() else 1)


def torch_reasons(case: Case, inputs: Inputs) -> str:
    """Reasons why our op would run torch instead of Triton on these inputs, or ""."""
    if not case.has_kernels:
        return ""
    choice = mvlm_kernels.explain(case.ours, **inputs.leaves, **inputs.fixed)
    return "" if choice.backend == "triton" else "; ".join(choice.reasons)


def expected_kernels(call: Callable[[], Any], arch: int = 90) -> list[str]:
    """Names of the kernels that a call of our ops launches, in order. Nothing is launched. arch: 80, 90 or 100."""
    names: list[str] = []
    with dispatch.recording(lambda kernel, *_: names.append(kernel.__name__), arch), mvlm_kernels.use_backend("triton"):
        call()
    return names


def gpu_events(call: Callable[[], Any]) -> list[Any]:
    """Events of torch's profiler for every kernel and copy that a call runs on the GPU.

    Annotations are left out: that of an optimizer's step spans kernels that are events themselves.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events() or ()
    return [event for event in events if str(event.device_type).endswith("CUDA") and not event.is_user_annotation]


def check_kernels(expected: list[str], launched: list[tuple[str, int]]) -> str:
    """Compare kernels that should run with those that a profiler saw, (name, stream) each.

    Returns:
        A summary of all that ran, such as `short_kv_forward x1; short_kv_backward x1`.

    Raises:
        Refused: a kernel did not run, none was expected, or kernels ran on more than one stream.
        RuntimeError: the profiler is blind.
    """
    names = [name for name, _ in launched]
    if not names:
        raise RuntimeError("the profiler saw nothing on the GPU; it may lack libcupti, or the right to count")
    missing = sorted(set(expected) - set(names))
    if missing or not expected:
        raise Refused(
            f"wanted the kernels {', '.join(sorted(set(expected))) or '(none recorded)'}, the profiler saw "
            f"{', '.join(sorted(set(names))) or 'none'}: another implementation ran"
        )
    streams = {stream for _, stream in launched}
    if len(streams) > 1:
        raise Refused(f"kernels ran on {len(streams)} streams, and a timer sees one")
    return "; ".join(f"{name[:60]} x{names.count(name)}" for name in dict.fromkeys(names))
