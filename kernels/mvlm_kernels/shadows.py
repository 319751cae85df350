"""Shadow weights: copies of float32 weights in the dtype of products, which a training loop keeps from step to step.

Under autocast each weight is cast in every forward pass, one operation a weight. :class:`Shadows` casts all of them by
one operation after an update, and ops that take weights read the copies inside its block. Results and gradients have
the bits that casts in their places give. The weights remain the parameters, for optimizers, checkpoints and hooks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvlm_kernels import dispatch, registration


class _Shadow(NamedTuple):
    value: Tensor
    stack: Tensor
    """The stack that `value` is a part of."""
    row: int
    """First row of `value` in the stack."""


class _Group:
    """Parameters whose gradients are converted by one operation, when all of them are known."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.lent: dict[int, Tensor] = {}
        """Copies as results of one node of this step's graph, by the parameter's id; empty before the first is read."""

    def lend(self, parameter: Tensor) -> Tensor:
        if not self.lent:
            values = [_in_use[id(p)].value for p in self.parameters]
            self.lent = dict(zip(map(id, self.parameters), _lend(self.parameters, values), strict=True))
        return self.lent[id(parameter)]


_in_use: dict[int, _Shadow] = {}
"""Shadows of the block in force by the id of their parameter, for all threads: backward recomputes layers in others."""
_groups: dict[int, _Group] = {}
"""Groups of the block in force by the ids of their parameters."""


class Shadows:
    """Copies of parameters in another dtype, which are read inside the block :meth:`in_use`.

    Args:
        stacks: each parameter once. The parameters of a stack, with rows of one length, lie one after another in memory.
        groups: those of the parameters that products of autocast read; of each group, gradients are converted together.
        dtype: of the copies.
    """

    def __init__(
        self, stacks: Sequence[Sequence[nn.Parameter]], groups: Sequence[Sequence[nn.Parameter]], dtype: torch.dtype
    ) -> None:
        self._parameters = [p for stack in stacks for p in stack]
        self._groups = [_Group(group) for group in groups]
        self._of_parameter = {id(p): group for group in self._groups for p in group.parameters}
        self._shadows: dict[int, _Shadow] = {}
        for stack in stacks:
            rows = [len(p) for p in stack]
            whole = stack[0].detach().new_empty((sum(rows), *stack[0].shape[1:]), dtype=dtype)
            for i, (parameter, value) in enumerate(zip(stack, whole.split(rows), strict=True)):
                self._shadows[id(parameter)] = _Shadow(value, whole, sum(rows[:i]))

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        return sum(shadow.value.nbytes for shadow in self._shadows.values())

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Context of the forward and backward passes of a step: ops read the copies, which are as the weights are now.

        NOTE: weights must not change inside the block. Products would go on with the copies of the old ones.
        """
        global _in_use, _groups
        self._copy()
        before = _in_use, _groups
        _in_use, _groups = self._shadows, self._of_parameter
        try:
            yield
        finally:
            _in_use, _groups = before
            for group in self._groups:
                group.lent = {}  # these hold the graph, which holds the model

    @torch.no_grad()
    def _copy(self) -> None:
        # One kernel for all. torch has no public name for its list-wise operations. Weights that have not changed are
        # copied too: fused optimizers do not change a tensor's version.
        values = [self._shadows[id(p)].value for p in self._parameters]
        torch._foreach_copy_(values, self._parameters)  # pyright: ignore[reportPrivateImportUsage]


def found(parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The parameter's copy of this dtype; None if there is none."""
    shadow = _shadow(parameter, dtype)
    return None if shadow is None else shadow.value


def cast(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """The parameter in another dtype: its copy, or a new one. Differentiable only where it is new."""
    shadow = _shadow(parameter, dtype)
    return parameter.to(dtype) if shadow is None else shadow.value


def stacked(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Parameters (W, ..) of equal shapes, one after another, in another dtype. Not differentiable."""
    first = parameters[0]
    if (found := _shadow(first, dtype)) is not None:
        others = [_shadow(p, dtype) for p in parameters]
        places = [None if x is None else (id(x.stack), x.row) for x in others]
        if places == [(id(found.stack), found.row + i * len(first)) for i in range(len(parameters))]:
            return found.stack.narrow(0, found.row, len(parameters) * len(first))
    whole = first.new_empty((len(parameters) * len(first), *first.shape[1:]), dtype=dtype)
    for parameter, rows in zip(parameters, whole.split(len(first)), strict=True):
        rows.copy_(parameter)
    return whole


def autocast(parameter: Tensor) -> Tensor:
    """The parameter as a product of torch reads it: its copy under autocast, else itself, which autocast casts.

    Gradients of all products of a step are added up in the copy's dtype, and then converted, as those of autocast's
    own casts are.
    """
    if not _in_use or torch.compiler.is_compiling():
        return parameter
    group = _groups.get(id(parameter))
    dtype = dispatch.autocast_dtype(parameter.device)
    shadow = None if group is None or dtype is None else _shadow(parameter, dtype)
    if group is None or shadow is None:
        return parameter
    return group.lend(parameter) if torch.is_grad_enabled() else shadow.value


def cast_together(parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Parameters in another dtype, differentiable; gradients of these casts are converted by themselves, together."""
    found = [_shadow(p, dtype) for p in parameters]
    values = [shadow.value for shadow in found if shadow is not None]
    if len(values) < len(found):
        return tuple(p.to(dtype) for p in parameters)
    return tuple(_lend(parameters, values) if torch.is_grad_enabled() else values)


def _shadow(parameter: Tensor, dtype: torch.dtype) -> _Shadow | None:
    """Copy of the parameter in this dtype, if it has one in the block in force."""
    if not _in_use or torch.compiler.is_compiling() or registration.transformed():
        return None
    found = _in_use.get(id(parameter))
    return found if found is not None and found.value.dtype == dtype else None


def _lend(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Copies of parameters, as results of one node of the graph for all that learn."""
    learn = [p.requires_grad for p in parameters]
    if not any(learn):
        return list(values)
    copies: Any = _Lend.apply([x for x, y in zip(values, learn, strict=True) if y], *(p for p in parameters if p.requires_grad))
    of_learning = iter(copies)
    return [next(of_learning) if y else x for x, y in zip(values, learn, strict=True)]


class _Lend(torch.autograd.Function):
    """Copies in the place of parameters; backward converts all gradients by one operation."""

    @staticmethod
    def forward(ctx: Any, values: list[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [p.dtype for p in parameters]
        return tuple(value.detach() for value in values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # with create_graph=True
            return None, *(g if g is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))
        found = [g if g is None else torch.empty_like(g, dtype=dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True)]
        known = [(new, g) for new, g in zip(found, grads, strict=True) if new is not None and g is not None]
        if known:
            torch._foreach_copy_([new for new, _ in known], [g for _, g in known])  # pyright: ignore[reportPrivateImportUsage]
        return None, *found
