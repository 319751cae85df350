"""Registration of ops with ``torch.library``.

Schemas are written by hand and registered with ``define`` and ``impl``. The gradient is a plain ``autograd.Function``.
A call takes about half the host time of ``custom_op`` with ``register_autograd``. That matters, because an attention
kernel takes only tens of microseconds. Forward and backward are one op each, so a compiler sees two opaque calls with
known output shapes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mvlm_kernels import dispatch

NAMESPACE = "mvlm_kernels"
PLAIN = (torch.Tensor, torch.nn.Parameter)
"""Classes of tensors without a behaviour of their own."""
_library = torch.library.Library(NAMESPACE, "DEF")
_functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


class Op(NamedTuple):
    """An op: its overload ``torch.ops.mvlm_kernels.<name>.default``, and what runs on plain tensors in its place."""

    registered: Any
    implementation: Callable[..., Any]
    function: Callable[..., Any]
    """The implementation under the op's autograd Function, called without torch's dispatcher."""

    def on(self, *tensors: torch.Tensor, learns: bool = True) -> Callable[..., Any]:
        """Callable by which a public function calls the op on these tensors.

        It is the registered op, or where torch's dispatcher is not needed the implementation, with its gradient if
        one may be needed. learns: True if an argument requires a gradient.
        """
        if not called_directly(*tensors):
            return self.registered
        return self.function if learns and torch.is_grad_enabled() else self.implementation

    def in_function(self, *tensors: torch.Tensor) -> Callable[..., Any]:
        """Callable by which an autograd Function calls the op on these tensors: the implementation where that is safe.

        With ``create_graph=True`` it is the registered op, which knows its own derivative, or refuses it.
        """
        return self.implementation if not torch.is_grad_enabled() and called_directly(*tensors) else self.registered


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: type[torch.autograd.Function] | None = None,
) -> Op:
    """Register an op.

    schema: ``"name(Tensor x, ...) -> Tensor"``. implementation: runs on tensors of every device; where no kernel runs
    it takes torch. fake: returns empty tensors of the outputs' shapes, dtypes and strides. autograd: Function whose
    forward is ``forward(ctx, call, *arguments)``, with the op's arguments in order; ``call`` is the op without
    autograd. An op that is a backward has :func:`no_second_derivative`, or a Function of its own.

    The op works under ``torch.func.grad`` and ``vjp``, and under ``vmap`` through torch's loop over samples. Forward
    mode is refused.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")

    def shapes(*args: Any) -> Any:
        return (implementation if dispatch.records() else fake)(*args)

    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=_library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    if autograd is None:
        return Op(op, implementation, op)
    if autograd.jvp is torch.autograd.Function.jvp:
        setattr(autograd, "jvp", staticmethod(_no_forward_mode(name)))  # noqa: B010, a type checker sees a method
    apply = _apply_of(autograd)

    def op_below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():  # otherwise the op would run its autograd Function again
            if not torch._C._are_functorch_transforms_active():
                return op(*args)
            # For the levels of torch.func below: a Function's forward disables gradients and forward mode. torch's own
            # rules for transforms enable both by these names too; forward mode has no public one.
            with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
                return op(*args)

    def op_with_gradient(*args: Any) -> Any:
        # The dispatcher calls this for one level of torch.func at a time, as it calls the gradients of torch's own ops.
        # Python's `apply` would start all levels anew, and asks for a Function of another form.
        allowed = _functorch.get_single_level_autograd_function_allowed()
        _functorch.set_single_level_autograd_function_allowed(True)
        try:
            return apply(op_below_autograd, *args)
        finally:
            _functorch.set_single_level_autograd_function_allowed(allowed)

    _library.impl(name, op_with_gradient, "Autograd")
    # The `apply` of the base class in C++: that of `autograd.Function` first searches for transforms and looks at every
    # argument, which takes a fifth of the host time of a call.
    return Op(op, implementation, functools.partial(apply, implementation))


def _no_forward_mode(name: str) -> Callable[..., Any]:
    def jvp(*_: Any) -> Any:
        raise NotImplementedError(
            f"{name} has no forward-mode derivative; use reverse mode: torch.func.vjp, grad or jacrev, or .backward()"
        )

    return jvp


def no_second_derivative(name: str, instead: str) -> type[torch.autograd.Function]:
    """Function for a backward op that cannot be differentiated: its own backward raises RuntimeError.

    Without it torch would take the second derivative for zero where a caller allows unused inputs, as ``torch.func``
    does. name: the public op. instead: what to call, for the message.
    """

    class NoSecondDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, call: Any, *args: Any) -> Any:
            ctx.set_materialize_grads(False)
            return call(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise no_second_derivative_error(name, instead)

    return NoSecondDerivative


def no_second_derivative_error(name: str, instead: str) -> RuntimeError:
    """The error of :func:`no_second_derivative`, to raise."""
    return RuntimeError(f"{name} has no second derivative; use {instead}")


def called_directly(*tensors: torch.Tensor) -> bool:
    """True if an op on these tensors may be called without the dispatcher.

    That holds if the tensors are plain and no compiler, dispatch or function mode, functorch transform, level of dual
    numbers or tracer is active. It saves two passes through the dispatcher, half of the host time of an op with a
    gradient.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return False  # as `transformed` says it, without one more call
    if torch._C._get_tracing_state() is not None:
        return False
    special = False
    for x in tensors:  # a loop and no generator: this runs in every call
        special = special or type(x) not in PLAIN or x.is_neg() or _is_wrapped(x)
    return not special


# functorch wrappers can outlive their transform, so it is not enough to check for active transforms. The module has no
# type stub.
_is_wrapped = _functorch.is_functorch_wrapped_tensor


def transformed() -> bool:
    """True inside a transform of ``torch.func``, also while a compiler traces it, and in a level of dual numbers."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def has_values(*tensors: torch.Tensor) -> bool:
    """True if the values of these tensors can be read: no compiler, transform or subclass hides them."""
    return not torch.compiler.is_compiling() and not transformed() and all(type(x) in PLAIN for x in tensors)


def batched(*tensors: torch.Tensor | None) -> bool:
    """True if ``torch.func.vmap`` holds a batch behind one of the tensors, whose values then cannot be read."""
    return transformed() and any(x is not None and _functorch.is_batchedtensor(x) for x in tensors)


def _apply_of(function: type[torch.autograd.Function]) -> Any:
    """``apply`` of a Function for one level of ``torch.func`` alone, as torch's rules for transforms call theirs."""
    # From 2.15 on torch looks at the class: a subclass of Function is refused inside a transform.
    base: Any = torch.autograd.function._SingleLevelFunction
    members = {name: staticmethod(getattr(function, name)) for name in ("forward", "backward")}
    members["jvp"] = staticmethod(function.jvp)
    return type(base)(function.__name__, (base,), members).apply
