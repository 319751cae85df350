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
    what its forward is to call, here the op below autograd, and then the op's arguments in order.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CPU")
    _library.impl(name, implementation, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    if autograd is not None:
        _library.impl(name, lambda *args: autograd.apply(op_below_autograd, *args), "Autograd")
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def op_below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # else the op would run its autograd formula again
            return op(*args)

    return op


def called_directly(*tensors: torch.Tensor) -> bool:
    """Whether nothing but autograd would look at a call of an op on these tensors: they are plain, and no compiler,
    dispatch or function mode, functorch transform or tracer is at work.

    The public functions then call what :func:`direct` returns: the Function applied to the implementation, without the
    two ways through the dispatcher that an op with a gradient takes, half of the host's time. Everywhere else they call
    the op.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    special = False
    for x in tensors:  # no generator: this runs at every call
        special = special or type(x) not in _PLAIN or x.is_neg() or _is_wrapped(x)
    return not special


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Also where its transform is over. The module has no stub.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def direct(function: type[torch.autograd.Function], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``function.apply(implementation, ...)`` for plain calls, see :func:`called_directly`: what torch's ``apply`` does
    once it has looked for transforms and at each argument for one of theirs, which costs a fifth of a call."""
    apply: Any = getattr(super(torch.autograd.Function, function), "apply")  # noqa: B009, a type checker sees object
    return functools.partial(apply, implementation)


def backward_of(op: Any, implementation: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """What a Function's backward calls: the implementation, or the op, which has no gradient of its own."""
    return implementation if called_directly(*tensors) else op
