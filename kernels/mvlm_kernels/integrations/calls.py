"""Report of a swap in a model: the swapped parts, and the calls that the kernels compute."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention import why_not_triton
from mvlm_kernels.dispatch import Refusal, refusal
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear

ALREADY_SWAPPED = refusal("it is swapped already", "undo the earlier swap first")
# accelerate puts its hooks on a module so. Such a forward would run in place of ours, or be lost.
OTHER_FORWARD = refusal(
    "it has a forward of its own, as hooks of accelerate put on", "remove it, swap, put it on again"
)

ELSEWHERE = (
    "mvlm_kernels.integrations.transformers swaps the attention of transformers' models, .timm the patch embedding of "
    "timm's, .blocks the layers of others"
)


@dataclass(frozen=True)
class Part:
    """One module of a model that a swap, which lets our kernels compute modules, looked at.

    path: name of the module in the model, "" for the model itself. kind: class of the module. reason: why it was left
    as it was; None if it was swapped. fused: layers of a swapped module that one call of an op computes; "" for all.
    """

    path: str
    kind: str
    reason: Refusal | None = None
    fused: str = ""


@dataclass
class SwapReport:
    """Modules ("parts") of a model that a swap looked at, in the model's order.

    ``str(report)`` has one line a part. :meth:`undo` puts everything back. :meth:`explain` says which calls the kernels
    compute for given inputs: a swapped part may have none.
    """

    parts: Sequence[Part]
    restore: Callable[[], None] = field(repr=False)
    model: torch.nn.Module = field(repr=False)

    @property
    def swapped(self) -> tuple[Part, ...]:
        """Modules of the model that now use the kernels."""
        return tuple(part for part in self.parts if part.reason is None)

    @property
    def kept(self) -> tuple[Part, ...]:
        """Parts that were left as they were; each has a reason."""
        return tuple(part for part in self.parts if part.reason is not None)

    def explain(self, inputs: Any, *, as_if: str | None = None) -> "ModelExplanation":
        """Explain which calls of the model, as it is now, the kernels compute for these inputs.

        Arguments are those of :func:`mvlm_kernels.explain_model`.
        """
        return explain_swapped(copy.deepcopy(self.model), inputs, as_if)

    def undo(self) -> tuple[Part, ...]:
        """Put the original parts back, and return them. Parameters keep their present values."""
        self.restore()
        return self.swapped

    def __str__(self) -> str:
        lines = [
            f"{'swapped' if part.reason is None else 'kept'}: {part.path or 'the model'} ({part.kind})"
            + (f": {part.reason or part.fused}" if part.reason or part.fused else "")
            for part in self.parts
        ]
        if any(part.fused for part in self.swapped):
            lines.append("all else runs its own code, such as attention, SwiGLU and the last residual sum of a block")
        return "\n".join(lines or [f"nothing to swap: {ELSEWHERE}"])


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention in a swapped model.

    kind: class of the calling module. reasons: why the library's own attention ran; empty if the op did.
    """

    kind: str
    queries: int
    keys: int
    reasons: tuple[Refusal, ...]


_calls: list[AttentionCall] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[AttentionCall]]:
    """List of all attention calls of swapped models inside the block, in all threads, in the order of their start."""
    global _calls
    before, _calls = _calls, []
    try:
        yield _calls
    finally:
        _calls = before


def recording() -> bool:
    """True inside :func:`recorded_calls`."""
    return _calls is not None


def record(module: object, queries: int, keys: int, reasons: tuple[Refusal, ...]) -> None:
    """Add a call to the list of :func:`recorded_calls`, if there is one."""
    if _calls is not None:
        _calls.append(AttentionCall(type(module).__name__, queries, keys, reasons))


def kernel_reasons(device: torch.device, dtype: torch.dtype, width: int, short_rows: int) -> tuple[Refusal, ...]:
    """Reasons why a model keeps its own attention: no kernel runs the call. Empty if one does.

    dtype: after autocast. width: of a head. short_rows: the shorter of the two lengths. On a device without kernels the
    library's own code is as fast as ours or faster, so the op is not called there, except under
    :func:`mvlm_kernels.use_backend`.
    """
    if torch.compiler.is_compiling():
        # A plain int, so that the result is a constant of the graph. Comparisons would bound an exported length, so
        # they are left out where the length does not matter.
        matters = device.type == "cuda" or dispatch.forced() is not None
        short_rows = next(rows for rows in (16, 32, 64, 128, 256, 2**31) if short_rows <= rows) if matters else 1
    return _kernel_reasons(device, dtype, int(width), short_rows, dispatch.forced())


@dispatch.constant_when_compiled
def _kernel_reasons(
    device: torch.device, dtype: torch.dtype, width: int, short_rows: int, forced: str | None
) -> tuple[Refusal, ...]:
    found = why_not_triton(device, dtype, head_width=width, short_rows=short_rows)
    if found and forced is not None and device.type != "cuda":
        without = dispatch.device_reasons(device)
        return tuple(reason for reason in found if reason not in without)
    return found


@dataclass(frozen=True)
class OpCall:
    """One call of a swapped module, or of a layer of :mod:`mvlm_kernels.layers`.

    path: name of the module in the model. kind: its class. op: what computes the call, if a kernel runs. shape: that of
    the op's first tensor. reasons: why the library's own code runs; empty if a kernel does.
    """

    path: str
    kind: str
    op: str
    shape: tuple[int, ...]
    reasons: tuple[Refusal, ...]


@dataclass(frozen=True)
class ModelExplanation:
    """Calls of a model's swapped modules and of our layers, in their order; see :func:`explain_model`.

    ``str(..)`` has equal calls on one line. kept: parts that a swap leaves as they are, each with a reason.
    """

    calls: tuple[OpCall, ...]
    where: str
    kept: tuple[Part, ...] = ()

    @property
    def fused(self) -> tuple[OpCall, ...]:
        """Calls that a kernel computes."""
        return tuple(call for call in self.calls if not call.reasons)

    def __str__(self) -> str:
        lines = [f"{len(self.fused)} of {len(self.calls)} calls by kernels on {self.where}"]
        first = {(call.kind, call.op, call.shape, call.reasons): call.path for call in reversed(self.calls)}
        counts = Counter((call.kind, call.op, call.shape, call.reasons) for call in self.calls)
        for same, count in counts.items():
            kind, op, shape, reasons = same
            what = f"{count} x {op} of {shape} in {kind}, the first in {first[same] or 'the model'}"
            lines.append(f"own code: {what}: {'; '.join(reasons)}" if reasons else f"kernel: {what}")
        if not self.calls and not self.kept:
            lines.append(f"no module is swapped: {ELSEWHERE}")
        lines += [f"kept: {part.path or 'the model'} ({part.kind}): {part.reason}" for part in self.kept]
        return "\n".join(lines)


class _Listener:
    """Collects the calls of a model's swapped modules in `calls`. as_if: see :func:`explain_swapped`."""

    def __init__(self, model: torch.nn.Module, as_if: str | None) -> None:
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.as_if = as_if
        self.calls: list[OpCall] = []


_listener: _Listener | None = None


def listening() -> bool:
    """True while :func:`explain_swapped` runs a model."""
    return _listener is not None


def note(
    module: torch.nn.Module, op: Callable[..., Any], own: Sequence[Refusal | None], *args: Any, **kwargs: Any
) -> None:
    """Record a call of a swapped module, and why the op does not compute it, while :func:`explain_swapped` runs.

    own: reasons of the module itself against the op; None is no reason. args, kwargs: the op's arguments.
    """
    listener = _listener
    if listener is None:
        return
    reasons = tuple(reason for reason in own if reason is not None)
    if not reasons:
        found = dispatch.explain(op, *args, as_if=listener.as_if, **kwargs)
        reasons = tuple(map(Refusal, found.reasons)) if found.backend == "torch" else ()
    path = listener.paths.get(id(module), "")
    listener.calls.append(OpCall(path, type(module).__name__, op.__name__, tuple(args[0].shape), reasons))


def _note_layer(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record the op's call of a layer of :mod:`mvlm_kernels.layers`."""
    given = layer.op_arguments(*args, **kwargs)
    note(layer, given.op, [], *given.args, **given.kwargs)


def explain_swapped(
    model: torch.nn.Module, inputs: Any, as_if: str | None, kept: tuple[Part, ...] = ()
) -> ModelExplanation:
    """Run a model once, without gradients, and explain the calls of its swapped modules and of our layers.

    Args:
        model: gets hooks; give a copy.
        inputs: a tensor, the arguments of the model in a tuple or list, or its keywords in a mapping.
        as_if: a GPU such as "sm_90", on which the ops would get these tensors; None for the device of the tensors.
    """
    global _listener
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    before, _listener = _listener, _Listener(model, as_if)
    for layer in (x for x in model.modules() if isinstance(x, AddLayerNorm | CrossAttention | GeluLinear)):
        layer.register_forward_pre_hook(_note_layer, with_kwargs=True)
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
        calls = tuple(_listener.calls)
    finally:
        _listener = before
    return ModelExplanation(calls, as_if or str(device), kept)
