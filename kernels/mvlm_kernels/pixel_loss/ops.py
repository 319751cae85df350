"""The ops ``torch.ops.mvlm_kernels.masked_pixel_loss`` and ``linear_pixel_loss``: backends, fake tensors, gradients.

Both save one slope per pixel for the backward: F * d(loss of its patch) / d(prediction), with F = C*P*P pixels.
"""

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.gather_patches.arguments import check_id_values, tile_reasons
from mvlm_kernels.pixel_loss import reference
from mvlm_kernels.refusals import Refusal


def pixel_reasons(images: Tensor, patch_size: int) -> tuple[Refusal, ...]:
    """Reasons against Triton for both losses."""
    return dispatch.device_reasons(images.device) + tile_reasons(images.shape[1], patch_size)


def _num_patches(images: Tensor, patch_size: int) -> int:
    _, _, height, width = images.shape
    return (height // patch_size) * (width // patch_size)


def _loss_fake(rows: Tensor, images: Tensor, reduce: bool) -> Tensor:
    dtype = reference.compute_dtype(rows.dtype, images.dtype)
    return rows.new_empty(() if reduce else rows.shape[:2], dtype=dtype)


def _slope_fake(rows: Tensor, features: int, kind: str, with_slope: bool) -> Tensor:
    shape = (rows.shape[0], rows.shape[1], features) if with_slope else (0, 0, 0)
    return rows.new_empty(shape, dtype=torch.int8 if kind == "l1" else rows.dtype)


_INSTEAD = "gather_patches for the target and a loss of torch"

# ---- masked_pixel_loss


def _masked(pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope):
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    args = pred, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(pixel_reasons(images, patch_size)) == "torch":
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


class MaskedPixelLoss(torch.autograd.Function):
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


masked_directly = registration.direct(MaskedPixelLoss, _masked)
_masked_backward_op = registration.define(
    "masked_pixel_loss_backward(Tensor grad, Tensor slope, ScalarType dtype) -> Tensor",
    _masked_backward,
    lambda grad, slope, dtype: slope.new_empty(slope.shape, dtype=dtype),
    registration.no_second_derivative("masked_pixel_loss", _INSTEAD),
)
masked_op = registration.define(
    "masked_pixel_loss(Tensor pred, Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? mean, Tensor? std, "
    "str kind, bool normalize_target, bool reduce, bool with_slope) "
    "-> (Tensor, Tensor)",
    _masked,
    _masked_fake,
    MaskedPixelLoss,
)


# ---- linear_pixel_loss


def _linear(
    hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target,
    reduce, with_slope,
):  # fmt: skip
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    args = hidden, weight, bias, images, patch_ids, patch_size, mean, std, kind, normalize_target, reduce, with_slope
    if dispatch.choose(pixel_reasons(images, patch_size)) == "torch":
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


class LinearPixelLoss(torch.autograd.Function):
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


linear_directly = registration.direct(LinearPixelLoss, _linear)
_linear_backward_op = registration.define(
    "linear_pixel_loss_backward(Tensor grad, Tensor slope, Tensor hidden, Tensor weight, "
    "bool needs_hidden, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    _linear_backward_fake,
    registration.no_second_derivative("linear_pixel_loss", _INSTEAD),
)
linear_op = registration.define(
    "linear_pixel_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor images, Tensor? patch_ids, "
    "SymInt patch_size, Tensor? mean, Tensor? std, str kind, "
    "bool normalize_target, bool reduce, bool with_slope) -> (Tensor, Tensor)",
    _linear,
    _linear_fake,
    LinearPixelLoss,
)
