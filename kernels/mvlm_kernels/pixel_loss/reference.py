"""Specification of ``masked_pixel_loss`` and ``linear_pixel_loss`` in plain torch, which is also what runs on the CPU.

Legend: B batch, K masked patches, F = C*P*P pixels of a patch, D width of the hidden states.
The ops save the derivative of the loss by the prediction, before any scaling: a sign byte for L1 (-1, 0, 1, and -128
for NaN), else a value in the prediction's type. Unscaled it is of the order of 1, so that float16 neither under- nor
overflows; the factor 1/F, the mean and the incoming gradient are applied in float32 in the backward pass.
"""

from typing import Literal

import torch
from torch import Tensor

from mvlm_kernels.patch_gather.reference import compute_dtype, gather_patches

Kind = Literal["l1", "mse", "smooth_l1"]
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
    """The pixels to predict, (B, K, F) in ``dtype``; normalize_target is MAE's (x - mean) / sqrt(var + 1e-6) over each
    patch, with the unbiased variance (facebookresearch/mae, models_mae.py, forward_loss)."""
    target = gather_patches(images, patch_ids, patch_size, mean, std, dtype)
    if normalize_target and target.numel():  # torch warns about the variance of nothing
        var, center = torch.var_mean(target, dim=2, keepdim=True)  # (B, K, 1) each
        target = (target - center) / (var + EPS).sqrt()
    return target


def pixel_loss_and_slope(difference: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Loss of each pixel and its derivative, from prediction minus target of any shape."""
    size = difference.abs()
    sign = torch.where(difference.isnan(), difference, difference.sign())  # torch.sign calls NaN 0
    if kind == "l1":
        return size, sign
    if kind == "mse":
        return difference.square(), 2 * difference
    # smooth_l1 with beta = 1, as torch.nn.functional.smooth_l1_loss
    near = size < 1
    return torch.where(near, 0.5 * difference.square(), size - 0.5), torch.where(near, difference, sign)


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
    """pred (B, K, F) -> loss (scalar if reduce, else (B, K)), and the slope (B, K, F) that the backward pass starts
    from (empty without with_slope). The mean of nothing is 0."""
    dtype = compute_dtype(pred.dtype, images.dtype)
    target = pixel_targets(images, patch_ids, patch_size, mean, std, normalize_target, dtype)
    pixels, slope = pixel_loss_and_slope(pred.to(dtype) - target, kind)
    loss = pixels.mean(dim=2)  # (B, K)
    if reduce:
        loss = loss.sum() / max(1, loss.numel())
    return loss, encode_slope(slope if with_slope else slope.new_empty(0, 0, 0), kind, pred.dtype)


def encode_slope(slope: Tensor, kind: Kind, dtype: torch.dtype) -> Tensor:
    """Slope as it is saved: int8 for L1, else ``dtype``."""
    if kind == "l1":
        return slope.nan_to_num(nan=NAN_SIGN).to(torch.int8).contiguous()
    return slope.to(dtype).contiguous()


def decode_slope(slope: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`encode_slope`, in ``dtype``."""
    values = slope.to(dtype)
    if slope.dtype == torch.int8:
        values = values.masked_fill(slope == NAN_SIGN, float("nan"))
    return values


def prediction_gradient(grad: Tensor, slope: Tensor) -> Tensor:
    """grad (scalar of the mean loss, or (B, K)) and slope (B, K, F) -> gradient of the predictions in grad's type."""
    if grad.ndim == 0:
        grad = grad / max(1, slope.shape[0] * slope.shape[1])
    return decode_slope(slope, grad.dtype) * (grad / slope.shape[2]).reshape(*grad.shape, *(1,) * (3 - grad.ndim))


def masked_pixel_loss_backward(grad: Tensor, slope: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of pred (B, K, F) in ``dtype``."""
    return prediction_gradient(grad, slope).to(dtype)


def linear_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """hidden (B, K, D), weight (F, D), bias (F,) or None: :func:`masked_pixel_loss` of hidden @ weight.T + bias. The
    parameters take the type of hidden, as autocast has it."""
    pred = torch.nn.functional.linear(
        hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    )  # (B, K, F)
    return masked_pixel_loss(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope)


def linear_pixel_loss_backward(
    grad: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (B, K, D), weight (F, D) and bias (F,), each in its own type, empty where not needed.
    Products are taken in the type of grad (float32 or float64)."""
    dtype = grad.dtype
    pred_grad = prediction_gradient(grad, slope).flatten(0, 1)  # (B*K, F)
    hidden_grad, weight_grad, bias_grad = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if needs[0]:
        hidden_grad = (pred_grad @ weight.to(dtype)).reshape(hidden.shape).to(hidden.dtype)
    if needs[1]:
        weight_grad = (pred_grad.T @ hidden.to(dtype).flatten(0, 1)).to(weight.dtype)
    if needs[2]:
        bias_grad = pred_grad.sum(dim=0).to(weight.dtype)
    return hidden_grad, weight_grad, bias_grad
