"""Registering an op with ``torch.library``.

Schemas are written by hand and registered with ``define`` and ``impl``, and the autograd formula is a plain
``autograd.Function``: that boundary costs about half of what ``custom_op`` with ``register_autograd`` costs a call, and
an attention kernel here takes tens of microseconds. A forward and its backward are one op each, so that a compiler sees
two opaque calls with known output shapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "mvlm_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> Any:
    """Register an op and return its overload, ``torch.ops.mvlm_kernels.<name>.default``.

    schema is ``"name(Tensor x, ...) -> Tensor"``; implementation runs on CPU, CUDA and (while kernels are recorded) is
    called directly; fake returns empty tensors of the output's shape, dtype and strides. autograd, where given, takes
    the op's arguments in order; its forward must call the op, which by then is below autograd.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, _below_autograd(autograd), "Autograd")
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _below_autograd(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function.apply(*args)

    return call


below_autograd = torch._C._AutoDispatchBelowAutograd
"""Context for the forward of such a Function: the op called inside runs its implementation, not its autograd formula
again.
"""


def called_directly(*tensors: torch.Tensor) -> bool:
    """Whether nothing but autograd would look at a call of an op on these tensors: they are plain, and no compiler,
    dispatch or function mode, functorch transform or tracer is at work.

    The public functions then apply the Function, and its forward calls the implementation, without the two ways through
    the dispatcher that an op with a gradient takes: half of the host's time. Everywhere else the op is called.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    special = False
    for x in tensors:  # no generator: this runs at every call
        special = special or type(x) not in _PLAIN or x.is_neg()
    return not special


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def forward_of(op: Any, implementation: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """What a Function's forward calls: the implementation, or the op below autograd."""
    return implementation if called_directly(*tensors) else functools.partial(_call_below_autograd, op)


def _call_below_autograd(op: Any, *args: Any) -> Any:
    with below_autograd():
        return op(*args)


def backward_of(op: Any, implementation: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """What a Function's backward calls: the implementation, or the op, which has no gradient of its own."""
    return implementation if called_directly(*tensors) else op
