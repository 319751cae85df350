"""Losses between predicted patches and pixels of images; see ``masked_pixel_loss`` and ``linear_pixel_loss``.

Both save one slope per pixel for the backward: F * d(loss of its patch) / d(prediction), with F = C*P*P pixels.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import (
    FLOATS,
    ChannelValues,
    channel_tensors,
    check_device,
    check_id_values,
    check_images,
    check_patch_ids,
    compute_dtype,
    tile_reasons,
)
from mvlm_kernels.dispatch import Refusal
from mvlm_kernels.pixel_loss import reference
from mvlm_kernels.pixel_loss.reference import Kind

__all__ = ["linear_pixel_loss", "masked_pixel_loss"]

Reduction = Literal["mean", "none"]


def _explain_masked(pred: Tensor, **call: Any) -> tuple[Refusal, ...]:
    _checked("pred", pred, **call)
    return _reasons(call["images"], call["patch_size"])


def _explain_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, **call: Any) -> tuple[Refusal, ...]:
    hidden = _as_autocast(hidden)
    _checked("hidden", hidden, **call)
    _check_parameters(hidden, weight, bias, call["images"].shape[1] * call["patch_size"] ** 2)
    return _reasons(call["images"], call["patch_size"])


@dispatch.explained_by(_explain_masked)
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
    """Loss between predicted patches and the pixels of images, without a target tensor in memory.

    Args:
        pred: (B, K, C*P*P) floating, of any strides: predictions of the chosen patches only, features in (c, y, x)
            order.
        images: (B, C, H, W), uint8 or floating, of any strides. They are constants and get no gradient.
        patch_ids: (B, K) int32 or int64, numbers of the predicted patches in row-major order; None: all, K = N.
        patch_size: side P of a square patch in pixels; it divides H and W.
        mean, std: normalisation of the pixels before the loss, as in :func:`mvlm_kernels.gather_patches`.
        kind: "l1", "mse", or "smooth_l1" with beta 1.
        normalize_target: MAE's target, (x - mean) / sqrt(var + 1e-6) over each patch, with the unbiased variance
            (facebookresearch/mae, models_mae.py, forward_loss).
        reduction: "mean" over all pixels of all K patches, or "none" for the mean of each patch.

    Returns:
        A scalar, or (B, K) for "none", in float32 (float64 if an input is). The mean of no patches is 0.

    Differentiable in pred. The forward pass reads pred and the pixels once and also writes the slope, one byte per
    pixel for L1. Sums are taken in a fixed order, without atomics. Ids are checked on the CPU, and on a GPU with
    MVLM_KERNELS_DEBUG=1. Without the check a bad id gives NaN and reads nothing. A NaN prediction has a NaN gradient.

    Raises:
        ValueError: for a wrong rank, shape, dtype, device, id, kind or reduction.
    """
    means, stds = _checked(
        "pred", pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduction
    )  # fmt: skip
    call = _masked_directly if registration.called_directly(pred) else _masked_op
    return call(
        pred, images, patch_ids, patch_size, means, stds, kind, normalize_target,
        reduction == "mean", torch.is_grad_enabled() and (pred.requires_grad or registration.transformed()),
    )[0]  # fmt: skip


@dispatch.explained_by(
    _explain_linear, "cuBLAS multiplies by chunks of images, and the fused kernel takes the loss of each chunk"
)
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
    """``masked_pixel_loss(hidden @ weight.T + bias, ...)``, computed by chunks of images that fit the L2 cache.

    Args:
        hidden: (B, K, D) floating, of any strides: decoder states of the chosen patches only. Autocast casts float32
            states, as nn.Linear would.
        weight: (C*P*P, D) as in nn.Linear, in hidden's dtype or float32.
        bias: (C*P*P,) in weight's dtype, or None.
        images, patch_ids, patch_size, mean, std, kind, normalize_target, reduction: as in :func:`masked_pixel_loss`.

    Returns:
        A scalar, or (B, K) for "none", in float32 (float64 if an input is).

    Differentiable in hidden, weight and bias. On a GPU cuBLAS multiplies, at most 24 MiB of predictions exist at a time
    (or those of 16 images), and the loss is that of the fused kernel. The forward pass saves one slope per pixel: a
    byte for L1, else a value of hidden's dtype. Gradients of weight and bias accumulate in float32, chunk by chunk.

    Raises:
        ValueError: for a wrong rank, shape, dtype, device, id, kind or reduction.
    """
    hidden = _as_autocast(hidden)
    means, stds = _checked(
        "hidden", hidden, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduction
    )
    _check_parameters(hidden, weight, bias, images.shape[1] * patch_size**2)
    # A tensor of torch.func does not know whether a level around it needs a gradient.
    needs_grad = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    needs_grad = needs_grad or registration.transformed()
    call = _linear_directly if registration.called_directly(hidden, weight) else _linear_op
    return call(
        hidden, weight, bias, images, patch_ids, patch_size, means, stds, kind,
        normalize_target, reduction == "mean", torch.is_grad_enabled() and needs_grad,
    )[0]  # fmt: skip


def _as_autocast(hidden: Tensor) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise ValueError(f"hidden must be a tensor, got {type(hidden).__name__}")
    dtype = dispatch.autocast_dtype(hidden.device) if hidden.dtype == torch.float32 else None
    return hidden if dtype is None else hidden.to(dtype)


def _checked(
    name: str, rows: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: ChannelValues,
    std: ChannelValues, kind: str, normalize_target: bool, reduction: str,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Check the arguments that both losses have, and return mean and std as tensors.

    rows: pred (B, K, C*P*P) or hidden (B, K, D), floating, with the B of images and the K of patch_ids. name: of rows.
    """
    if not isinstance(rows, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(rows).__name__}")
    chosen = check_patch_ids(patch_ids, images, check_images(images, patch_size))
    batch, shape, features = images.shape[0], rows.shape, images.shape[1] * patch_size**2
    if len(shape) != 3 or shape[0] != batch or shape[1] != chosen:
        raise ValueError(f"{name} must have shape (B, K, features) with B, K = {batch, chosen}, got {tuple(shape)}")
    if rows.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    check_device(name, rows, images.device)
    if name == "pred" and shape[2] != features:
        raise ValueError(f"pred must have {features} = C*P*P features, got shape {tuple(shape)}")
    if kind not in ("l1", "mse", "smooth_l1"):
        raise ValueError(f'kind must be "l1", "mse" or "smooth_l1", got {kind!r}')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if normalize_target and features < 2:
        raise ValueError("normalize_target must be False for patches of one value, whose variance is undefined")
    return channel_tensors(mean, std, images, rows.dtype)


def _check_parameters(hidden: Tensor, weight: Tensor, bias: Tensor | None, features: int) -> None:
    for name, x in (("weight", weight), ("bias", bias)):
        if not isinstance(x, Tensor) and (x is not None or name == "weight"):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
    width, dtype, device = hidden.shape[2], weight.dtype, hidden.device
    if weight.shape != (features, width):
        raise ValueError(f"weight must have shape (C*P*P, D) = {features, width}, got {tuple(weight.shape)}")
    if dtype != hidden.dtype and dtype != torch.float32:
        raise ValueError(f"weight must be {hidden.dtype} like hidden, or float32, got {dtype}")
    check_device("weight", weight, device)
    if bias is not None:
        if bias.shape != (features,):
            raise ValueError(f"bias must have shape (C*P*P,) = {(features,)}, got {tuple(bias.shape)}")
        if bias.dtype != dtype:
            raise ValueError(f"bias must be {dtype} like weight, got {bias.dtype}")
        check_device("bias", bias, device)


def _reasons(images: Tensor, patch_size: int) -> tuple[Refusal, ...]:
    """Reasons against Triton for both losses."""
    return dispatch.device_reasons(images.device) + tile_reasons(images.shape[1], patch_size)


def _num_patches(images: Tensor, patch_size: int) -> int:
    _, _, height, width = images.shape
    return (height // patch_size) * (width // patch_size)


def _loss_fake(rows: Tensor, images: Tensor, reduce: bool) -> Tensor:
    dtype = compute_dtype(rows.dtype, images.dtype)
    return rows.new_empty(() if reduce else rows.shape[:2], dtype=dtype)


def _slope_fake(rows: Tensor, features: int, kind: str, with_slope: bool) -> Tensor:
    shape = (rows.shape[0], rows.shape[1], features) if with_slope else (0, 0, 0)
    return rows.new_empty(shape, dtype=torch.int8 if kind == "l1" else rows.dtype)


_INSTEAD = "gather_patches for the target and a loss of torch"


def _masked(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope):
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    args = pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(_reasons(images, patch_size)) == "torch":
        return reference.masked_pixel_loss(*args)
    from mvlm_kernels.pixel_loss import triton

    return triton.masked_pixel_loss(*args)


def _masked_fake(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope):
    return _loss_fake(pred, images, reduce), _slope_fake(pred, pred.shape[2], kind, with_slope)


def _masked_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    if dispatch.choose(dispatch.device_reasons(slope.device)) == "torch":
        return reference.masked_pixel_loss_backward(grad, slope, dtype)
    from mvlm_kernels.pixel_loss import triton

    return triton.masked_pixel_loss_backward(grad, slope, dtype)


class _MaskedPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, pred, *args):
        ctx.dtype = pred.dtype
        loss, slope = forward(pred, *args)
        ctx.save_for_backward(slope)
        # Otherwise every backward pass would allocate a zero gradient of slope's size.
        ctx.set_materialize_grads(False)
        return loss, slope

    @staticmethod
    def backward(ctx, grad, slope_grad):
        if slope_grad is not None:
            raise registration.no_second_derivative_error("masked_pixel_loss", _INSTEAD)
        if grad is None or not ctx.needs_input_grad[1]:
            return (None,) * 11
        (slope,) = ctx.saved_tensors
        backward = registration.backward_of(_masked_backward_op, _masked_backward, grad, slope)
        return None, backward(grad, slope, ctx.dtype), *(None,) * 9


_masked_directly = registration.direct(_MaskedPixelLoss, _masked)
_masked_backward_op = registration.define(
    "masked_pixel_loss_backward(Tensor grad, Tensor slope, ScalarType dtype) -> Tensor",
    _masked_backward,
    lambda grad, slope, dtype: slope.new_empty(slope.shape, dtype=dtype),
    registration.no_second_derivative("masked_pixel_loss", _INSTEAD),
)
_masked_op = registration.define(
    "masked_pixel_loss(Tensor pred, Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? mean, Tensor? std, "
    "str kind, bool normalize_target, bool reduce, bool with_slope) "
    "-> (Tensor, Tensor)",
    _masked,
    _masked_fake,
    _MaskedPixelLoss,
)


def _linear(
    hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target,
    reduce, with_slope,
):  # fmt: skip
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    args = hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(_reasons(images, patch_size)) == "torch":
        return reference.linear_pixel_loss(*args)
    from mvlm_kernels.pixel_loss import linear

    with dispatch.without_autocast(hidden.device):  # hidden's dtype decides, also in a call below autocast
        return linear.linear_pixel_loss(*args)


def _linear_fake(
    hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target,
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
    if dispatch.choose(dispatch.device_reasons(slope.device)) == "torch":
        return reference.linear_pixel_loss_backward(grad, slope, hidden, weight, needs)
    from mvlm_kernels.pixel_loss import linear

    with dispatch.without_autocast(hidden.device):
        return linear.linear_pixel_loss_backward(grad, slope, hidden, weight, needs)


def _linear_backward_fake(grad, slope, hidden, weight, needs_hidden, needs_weight, needs_bias):
    return (
        hidden.new_empty(hidden.shape if needs_hidden else (0,)),
        weight.new_empty(weight.shape if needs_weight else (0,)),
        weight.new_empty((weight.shape[0],) if needs_bias else (0,)),
    )


class _LinearPixelLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, hidden, weight, bias, *args):
        loss, slope = forward(hidden, weight, bias, *args)
        ctx.save_for_backward(slope, hidden, weight)
        ctx.set_materialize_grads(False)
        return loss, slope

    @staticmethod
    def backward(ctx, grad, slope_grad):
        if slope_grad is not None:
            raise registration.no_second_derivative_error("linear_pixel_loss", _INSTEAD)
        needs = ctx.needs_input_grad[1:4]
        if grad is None or not any(needs):
            return (None,) * 13
        saved = ctx.saved_tensors
        backward = registration.backward_of(_linear_backward_op, _linear_backward, grad, *saved)
        grads = backward(grad, *saved, *needs)
        return None, *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 9


_linear_directly = registration.direct(_LinearPixelLoss, _linear)
_linear_backward_op = registration.define(
    "linear_pixel_loss_backward(Tensor grad, Tensor slope, Tensor hidden, Tensor weight, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
    registration.no_second_derivative("linear_pixel_loss", _INSTEAD),
)
_linear_op = registration.define(
    "linear_pixel_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor images, Tensor? patch_ids, "
    "SymInt patch_size, Tensor? mean, Tensor? std, str kind, "
    "bool normalize_target, bool reduce, bool with_slope) -> (Tensor, Tensor)",
    _linear,
    _linear_fake,
    _LinearPixelLoss,
)
