"""Losses between predicted patches and the pixels of images; see :func:`masked_pixel_loss` and
:func:`linear_pixel_loss`."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvlm_kernels import dispatch, registration
from mvlm_kernels.patch_gather.arguments import (
    FLOATS,
    ChannelValues,
    channel_tensor,
    check_device,
    check_id_values,
    check_images,
    check_patch_ids,
    split_channel_values,
    tile_reasons,
)
from mvlm_kernels.pixel_loss import reference
from mvlm_kernels.pixel_loss.reference import Kind

__all__ = ["linear_pixel_loss", "masked_pixel_loss"]

Reduction = Literal["mean", "none"]


def _pixel_reasons(images: Tensor, patch_size: int) -> list[str]:
    return dispatch.device_reasons(images.device) + tile_reasons(images.shape[1], patch_size)


def _product_reasons(hidden: Tensor) -> list[str]:
    reasons = dispatch.device_reasons(hidden.device)
    if hidden.device.type == "cuda":
        if hidden.dtype == torch.float64:
            reasons.append("float64 products run in the interpreter only")
        if hidden.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
            reasons.append('float32 products use TF32, which float32_matmul_precision "highest" forbids')
    return reasons


def _linear_reasons(hidden: Tensor, images: Tensor, patch_size: int) -> list[str]:
    return _product_reasons(hidden) + tile_reasons(images.shape[1], patch_size)


def _why_not_masked(pred: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, **_: Any) -> list[str]:
    _check(images, patch_ids, patch_size, pred, "pred")
    return _pixel_reasons(images, patch_size)


def _why_not_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    **_: Any,
) -> list[str]:
    hidden = _as_autocast(hidden)
    _check(images, patch_ids, patch_size, hidden, "hidden")
    _check_parameters(hidden, weight, bias, images.shape[1] * patch_size**2)
    return _linear_reasons(hidden, images, patch_size)


@dispatch.explained_by(_why_not_masked)
def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    *,
    mean: ChannelValues = None,
    std: ChannelValues = None,
    kind: Kind = "l1",
    normalize_target: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """Loss of predicted patches against the pixels of the image; the target never exists in memory.

    Args:
        pred: (B, K, C*P*P) floating, of any strides: predictions of the masked patches only, in (c, y, x) order.
        images: (B, C, H, W), uint8 or floating, of any strides; constants, they get no gradient.
        patch_ids: (B, K) int32 or int64, the masked patches in row-major order; None: all, K = N.
        patch_size: side P of a square patch; it divides H and W.
        mean, std: as in :func:`mvlm_kernels.gather_patches`, to normalise the pixels first.
        kind: "l1", "mse", or "smooth_l1" with beta 1.
        normalize_target: MAE's target, (x - mean) / sqrt(var + 1e-6) over each patch, unbiased variance
            (facebookresearch/mae, models_mae.py, forward_loss).
        reduction: "mean" over all pixels of all K patches, or "none" for the mean of each patch.

    Returns:
        A scalar, or (B, K), in float32 (float64 where an input is). The mean of no patches is 0.

    Differentiable in pred. Forward reads pred and the pixels once and writes the slope too (a byte a pixel for L1);
    sums are taken in a fixed order, without atomics. Ids are checked on the CPU, and on a GPU with
    MVLM_KERNELS_DEBUG=1; without it a bad id gives NaN and reads nothing. A NaN prediction gives a NaN gradient.

    Raises:
        ValueError: on a wrong rank, shape, dtype, device, id, kind or reduction.
    """
    _check(images, patch_ids, patch_size, pred, "pred")
    features = images.shape[1] * patch_size**2
    if pred.shape[2] != features:
        raise ValueError(f"pred must have {features} = C*P*P features, got shape {tuple(pred.shape)}")
    _check_options(kind, normalize_target, reduction, features)
    means, mean_floats = split_channel_values("mean", mean, images)
    stds, std_floats = split_channel_values("std", std, images)
    return _masked_op(
        pred, images, patch_ids, patch_size, means, stds, mean_floats, std_floats, kind, normalize_target,
        reduction == "mean", torch.is_grad_enabled() and pred.requires_grad,
    )[0]  # fmt: skip


@dispatch.explained_by(_why_not_linear)
def linear_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    *,
    mean: ChannelValues = None,
    std: ChannelValues = None,
    kind: Kind = "l1",
    normalize_target: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    """``masked_pixel_loss(hidden @ weight.T + bias, ...)`` tile by tile: predictions never reach memory.

    Args:
        hidden: (B, K, D) floating, of any strides: the decoder's states of the masked patches only. Under autocast it
            is taken in autocast's type, as nn.Linear would.
        weight: (C*P*P, D) as in nn.Linear, in hidden's type or float32.
        bias: (C*P*P,) in weight's type, or None.
        images, patch_ids, patch_size, mean, std, kind, normalize_target, reduction: as in :func:`masked_pixel_loss`.

    Returns:
        A scalar, or (B, K), in float32 (float64 where an input is).

    Differentiable in hidden, weight and bias. What is saved is one slope a pixel: a byte for L1, else hidden's type.
    Gradients of weight and bias accumulate in float32, in fixed parts added in a fixed order.

    Raises:
        ValueError: on a wrong rank, shape, dtype, device, id, kind or reduction.
    """
    hidden = _as_autocast(hidden)
    _check(images, patch_ids, patch_size, hidden, "hidden")
    features = images.shape[1] * patch_size**2
    _check_parameters(hidden, weight, bias, features)
    _check_options(kind, normalize_target, reduction, features)
    means, mean_floats = split_channel_values("mean", mean, images)
    stds, std_floats = split_channel_values("std", std, images)
    needs_grad = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return _linear_op(
        hidden, weight, bias, images, patch_ids, patch_size, means, stds, mean_floats, std_floats, kind,
        normalize_target, reduction == "mean", torch.is_grad_enabled() and needs_grad,
    )[0]  # fmt: skip


def _as_autocast(hidden: Tensor) -> Tensor:
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype == torch.float32:
        return hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden


def _check(images: Tensor, patch_ids: Tensor | None, patch_size: int, rows: Tensor, name: str) -> None:
    """rows (pred or hidden) must be floating (B, K, *) with the B and K of images and patch_ids."""
    batch = images.shape[0]
    chosen = check_patch_ids(patch_ids, images, check_images(images, patch_size))
    if rows.ndim != 3 or rows.shape[0] != batch or rows.shape[1] != chosen:
        raise ValueError(
            f"{name} must have shape (B, K, features) with B, K = {batch, chosen}, got {tuple(rows.shape)}"
        )
    if rows.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    check_device(name, rows, images.device)


def _check_parameters(hidden: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> None:
    width = hidden.shape[2]
    if weight.shape != (features, width):
        raise ValueError(f"weight must have shape (C*P*P, D) = {features, width}, got {tuple(weight.shape)}")
    if weight.dtype not in (hidden.dtype, torch.float32):
        raise ValueError(f"weight must be {hidden.dtype} like hidden, or float32, got {weight.dtype}")
    check_device("weight", weight, hidden.device)
    if bias is not None:
        if bias.shape != (features,):
            raise ValueError(f"bias must have shape (C*P*P,) = {(features,)}, got {tuple(bias.shape)}")
        if bias.dtype != weight.dtype:
            raise ValueError(f"bias must be {weight.dtype} like weight, got {bias.dtype}")
        check_device("bias", bias, hidden.device)


def _check_options(kind: str, normalize_target: bool, reduction: str, features: int) -> None:
    if kind not in ("l1", "mse", "smooth_l1"):
        raise ValueError(f'kind must be "l1", "mse" or "smooth_l1", got {kind!r}')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if normalize_target and features < 2:
        raise ValueError("normalize_target must be False for patches of one value, whose variance is undefined")


def _num_patches(images: Tensor, patch_size: int) -> int:
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _loss_fake(rows: Tensor, images: Tensor, reduce: bool) -> Tensor:
    dtype = reference.compute_dtype(rows.dtype, images.dtype)
    return rows.new_empty(() if reduce else rows.shape[:2], dtype=dtype)


def _slope_fake(rows: Tensor, features: int, kind: str, with_slope: bool) -> Tensor:
    shape = (rows.shape[0], rows.shape[1], features) if with_slope else (0, 0, 0)
    return rows.new_empty(shape, dtype=torch.int8 if kind == "l1" else rows.dtype)


# ---- masked_pixel_loss as an op


def _masked(
    pred, images, patch_ids, patch_size, mean, std, mean_floats, std_floats, kind, normalize_target, reduce, with_slope
):
    check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    dtype = reference.compute_dtype(pred.dtype, images.dtype)
    mean = channel_tensor(mean, mean_floats, dtype, images)
    std = channel_tensor(std, std_floats, dtype, images)
    args = pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(_pixel_reasons(images, patch_size)) == "torch":
        return reference.masked_pixel_loss(*args)
    from mvlm_kernels.pixel_loss import triton

    return triton.masked_pixel_loss(*args)


def _masked_fake(
    pred, images, patch_ids, patch_size, mean, std, mean_floats, std_floats, kind, normalize_target, reduce, with_slope
):
    return _loss_fake(pred, images, reduce), _slope_fake(pred, pred.shape[2], kind, with_slope)


def _masked_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    if dispatch.choose(dispatch.device_reasons(slope.device)) == "torch":
        return reference.masked_pixel_loss_backward(grad, slope, dtype)
    from mvlm_kernels.pixel_loss import triton

    return triton.masked_pixel_loss_backward(grad, slope, dtype)


class _MaskedPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred, *args):
        ctx.dtype = pred.dtype
        with registration.below_autograd():
            loss, slope = _masked_op(pred, *args)
        ctx.save_for_backward(slope)
        ctx.mark_non_differentiable(slope)
        # Else a zero gradient of the slope's size would be made in every backward pass.
        ctx.set_materialize_grads(False)
        return loss, slope

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad is None or not ctx.needs_input_grad[0]:
            return (None,) * 12
        (slope,) = ctx.saved_tensors
        return _masked_backward_op(grad, slope, ctx.dtype), *(None,) * 11


_masked_backward_op = registration.define(
    "masked_pixel_loss_backward(Tensor grad, Tensor slope, ScalarType dtype) -> Tensor",
    _masked_backward,
    lambda grad, slope, dtype: slope.new_empty(slope.shape, dtype=dtype),
)
_masked_op = registration.define(
    "masked_pixel_loss(Tensor pred, Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? mean, Tensor? std, "
    "float[]? mean_floats, float[]? std_floats, str kind, bool normalize_target, bool reduce, bool with_slope) "
    "-> (Tensor, Tensor)",
    _masked,
    _masked_fake,
    _MaskedPixelLoss,
)


# ---- linear_pixel_loss as an op


def _linear(
    hidden, weight, bias, images, patch_ids, patch_size, mean, std, mean_floats, std_floats, kind, normalize_target,
    reduce, with_slope,
):  # fmt: skip
    check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    dtype = reference.compute_dtype(hidden.dtype, images.dtype)
    mean = channel_tensor(mean, mean_floats, dtype, images)
    std = channel_tensor(std, std_floats, dtype, images)
    args = hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(_linear_reasons(hidden, images, patch_size)) == "torch":
        return reference.linear_pixel_loss(*args)
    from mvlm_kernels.pixel_loss import linear

    return linear.linear_pixel_loss(*args)


def _linear_fake(
    hidden, weight, bias, images, patch_ids, patch_size, mean, std, mean_floats, std_floats, kind, normalize_target,
    reduce, with_slope,
):  # fmt: skip
    return _loss_fake(hidden, images, reduce), _slope_fake(hidden, weight.shape[0], kind, with_slope)


def _linear_backward(
    grad: Tensor,
    slope: Tensor,
    hidden: Tensor,
    weight: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = needs_hidden, needs_weight, needs_bias
    if dispatch.choose(_product_reasons(hidden)) == "torch":
        return reference.linear_pixel_loss_backward(grad, slope, hidden, weight, needs)
    from mvlm_kernels.pixel_loss import linear

    return linear.linear_pixel_loss_backward(grad, slope, hidden, weight, needs)


def _linear_backward_fake(grad, slope, hidden, weight, needs_hidden, needs_weight, needs_bias):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


class _LinearPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, *args):
        with registration.below_autograd():
            loss, slope = _linear_op(hidden, weight, bias, *args)
        ctx.save_for_backward(slope, hidden, weight)
        ctx.mark_non_differentiable(slope)
        ctx.set_materialize_grads(False)
        return loss, slope

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        needs = ctx.needs_input_grad[:3]
        if grad is None or not any(needs):
            return (None,) * 14
        grads = _linear_backward_op(grad, *ctx.saved_tensors, *needs)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 11


_linear_backward_op = registration.define(
    "linear_pixel_loss_backward(Tensor grad, Tensor slope, Tensor hidden, Tensor weight, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
)
_linear_op = registration.define(
    "linear_pixel_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor images, Tensor? patch_ids, "
    "SymInt patch_size, Tensor? mean, Tensor? std, float[]? mean_floats, float[]? std_floats, str kind, "
    "bool normalize_target, bool reduce, bool with_slope) -> (Tensor, Tensor)",
    _linear,
    _linear_fake,
    _LinearPixelLoss,
)
