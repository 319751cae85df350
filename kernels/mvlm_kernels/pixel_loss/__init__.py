"""Loss between predicted patches and pixels of images; see :func:`masked_pixel_loss`.

It saves one slope per pixel for the backward: F * d(loss of its patch) / d(prediction), with F = C*P*P pixels.
"""

from typing import Literal

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import (
    ChannelValues,
    channel_tensors,
    check_choice,
    check_flag,
    check_id_values,
    check_images,
    check_patch_ids,
    check_tensor,
    compute_dtype,
    tile_reasons,
)
from mvlm_kernels.dispatch import Refusal
from mvlm_kernels.pixel_loss import reference
from mvlm_kernels.pixel_loss.reference import Kind, slope_dtype

__all__ = ["masked_pixel_loss"]

Reduction = Literal["mean", "none"]


def _checked(
    pred: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: ChannelValues,
    std: ChannelValues, kind: str, normalize_target: bool, reduction: str,
) -> tuple[int, Tensor | None, Tensor | None, bool]:  # fmt: skip
    """Check the arguments, and return patch_size, mean and std as tensors, and normalize_target."""
    patch_size, num_patches = check_images(images, patch_size)
    chosen = check_patch_ids(patch_ids, images, num_patches)
    wanted = images.shape[0], chosen, images.shape[1] * patch_size**2
    check_tensor("pred", pred, device=images.device)
    if pred.shape != wanted:
        raise ValueError(f"pred must have shape (B, K, C*P*P) = {wanted}, got {tuple(pred.shape)}")
    check_choice("kind", kind, ("l1", "mse"))
    check_choice("reduction", reduction, ("mean", "none"))
    if check_flag("normalize_target", normalize_target) and wanted[2] < 2:
        raise ValueError("normalize_target must be False for patches of one value, whose variance is undefined")
    return patch_size, *channel_tensors(mean, std, images, pred.dtype), bool(normalize_target)


def _reasons(images: Tensor, patch_size: int) -> tuple[Refusal, ...]:
    return dispatch.reasons_for("pixel_loss", images.device) + tile_reasons(images.shape[1], patch_size)


@dispatch.explained_by(_reasons, _checked)
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
        kind: "l1" or "mse".
        normalize_target: MAE's target, (x - mean) / sqrt(var + 1e-6) over each patch, with the unbiased variance
            (facebookresearch/mae, models_mae.py, forward_loss).
        reduction: "mean" over all pixels of all K patches, or "none" for the mean of each patch.

    Returns:
        A scalar, or (B, K) for "none", in float32 (float64 if an input is). The mean of no patches is 0.

    Differentiable in pred. The forward pass reads pred and the pixels once and also writes the slope, one byte per
    pixel for L1. Sums are taken in a fixed order, without atomics. Ids are checked on the CPU, and on a GPU with
    MVLM_KERNELS_DEBUG=1. Without the check a bad id gives NaN and reads nothing. A NaN prediction has a NaN gradient.

    Raises:
        ValueError: for an argument of another kind, and a wrong rank, shape, dtype, device, id, kind or reduction.
    """
    patch_size, means, stds, normalize_target = _checked(
        pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduction
    )
    return _op.on(pred)(
        pred, images, patch_ids, patch_size, means, stds, kind, normalize_target,
        reduction == "mean", torch.is_grad_enabled() and (pred.requires_grad or registration.transformed()),
    )[0]  # fmt: skip


_INSTEAD = "gather_patches for the target and a loss of torch"


def _forward(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope):
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, images.shape[2:].numel() // patch_size**2)
    args = pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(_reasons(images, patch_size)) == "torch":
        return reference.masked_pixel_loss(*args)
    from mvlm_kernels.pixel_loss import triton

    by_triton, by_torch = triton.masked_pixel_loss, reference.masked_pixel_loss
    return dispatch.run_kernels(("pixel_loss", images.device), by_triton, by_torch, *args)


def _forward_fake(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope):
    loss = pred.new_empty(() if reduce else pred.shape[:2], dtype=compute_dtype(pred.dtype, images.dtype))
    return loss, pred.new_empty(pred.shape if with_slope else (0, 0, 0), dtype=slope_dtype(kind, pred.dtype))


def _backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    args = grad, slope, dtype
    if dispatch.choose(dispatch.reasons_for("pixel_loss", slope.device)) == "torch":
        return reference.masked_pixel_loss_backward(*args)
    from mvlm_kernels.pixel_loss import triton

    by_triton, by_torch = triton.masked_pixel_loss_backward, reference.masked_pixel_loss_backward
    return dispatch.run_kernels(("pixel_loss", slope.device), by_triton, by_torch, *args)


class _PixelLoss(torch.autograd.Function):
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
        return None, _backward_op.in_function(grad, slope)(grad, slope, ctx.dtype), *(None,) * 9


_backward_op = registration.define(
    "masked_pixel_loss_backward(Tensor grad, Tensor slope, ScalarType dtype) -> Tensor",
    _backward,
    lambda grad, slope, dtype: slope.new_empty(slope.shape, dtype=dtype),
    registration.no_second_derivative("masked_pixel_loss", _INSTEAD),
)
_op = registration.define(
    "masked_pixel_loss(Tensor pred, Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? mean, Tensor? std, "
    "str kind, bool normalize_target, bool reduce, bool with_slope) "
    "-> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    _PixelLoss,
)
