"""Norm and rotary embedding of queries and keys, on the packed projection; see :func:`qk_norm_rope`.

Both passes are one kernel each, in ``triton.py``. Backward writes the gradient of the whole projection.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import (
    FLOATS,
    check_choice,
    check_flag,
    check_int,
    check_number,
    check_tensor,
    compute_dtype,
)
from mvlm_kernels.dispatch import FLOAT64, Refusal, refusal
from mvlm_kernels.qk_norm_rope import reference

__all__ = ["qk_norm_rope"]

WIDEST = 256
"""Largest D of the kernels: the values of a head have to fit in registers."""
_TRANSFORMED = refusal(
    "transforms of torch.func and dual numbers have no kernel", "torch runs; call it outside of them"
)


def _checked(
    qkv: Tensor, sin: Tensor | None, cos: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, eps: float, norm: str, interleaved: bool, prefix_tokens: int,
) -> tuple[float, bool, int]:  # fmt: skip
    """Check the arguments, and return eps, interleaved and prefix_tokens."""
    check_tensor("qkv", qkv)
    if qkv.ndim not in (4, 5) or qkv.shape[-3] != 3 or not qkv.shape[-2] or not qkv.shape[-1] or qkv.shape[-1] % 2:
        raise ValueError(f"qkv must have shape (B, N, 3, H, D) or (T, 3, H, D), D even, got {tuple(qkv.shape)}")
    check_choice("norm", norm, ("none", "layer", "rms"))
    (*samples, tokens), width, device = qkv.shape[:-3], qkv.shape[-1], qkv.device
    prefix = check_int("prefix_tokens", prefix_tokens, 0)
    rotated = tokens - prefix
    for name, table, other in (("sin", sin, cos), ("cos", cos, sin)):
        if table is None:
            if other is not None:
                raise ValueError(f"{name} must be given with the other table, got None")
            continue
        check_tensor(name, table, FLOATS, device)
        if table.requires_grad:
            raise ValueError(f"{name} must not need a gradient, got a tensor that does; detach it, or rotate by torch")
        wanted = [(*of_all, rotated, width) for of_all in ([], samples) if not of_all or samples]
        if (*table.shape,) not in wanted:
            shapes = " or ".join(map(str, dict.fromkeys(wanted)))
            raise ValueError(f"{name} must have shape {shapes}, of the tokens behind the prefix, got {(*table.shape,)}")
    for kind, q_vector, k_vector in (("weight", q_weight, k_weight), ("bias", q_bias, k_bias)):
        for name, vector, other in ((f"q_{kind}", q_vector, k_vector), (f"k_{kind}", k_vector, q_vector)):
            if vector is None:
                if other is not None:
                    raise ValueError(f"{name} must be given with that of the other, got None")
                continue
            check_tensor(name, vector, device=device)
            if norm == "none" or vector.shape != (width,):
                wanted = "None without a norm" if norm == "none" else f"of shape ({width},)"
                raise ValueError(f"{name} must be {wanted}, got {tuple(vector.shape)}")
            if other is not None and vector.dtype != other.dtype:
                raise ValueError(f"{name} must have the dtype of the other, got {vector.dtype} and {other.dtype}")
    return check_number("eps", eps, 0.0), check_flag("interleaved", interleaved), prefix


def _reasons_of_call(qkv: Tensor) -> tuple[Refusal, ...]:
    return (*_reasons(qkv), _TRANSFORMED) if registration.transformed() else _reasons(qkv)


def _reasons(x: Tensor) -> tuple[Refusal, ...]:
    """Every reason against the kernels. x (.., D): the projection, or a gradient."""
    found = dispatch.reasons_for("qk_norm_rope", x.device)
    if x.shape[-1] > WIDEST:
        reason = f"a head has {x.shape[-1]} values, the kernels hold at most {WIDEST} in registers"
        found = (*found, refusal(reason, "torch runs; use narrower heads"))
    if x.dtype == torch.float64 and x.device.type == "cuda":
        found = (*found, FLOAT64)
    return found


@dispatch.explained_by(_reasons_of_call, _checked)
def qk_norm_rope(
    qkv: Tensor,
    sin: Tensor | None,
    cos: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    *,
    eps: float = 1e-6,
    norm: Literal["none", "layer", "rms"] = "none",
    interleaved: bool = False,
    prefix_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a packed projection: q and k normed per head (QK-norm), then rotated (RoPE).

    ``n = weight * normalised(x) + bias`` over the D values of a head, and ``n cos + quarter(n) sin``, where quarter
    takes each pair (a, b) to (-b, a). A projection (B, N, 3 H D) becomes qkv by ``unflatten(-1, (3, H, D))``.

    Composed of torch ops a vision transformer writes q and k five to ten times, and stacks three gradients. Here each
    value of q and k is read and written once, forward and backward, and the gradient of qkv is one tensor.

    Args:
        qkv: floating (B, N, 3, H, D), or packed (T, 3, H, D).
        sin, cos: (N - P, D), or (B, N - P, D) for tokens of each sample: the tables of the tokens behind the prefix,
            in any floating dtype. Without them nothing is rotated. They get no gradient.
        q_weight, k_weight, q_bias, k_bias: (D,), of the norms of q and of k. None for 1 and 0.
        eps: added to the variance, or to the mean square.
        norm: "layer" divides deviations from the mean by the standard deviation, "rms" the values by their root mean
            square, both over a head.
        interleaved: pairs are neighbours, (0, 1), (2, 3), .. as in timm's EVA-02; otherwise halves, (0, D / 2),
            (1, D / 2 + 1), .. as in DINOv3 and `rotate_half` of transformers.
        prefix_tokens: P, the number of tokens in front, such as [CLS] and registers, that are not rotated.

    Returns:
        q, k and v, (B, N, H, D) or (T, H, D), in qkv's dtype. v is a view of qkv, as ``qkv.unbind(-3)`` gives it.

    Differentiable in qkv, weights and biases, once; under torch.func and with dual numbers, where plain torch runs, any
    number of times. It computes in float32 (float64 for float64) and rounds q and k once. Gradients of weights and
    biases are summed in a fixed order, without atomics.

    Raises:
        ValueError: for an argument of another kind, a wrong shape, dtype or device, an odd D, one table, weight or bias
            without the other, weights without a norm, and a table that needs a gradient.
    """
    eps, interleaved, prefix = _checked(
        qkv, sin, cos, q_weight, k_weight, q_bias, k_bias, eps, norm, interleaved, prefix_tokens
    )
    args = qkv, sin, cos, q_weight, k_weight, q_bias, k_bias, eps, "" if norm == "none" else norm, interleaved, prefix
    if registration.transformed():
        dispatch.refuse_if_forced(_TRANSFORMED)
        return *reference.norm_rope(*args), qkv.select(-3, 2)
    return _QkNormRope.apply(*args)  # pyright: ignore[reportReturnType]


def _forward(qkv, *args):
    if dispatch.choose(_reasons(qkv)) == "torch":
        return reference.norm_rope(qkv, *args)
    from mvlm_kernels.qk_norm_rope import triton

    return dispatch.run_kernels(("qk_norm_rope", qkv.device), triton.norm_rope, reference.norm_rope, qkv, *args)


def _forward_fake(qkv, *_):
    shape = *qkv.shape[:-3], *qkv.shape[-2:]
    return qkv.new_empty(shape), qkv.new_empty(shape)


def _backward(dq, *args):
    if dispatch.choose(_reasons(dq)) == "torch":
        return reference.norm_rope_backward(dq, *args)
    from mvlm_kernels.qk_norm_rope import triton

    by_triton, by_torch = triton.norm_rope_backward, reference.norm_rope_backward
    return dispatch.run_kernels(("qk_norm_rope", dq.device), by_triton, by_torch, dq, *args)


def _backward_fake(dq, dk, dv, qkv, sin, cos, q_weight, k_weight, eps, norm, interleaved, prefix, sums):
    *leading, heads, width = dq.shape
    return dq.new_empty((*leading, 3, heads, width)), dq.new_empty((sums, 2, width), dtype=compute_dtype(dq.dtype))


class _QkNormRope(torch.autograd.Function):
    """A Function and no differentiable op, because an op may not return v, a view of its input."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, sin: Tensor | None, cos: Tensor | None, q_weight: Tensor | None,
        k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None, eps: float, norm: str,
        interleaved: bool, prefix: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        args = qkv, sin, cos, q_weight, k_weight, q_bias, k_bias, eps, norm, interleaved, prefix
        q, k = _op.in_function(qkv)(*args)
        ctx.save_for_backward(qkv if norm else None, sin, cos, q_weight, k_weight)
        ctx.options = eps, norm, interleaved, prefix
        ctx.dtypes = [None if v is None else v.dtype for v in (q_weight, q_bias)]
        return q, k, qkv.select(-3, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        of_weight, of_bias = ctx.dtypes
        sums = 0 if of_weight is None and of_bias is None else 1 if of_bias is None else 2
        dqkv, found = _backward_op.in_function(*grads)(*grads, *ctx.saved_tensors, *ctx.options, sums)
        dw = (None, None) if of_weight is None else found[0].to(of_weight)
        db = (None, None) if of_bias is None else found[1].to(of_bias)
        return dqkv, None, None, *dw, *db, None, None, None, None


_op = registration.define(
    "norm_rope(Tensor qkv, Tensor? sin, Tensor? cos, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
    "Tensor? k_bias, float eps, str norm, bool interleaved, SymInt prefix) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
)
_backward_op = registration.define(
    "norm_rope_backward(Tensor dq, Tensor dk, Tensor dv, Tensor? qkv, Tensor? sin, Tensor? cos, Tensor? q_weight, "
    "Tensor? k_weight, float eps, str norm, bool interleaved, SymInt prefix, int sums) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    registration.no_second_derivative("qk_norm_rope", "torch.nn.functional.layer_norm and products with sin and cos"),
)
