"""Shadow weights: copies of float32 weights in the dtype of products, which a training loop keeps from step to step.

Under autocast each weight is cast in every forward pass, one operation a weight. :class:`Shadows` casts all of them by
one operation, and what reads weights takes the copies inside its block. Results and gradients have the bits that casts
in their places give. The weights remain the parameters, for optimizers, checkpoints and hooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm_kernels import dispatch, registration


class _Shadow(NamedTuple):
    value: Tensor
    """Copy of one parameter: a view of rows of `stack`, which holds the copies of several parameters."""
    stack: Tensor
    row: int
    """First row of the copy in the stack."""


class _Block:
    """Copies of parameters that are read inside a block :meth:`Shadows.in_use`, by the `id` of the parameter."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.shadows: dict[int, _Shadow] = {}
        self.groups: dict[int, Sequence[nn.Parameter]] = {}
        """Parameters whose gradients are converted by one operation, when all are known; by the `id` of each."""
        self.lent: dict[int, Tensor] = {}
        """Copies that are in the autograd graph of this step, as outputs of one node for each group of parameters."""
        self.stacked: dict[tuple[int, ...], Tensor] = {}
        """Views of the copies of several parameters that lie one after another in memory, by the parameters' ids."""


_block: _Block | None = None
"""The copies that are read at present, by all threads: autograd may recompute layers in other threads. None: none."""


class Shadows:
    """Copies of parameters in another dtype, which are read inside the block :meth:`in_use`.

    Args:
        stacks: lists of parameters, with each parameter in one of them. The copies of a list, whose parameters have
            rows of one length, lie one after another in memory.
        groups: those parameters that :func:`under_autocast` gives. Gradients of a group are converted together.
        dtype: of the copies.
    """

    def __init__(
        self, stacks: Sequence[Sequence[nn.Parameter]], groups: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype
    ) -> None:
        self._block = _Block(dtype)
        self._parameters: list[Tensor] = [p for stack in stacks for p in stack]
        for stack in stacks:
            lengths = [len(p) for p in stack]
            whole = stack[0].detach().new_empty((sum(lengths), *stack[0].shape[1:]), dtype=dtype)
            for i, (parameter, value) in enumerate(zip(stack, whole.split(lengths), strict=True)):
                self._block.shadows[id(parameter)] = _Shadow(value, whole, sum(lengths[:i]))
        self._block.groups = {id(p): group for group in groups for p in group}
        self.tensors = [self._block.shadows[id(p)].value for p in self._parameters]
        """All copies."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context of the forward and backward passes of a step: the copies are read, which are as the weights are now.

        NOTE: weights must not change inside the block. Products would go on with copies of the old ones.
        """
        global _block
        with torch.no_grad():
            # One kernel for all. torch has no public name for its list-wise operations. Weights that have not changed
            # are copied too: fused optimizers leave the version of a tensor as it was.
            torch._foreach_copy_(self.tensors, self._parameters)  # pyright: ignore[reportPrivateImportUsage]
        before, _block = _block, self._block
        try:
            yield
        finally:
            _block = before
            # Of this step alone: a parameter may stop to learn, and a CUDA graph is captured on another stream.
            self._block.lent = {}


def held(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Copy of the parameter in this dtype, without a gradient; None if no block :meth:`Shadows.in_use` has one."""
    block = _of_dtype(dtype)
    found = None if block is None else block.shadows.get(id(parameter))
    return None if found is None else found.value


def converted(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameter in another dtype: its copy, or a new tensor. Only a new one has a gradient."""
    copy = held(parameter, dtype)
    return parameter.to(dtype) if copy is None else copy


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters (W, ..) of equal shapes, one after another, in another dtype. Call it where gradients are off."""
    block, key = _of_dtype(dtype), tuple(map(id, parameters))
    if block is not None:
        if key in block.stacked:
            return block.stacked[key]
        if (neighbours := _neighbours([block.shadows.get(name) for name in key])) is not None:
            block.stacked[key] = neighbours
            return neighbours
    first, rows = parameters[0], len(parameters[0])
    whole = first.new_empty((len(parameters) * rows, *first.shape[1:]), dtype=dtype)
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        part.copy_(parameter)
    return whole


def _neighbours(found: Sequence[_Shadow | None]) -> Tensor | None:
    """View that holds these copies of parameters one after another; None if they do not lie so in memory."""
    first, rows = found[0], 0
    for x in found:
        if first is None or x is None or x.stack is not first.stack or x.row != first.row + rows:
            return None
        rows += len(x.value)
    return None if first is None else first.stack.narrow(0, first.row, rows)


def under_autocast(parameter: Tensor) -> Tensor:
    """The parameter as a product under autocast reads it: its copy, or itself, which autocast casts.

    Gradients of all products of a step are added up in the copy's dtype and then converted, as behind autocast's casts.
    """
    if _block is None or torch.compiler.is_compiling():
        return parameter
    name, dtype = id(parameter), dispatch.autocast_dtype(parameter.device)
    block = None if dtype is None else _of_dtype(dtype)
    if block is None or name not in block.groups:
        return parameter
    if not torch.is_grad_enabled():
        return block.shadows[name].value
    if name not in block.lent:
        group = block.groups[name]
        copies = _lend(group, [block.shadows[id(p)].value for p in group])
        block.lent.update(zip(map(id, group), copies, strict=True))
    return block.lent[name]


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Apply a linear layer, by the copies of its parameters if it has any."""
    # `layer.weight` would compute a weight that has an adapter.
    weight = None if _block is None else layer._parameters.get("weight")
    copy = None if weight is None else under_autocast(weight)
    return layer(x) if copy is None or copy is weight else F.linear(x, copy, under_autocast(layer.bias))


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Parameters in another dtype, differentiable. Gradients of these casts are converted before they are added up."""
    block = _of_dtype(dtype)
    if block is None or any(id(p) not in block.shadows for p in parameters):
        return [p.to(dtype) for p in parameters]
    copies = [block.shadows[id(p)].value for p in parameters]
    return _lend(parameters, copies) if torch.is_grad_enabled() else copies


def _of_dtype(dtype: torch.dtype) -> _Block | None:
    """Copies that are read at present, if they have this dtype and no compiler or transform of torch.func is active."""
    if _block is None or torch.compiler.is_compiling() or _block.dtype != dtype or registration.transformed():
        return None
    return _block


def _lend(parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> Sequence[Tensor]:
    """`copies`, in which those of parameters that require a gradient are outputs of one node of the autograd graph."""
    learns = [p.requires_grad for p in parameters]
    if not any(learns):
        return copies
    learning = [p for p in parameters if p.requires_grad]
    lent: Any = _Lend.apply([x for x, y in zip(copies, learns, strict=True) if y], *learning)
    in_graph = iter(lent)
    return [next(in_graph) if y else x for x, y in zip(copies, learns, strict=True)]


class _Lend(torch.autograd.Function):
    """Copies in the place of parameters. Backward converts all gradients by one operation."""

    @staticmethod
    def forward(ctx: Any, copies: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [p.dtype for p in parameters]
        return tuple([x.detach() for x in copies])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = list(zip(grads, ctx.dtypes, strict=True))
        if torch.is_grad_enabled():  # with create_graph=True
            return None, *[None if x is None else x.to(dtype) for x, dtype in pairs]
        found = [None if x is None else torch.empty_like(x, dtype=dtype) for x, dtype in pairs]
        given = [x for x in grads if x is not None]
        if given:
            torch._foreach_copy_([x for x in found if x is not None], given)  # pyright: ignore[reportPrivateImportUsage]
        return None, *found
