"""Shadow weights: copies of float32 weights in the dtype of products, which a training loop keeps from step to step.

Under autocast each weight is cast in every forward pass, one operation a weight. :class:`Shadows` casts all of them by
one operation, and what reads weights takes the copies inside its block. Results and gradients have the bits that casts
in their places give. The weights remain the parameters, for optimizers, checkpoints and hooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvlm_kernels import dispatch, registration


class _Shadow(NamedTuple):
    value: Tensor
    """The copy: some rows of the stack."""
    stack: Tensor
    row: int
    """First row of the copy in the stack."""


class _Group:
    """Parameters whose gradients are converted by one operation, when all of them are known."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.lent: dict[int, Tensor] = {}
        """Copies in this step's graph by the id of their parameter; empty before the first is read."""


_in_use: dict[int, _Shadow] = {}
"""Shadows of the block in force by the id of their parameter, for all threads: backward may recompute layers."""
_groups: dict[int, _Group] = {}
"""Groups of the block in force by the ids of their parameters."""


class Shadows:
    """Copies of parameters in another dtype, which are read inside the block :meth:`in_use`.

    Args:
        stacks: each parameter once. Those of a stack, with rows of one length, lie one after another in memory.
        groups: those parameters that :func:`under_autocast` gives. Gradients of a group are converted together.
        dtype: of the copies.
    """

    def __init__(
        self, stacks: Sequence[Sequence[nn.Parameter]], groups: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype
    ) -> None:
        self._parameters = [p for stack in stacks for p in stack]
        self._shadows: dict[int, _Shadow] = {}
        for stack in stacks:
            lengths = [len(p) for p in stack]
            whole = stack[0].detach().new_empty((sum(lengths), *stack[0].shape[1:]), dtype=dtype)
            for i, (parameter, value) in enumerate(zip(stack, whole.split(lengths), strict=True)):
                self._shadows[id(parameter)] = _Shadow(value, whole, sum(lengths[:i]))
        self._copies = [self._shadows[id(p)].value for p in self._parameters]
        self._groups = {id(p): group for group in map(_Group, groups) for p in group.parameters}

    @property
    def tensors(self) -> list[Tensor]:
        """All copies, in the order of their parameters in the stacks."""
        return self._copies

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context of the forward and backward passes of a step: the copies are read, which are as the weights are now.

        NOTE: weights must not change inside the block. Products would go on with copies of the old ones.
        """
        global _in_use, _groups
        with torch.no_grad():
            # One kernel for all. torch has no public name for its list-wise operations. Weights that have not changed
            # are copied too: fused optimizers leave the version of a tensor as it was.
            torch._foreach_copy_(self._copies, self._parameters)  # pyright: ignore[reportPrivateImportUsage]
        before = _in_use, _groups
        _in_use, _groups = self._shadows, self._groups
        try:
            yield
        finally:
            _in_use, _groups = before
            for group in self._groups.values():
                group.lent = {}  # it holds the graph, which holds the parameters


def held(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Copy of the parameter in this dtype, without a gradient; None if it has none in the block in force."""
    shadow = _find(parameter, dtype)
    return None if shadow is None else shadow.value


def converted(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameter in another dtype: its copy, or a new tensor. Only a new one has a gradient."""
    copy = held(parameter, dtype)
    return parameter.to(dtype) if copy is None else copy


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters (W, ..) of equal shapes, one after another, in another dtype, without a gradient."""
    first, rows = parameters[0], len(parameters[0])
    found = [_find(p, dtype) for p in parameters]
    start = found[0]
    if start is not None and all(
        x is not None and x.stack is start.stack and x.row == start.row + i * rows for i, x in enumerate(found)
    ):
        return start.stack.narrow(0, start.row, len(parameters) * rows)
    whole = first.new_empty((len(parameters) * rows, *first.shape[1:]), dtype=dtype)
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        part.copy_(parameter)
    return whole


def under_autocast(parameter: nn.Parameter) -> Tensor:
    """The parameter as a product under autocast reads it: its copy, or itself, which autocast casts.

    Gradients of all products of a step are added up in the copy's dtype and then converted, as behind autocast's casts.
    """
    group = _groups.get(id(parameter)) if _groups and not torch.compiler.is_compiling() else None
    dtype = None if group is None else dispatch.autocast_dtype(parameter.device)
    shadow = None if dtype is None else _find(parameter, dtype)
    if group is None or shadow is None:
        return parameter
    if not torch.is_grad_enabled():
        return shadow.value
    if not group.lent:
        copies = _lend(group.parameters, [_in_use[id(p)].value for p in group.parameters])
        group.lent = dict(zip(map(id, group.parameters), copies, strict=True))
    return group.lent[id(parameter)]


def cast(parameters: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Parameters in another dtype, differentiable. Gradients of these casts are converted before they are added up."""
    copies = [x.value for p in parameters if (x := _find(p, dtype)) is not None]
    if len(copies) < len(parameters):
        return [p.to(dtype) for p in parameters]
    return _lend(parameters, copies) if torch.is_grad_enabled() else copies


def _find(parameter: Tensor, dtype: torch.dtype) -> _Shadow | None:
    if not _in_use or torch.compiler.is_compiling() or registration.transformed():
        return None
    found = _in_use.get(id(parameter))
    return found if found is not None and found.value.dtype == dtype else None


def _lend(parameters: Sequence[Tensor], copies: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters; those of parameters that learn are results of one node of the graph."""
    learns = [p.requires_grad for p in parameters]
    if not any(learns):
        return list(copies)
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
        return tuple(x.detach() for x in copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = list(zip(grads, ctx.dtypes, strict=True))
        if torch.is_grad_enabled():  # with create_graph=True
            return None, *(None if x is None else x.to(dtype) for x, dtype in pairs)
        found = [None if x is None else torch.empty_like(x, dtype=dtype) for x, dtype in pairs]
        given = [x for x in grads if x is not None]
        if given:
            torch._foreach_copy_([x for x in found if x is not None], given)  # pyright: ignore[reportPrivateImportUsage]
        return None, *found
