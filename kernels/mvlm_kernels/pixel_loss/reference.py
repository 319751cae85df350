"""Specification of ``masked_pixel_loss`` in plain torch, and its implementation on the CPU.

Legend: B batch, K predicted patches, F = C*P*P pixels of a patch.
Slope: the derivative of a pixel's loss by its prediction, before any scaling. The op saves it for the backward pass:
for L1 as a sign byte (-1, 0, 1, and -128 for NaN), else in the prediction's dtype. Unscaled it is of the order of 1, so
float16 neither underflows nor overflows. The backward pass applies 1/F, the mean and the incoming gradient in float32.
"""

from typing import Literal

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.gather_patches.reference import gather_patches

Kind = Literal["l1", "mse"]
EPS = 1e-6
NAN_SIGN = -128


def pixel_targets(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    normalize_target: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Target pixels (B, K, F) in ``dtype``.

    normalize_target is MAE's (x - mean) / sqrt(var + 1e-6) over each patch, with the unbiased variance
    (facebookresearch/mae, models_mae.py, forward_loss).
    """
    target = gather_patches(images, patch_ids, patch_size, mean, std, dtype)
    if normalize_target and target.numel():  # torch warns about the variance of an empty tensor
        var, center = torch.var_mean(target, dim=2, keepdim=True)  # (B, K, 1) each
        target = (target - center) / (var + EPS).sqrt()
    return target


def pixel_loss(difference: Tensor, kind: Kind) -> Tensor:
    """Loss of each pixel, from prediction minus target of any shape."""
    return difference.abs() if kind == "l1" else difference.square()


def slope_dtype(kind: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which the forward pass saves the loss's derivative: int8 for L1, whose derivative is a sign.

    dtype: of the predictions, and of the saved derivative for other losses.
    """
    return torch.int8 if kind == "l1" else dtype


def encode_slope(difference: Tensor, loss: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Derivative of :func:`pixel_loss` in its saved form, of predictions in ``dtype``.

    loss: (B, K), used only to detect NaN.
    """
    if kind == "l1":
        sign = difference.sign()
        # torch.sign(NaN) is 0. On the CPU the losses show cheaply if there is a NaN. On a GPU, reading them would be a
        # sync.
        if difference.device.type != "cpu" or bool(loss.isnan().any()):
            sign = sign.masked_fill(difference.isnan(), NAN_SIGN)
        return sign.to(torch.int8)
    return (2 * difference).to(dtype)


def masked_pixel_loss(
    pred: Tensor,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    kind: Kind,
    normalize_target: bool,
    reduce: bool,
    with_slope: bool = True,
) -> tuple[Tensor, Tensor]:
    """pred (B, K, F) -> loss (scalar if reduce, else (B, K)) and slope (B, K, F), which is empty without with_slope.

    The mean of no patches is 0.
    """
    dtype = compute_dtype(pred.dtype, images.dtype)
    target = pixel_targets(images, patch_ids, patch_size, mean, std, normalize_target, dtype)
    difference = pred.to(dtype) - target
    loss = pixel_loss(difference, kind).mean(dim=2)  # (B, K)
    seen = difference.detach() if with_slope else difference.new_empty(0, 0, 0)
    slope = encode_slope(seen, loss, kind, pred.dtype).contiguous()
    return loss.sum() / max(1, loss.numel()) if reduce else loss, slope


def decode_slope(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a saved slope to a new tensor of ``dtype``."""
    values = slope.to(dtype, copy=True)
    # On the CPU the smallest byte shows if there is a NaN. On a GPU, reading it would be a sync.
    if slope.dtype != torch.int8 or (slope.device.type == "cpu" and not (slope.numel() and slope.min() == NAN_SIGN)):
        return values
    return values.masked_fill_(slope == NAN_SIGN, float("nan"))


def masked_pixel_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """grad (scalar of the mean loss, or (B, K)), slope (B, K, F) -> gradient of pred (B, K, F) in ``dtype``."""
    rows = slope.shape[0] * slope.shape[1] if grad.ndim == 0 else 1
    factor = grad / (max(1, rows) * slope.shape[2])
    # In place, so that the product is taken in the wider dtype of the two and rounded once.
    return decode_slope(slope, dtype).mul_(factor if grad.ndim == 0 else factor[:, :, None])
