"""Losses between predicted patches and pixels of images; see ``masked_pixel_loss`` and ``linear_pixel_loss``."""

from typing import Literal

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.gather_patches.arguments import (
    FLOATS,
    ChannelValues,
    channel_tensors,
    check_device,
    check_images,
    check_patch_ids,
)
from mvlm_kernels.pixel_loss.ops import (
    linear_directly,
    linear_op,
    masked_directly,
    masked_op,
    pixel_reasons,
)
from mvlm_kernels.pixel_loss.reference import Kind
from mvlm_kernels.refusals import Refusal

__all__ = ["linear_pixel_loss", "masked_pixel_loss"]

Reduction = Literal["mean", "none"]


def _why_not_masked(
    pred: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, *, mean: ChannelValues = None,
    std: ChannelValues = None, kind: Kind = "l1", normalize_target: bool = False, reduction: Reduction = "mean",
) -> tuple[Refusal, ...]:  # fmt: skip
    _check(images, patch_ids, patch_size, pred, "pred")
    _check_pred(pred, images.shape[1] * patch_size**2)
    _check_options(kind, normalize_target, reduction, images.shape[1] * patch_size**2)
    channel_tensors(mean, std, images, pred.dtype)
    return pixel_reasons(images, patch_size)


def _why_not_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, images: Tensor, patch_ids: Tensor | None, patch_size: int, *,
    mean: ChannelValues = None, std: ChannelValues = None, kind: Kind = "l1", normalize_target: bool = False,
    reduction: Reduction = "mean",
) -> tuple[Refusal, ...]:  # fmt: skip
    hidden = _as_autocast(hidden)
    _check(images, patch_ids, patch_size, hidden, "hidden")
    _check_parameters(hidden, weight, bias, images.shape[1] * patch_size**2)
    _check_options(kind, normalize_target, reduction, images.shape[1] * patch_size**2)
    channel_tensors(mean, std, images, hidden.dtype)
    return pixel_reasons(images, patch_size)


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
    _check(images, patch_ids, patch_size, pred, "pred")
    features = images.shape[1] * patch_size**2
    _check_pred(pred, features)
    _check_options(kind, normalize_target, reduction, features)
    means, stds = channel_tensors(mean, std, images, pred.dtype)
    call = masked_directly if registration.called_directly(pred) else masked_op
    return call(
        pred, images, patch_ids, patch_size, means, stds, kind, normalize_target,
        reduction == "mean", torch.is_grad_enabled() and (pred.requires_grad or registration.transformed()),
    )[0]  # fmt: skip


@dispatch.explained_by(
    _why_not_linear, "cuBLAS multiplies by chunks of images, and the fused kernel takes the loss of each chunk"
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
    _check(images, patch_ids, patch_size, hidden, "hidden")
    features = images.shape[1] * patch_size**2
    _check_parameters(hidden, weight, bias, features)
    _check_options(kind, normalize_target, reduction, features)
    means, stds = channel_tensors(mean, std, images, hidden.dtype)
    # A tensor of torch.func does not know whether a level around it needs a gradient.
    needs_grad = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    needs_grad = needs_grad or registration.transformed()
    call = linear_directly if registration.called_directly(hidden, weight) else linear_op
    return call(
        hidden, weight, bias, images, patch_ids, patch_size, means, stds, kind,
        normalize_target, reduction == "mean", torch.is_grad_enabled() and needs_grad,
    )[0]  # fmt: skip


def _as_autocast(hidden: Tensor) -> Tensor:
    if not isinstance(hidden, Tensor):
        raise ValueError(f"hidden must be a tensor, got {type(hidden).__name__}")
    dtype = dispatch.autocast_dtype(hidden.device) if hidden.dtype == torch.float32 else None
    return hidden if dtype is None else hidden.to(dtype)


def _check(images: Tensor, patch_ids: Tensor | None, patch_size: int, rows: Tensor, name: str) -> None:
    """Raise ValueError unless rows (pred or hidden) is floating (B, K, *) with the B of images and K of patch_ids."""
    if not isinstance(rows, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(rows).__name__}")
    chosen = check_patch_ids(patch_ids, images, check_images(images, patch_size))
    batch, shape = images.shape[0], rows.shape
    if len(shape) != 3 or shape[0] != batch or shape[1] != chosen:
        raise ValueError(f"{name} must have shape (B, K, features) with B, K = {batch, chosen}, got {tuple(shape)}")
    if rows.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")
    check_device(name, rows, images.device)


def _check_pred(pred: Tensor, features: int) -> None:
    if pred.shape[2] != features:
        raise ValueError(f"pred must have {features} = C*P*P features, got shape {tuple(pred.shape)}")


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


def _check_options(kind: str, normalize_target: bool, reduction: str, features: int) -> None:
    if kind not in ("l1", "mse", "smooth_l1"):
        raise ValueError(f'kind must be "l1", "mse" or "smooth_l1", got {kind!r}')
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", got {reduction!r}')
    if normalize_target and features < 2:
        raise ValueError("normalize_target must be False for patches of one value, whose variance is undefined")
