"""The small cases of every op as rows: a call, the same by its oracle, and its inputs by position.

`tests/kernels/test_ops.py` and its neighbours ask the same properties of each row.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from mvlm_kernels import cases

REGISTERED = {"gelu_linear": "gelu", "qk_norm_rope": "norm_rope"}
"""Names under torch.ops where they are not those of the functions: of functions whose gradient is no op's."""


class Row(NamedTuple):
    """A call of an op, and the same by its oracle.

    Both functions, `ours` and `plain`, take the tensors by position, which get gradients, and the constants by name.
    """

    op: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    tensors: tuple[Tensor, ...]
    constants: dict[str, Any]

    def leaves(self) -> list[Tensor]:
        return [x.detach().clone().requires_grad_() for x in self.tensors]

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> "Row":
        """The row with tensors of another dtype, and everything on another device."""
        constants = tree_map_only(Tensor, lambda x: x.to(device), self.constants)
        return self._replace(tensors=tuple(x.to(device, dtype) for x in self.tensors), constants=constants)


def rows(number: int = 0, mixed: bool = False) -> dict[str, Row]:
    """Small calls of every op by name, in float64, or `mixed`, in bfloat16 and float32 as under autocast.

    Sizes depend on `number`.
    """
    types = (torch.bfloat16, torch.float32) if mixed else (torch.float64, None)
    found = {}
    for name, case in cases.properties(number, *types).items():
        inputs = case.make("cpu")
        ours, plain = (_by_position(function, list(inputs.leaves)) for function in (case.ours, case.oracle))
        found[name] = Row(case.op, ours, plain, tuple(x.detach() for x in inputs.leaves.values()), inputs.fixed)
    return found


def _by_position(function: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    return lambda *leaves, **constants: function(**dict(zip(names, leaves, strict=True)), **constants)


ROWS = rows()


def total(outputs: Any) -> Tensor:
    """Sum of the scalar outputs and of the squares of all others: a scalar whose gradient differs between elements."""
    found = [x.square().sum() if x.dim() else x for x in distinct(outputs)]
    return sum(found[1:], found[0])


def distinct(outputs: Any) -> list[Tensor]:
    return list({id(x): x for x in tree_leaves(outputs) if isinstance(x, Tensor)}.values())


def loss_and_gradients(function: Callable[..., Any], row: Row, leaves: Iterable[Tensor] | None = None) -> list[Tensor]:
    """Outputs of a function on a row's arguments, then the gradients of their :func:`total` for all its tensors."""
    inputs = row.leaves() if leaves is None else list(leaves)
    outputs = function(*inputs, **row.constants)
    grads = torch.autograd.grad(total(outputs), inputs, allow_unused=True, materialize_grads=True)
    return [*tree_leaves(outputs), *grads]
