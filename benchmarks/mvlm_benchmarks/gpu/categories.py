"""GPU time of one training step by category: matrix products, attention, our kernels, norms, elementwise, optimizer."""

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from torch.profiler import ProfilerActivity, profile

import mvlm_kernels
from mvlm_benchmarks.kernels.checks import gpu_events

Row = dict[str, Any]
IDLE = "idle"
# Parts of names, in lower case; the first category with a match counts. Attention comes first, because some of its
# kernels are made by a library for matrix products and have its name.
_PARTS = {
    "attention (SDPA)": ("flash", "fmha", "sdpa", "attention"),
    "optimizer": ("adam", "multi_tensor", "foreach"),
    "matrix products": ("gemm", "gemv", "nvjet", "cutlass", "xmma", "cublas", "splitk", "::mm", "::addmm", "::bmm",
                        "mkldnn", "::linear"),
    "norms": ("layer_norm", "layernorm", "norm"),
    "copies and fills": ("memcpy", "memset", "copy", "fill", "::zero_"),
    "indexing, sorting, joining": ("index", "gather", "scatter", "sort", "catarray", "::cat", "embedding"),
    "softmax and losses": ("softmax", "nll"),
    "elementwise and sums": ("elementwise", "reduce", "gelu", "vectorized", "::add", "::mul", "::sum", "::div", "::sub",
                             "triton_"),
}  # fmt: skip
OURS = "our kernels"
CATEGORIES = (OURS, *_PARTS, "other", IDLE)


class Span(NamedTuple):
    """A kernel on the GPU, or an operator on a CPU: name, begin and end in microseconds."""

    name: str
    begin: float
    end: float


@cache
def our_kernels() -> frozenset[str]:
    """Names of all Triton functions of `mvlm_kernels`."""
    found = set()
    for module in pkgutil.walk_packages(mvlm_kernels.__path__, "mvlm_kernels."):
        if ".integrations" in module.name or module.name.endswith((".aot", "__main__")):
            continue
        for value in vars(importlib.import_module(module.name)).values():
            if type(value).__module__.startswith("triton.") and hasattr(value, "fn"):
                found.add(value.fn.__name__)
    return frozenset(found)


def category_of(name: str) -> str:
    """Category of a kernel or an operator by its name."""
    if name in our_kernels():
        return OURS
    lower = name.lower()
    return next((category for category, parts in _PARTS.items() if any(p in lower for p in parts)), "other")


def by_category(spans: Iterable[Span]) -> list[Row]:
    """Rows of category, milliseconds, share in per cent, number of kernels, and the longest kernel's name.

    `idle` is the time between the first begin and the last end in which nothing ran.
    """
    ordered = sorted(spans, key=lambda span: span.begin)
    if not ordered:
        return []
    busy, reached = 0.0, ordered[0].begin
    totals: dict[str, list[float]] = {}
    longest: dict[str, dict[str, float]] = {}
    for span in ordered:
        category = category_of(span.name)
        total = totals.setdefault(category, [0.0, 0])
        total[0] += span.end - span.begin
        total[1] += 1
        names = longest.setdefault(category, {})
        names[span.name] = names.get(span.name, 0.0) + span.end - span.begin
        busy += max(0.0, span.end - max(reached, span.begin))
        reached = max(reached, span.end)
    whole = reached - ordered[0].begin
    totals[IDLE] = [whole - busy, 0]
    return [
        {
            "category": category,
            "ms": totals[category][0] / 1e3,
            "pct": 100 * totals[category][0] / whole if whole else 0.0,
            "kernels": totals[category][1],
            "longest": max(longest[category], key=longest[category].__getitem__)[:120] if category in longest else "",
        }
        for category in CATEGORIES
        if category in totals
    ]


def profile_call(call: Callable[[], Any], device: str) -> list[Span]:
    """Kernels of a call on a GPU; on a CPU its outermost operators. The call runs once before, for warm-up."""
    call()
    if device == "cuda":
        events = gpu_events(call)
    else:
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            call()
        events = [event for event in profiler.events() or () if _is_outermost(event)]
    return [Span(event.name, event.time_range.start, event.time_range.end) for event in events]


def _is_outermost(event: Any) -> bool:
    """True for an operator of torch that no other operator called."""
    if not event.name.startswith("aten::"):
        return False
    while (event := event.cpu_parent) is not None:
        if event.name.startswith("aten::"):
            return False
    return True
