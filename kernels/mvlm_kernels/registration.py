"""Registration of ops with ``torch.library``.

Schemas are written by hand and registered with ``define`` and ``impl``. The gradient is a plain ``autograd.Function``.
A call takes about half the host time of ``custom_op`` with ``register_autograd``. That matters, because an attention
kernel takes only tens of microseconds. Forward and backward are one op each, so a compiler sees two opaque calls with
known output shapes.
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

    schema: ``"name(Tensor x, ...) -> Tensor"``. implementation: runs on CPU and CUDA tensors. fake: returns empty
    tensors of the outputs' shapes, dtypes and strides. autograd: Function whose forward is
    ``forward(ctx, call, *arguments)``, with the op's arguments in order; ``call`` is the op without autograd.
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
        with torch._C._AutoDispatchBelowAutograd():  # otherwise the op would run its autograd Function again
            return op(*args)

    return op


def called_directly(*tensors: torch.Tensor) -> bool:
    """True if an op on these tensors may be called without the dispatcher.

    That holds if the tensors are plain and no compiler, dispatch or function mode, functorch transform or tracer is
    active. The public functions then call the result of :func:`direct`. This saves two passes through the dispatcher,
    half of the host time of an op with a gradient. Otherwise they call the op.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return False
    special = False
    for x in tensors:  # a loop and no generator: this runs in every call
        special = special or type(x) not in _PLAIN or x.is_neg() or _is_wrapped(x)
    return not special


_PLAIN = (torch.Tensor, torch.nn.Parameter)
# functorch wrappers can outlive their transform, so it is not enough to check for active transforms. The module has no
# type stub.
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def direct(function: type[torch.autograd.Function], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``function.apply(implementation, ...)`` for plain calls, see :func:`called_directly`.

    The result calls the ``apply`` of the base class in C++. The ``apply`` of ``autograd.Function`` first searches for
    transforms and looks at every argument, which takes a fifth of the host time of a call.
    """
    apply: Any = getattr(super(torch.autograd.Function, function), "apply")  # noqa: B009, a type checker sees object
    return functools.partial(apply, implementation)


def backward_of(op: Any, implementation: Callable[..., Any], *tensors: torch.Tensor) -> Callable[..., Any]:
    """Choose the function that a Function's backward calls.

    That is the Python implementation for plain tensors, else the registered op. Neither is differentiable.
    """
    return implementation if called_directly(*tensors) else op
