"""Gathering of normalised patches from images; see :func:`gather_patches`."""

import torch
from torch import Tensor

from mvlm_kernels import dispatch, registration
from mvlm_kernels.arguments import (
    ChannelValues,
    channel_tensors,
    check_dtype,
    check_id_values,
    check_images,
    check_patch_ids,
    tile_reasons,
)
from mvlm_kernels.dispatch import Refusal
from mvlm_kernels.gather_patches import reference

__all__ = ["gather_patches"]


def _checked(
    images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: ChannelValues, std: ChannelValues,
    dtype: torch.dtype | None,
) -> tuple[int, Tensor | None, Tensor | None, torch.dtype]:  # fmt: skip
    """Check the arguments, and return patch_size, mean and std as tensors, and the dtype of the result."""
    patch_size, num_patches = check_images(images, patch_size)
    check_patch_ids(patch_ids, images, num_patches)
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    check_dtype("dtype", dtype)
    return patch_size, *channel_tensors(mean, std, images, dtype), dtype


def _why_not_triton(images: Tensor, patch_size: int) -> tuple[Refusal, ...]:
    return dispatch.reasons_for("gather_patches", images.device) + tile_reasons(images.shape[1], patch_size)


@dispatch.explained_by(_why_not_triton, _checked)
def gather_patches(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    *,
    mean: ChannelValues = None,
    std: ChannelValues = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Gather patches of images and normalise them, ``(x - mean) / std``, in one pass over the pixels.

    uint8 pixels are divided by 255 first.

    Args:
        images: (B, C, H, W), uint8 or floating, of any strides: contiguous, channels-last, expanded, a slice.
        patch_ids: (B, K) int32 or int64, numbers of patches in row-major order; repeats are allowed. None takes all.
        patch_size: side P of a square patch in pixels; it divides H and W.
        mean, std: one value for each channel, in units of 0..1 for uint8 images, else in the images' own units. A
            sequence, or a floating tensor (C,) on the images' device. They get no gradient. The first call with a
            sequence copies it to the device, so make one call before capturing a CUDA graph.
        dtype: floating dtype of the result; by default the images' dtype, float32 for uint8.

    Returns:
        (B, K, C*P*P), contiguous, features in (c, y, x) order: the order of a conv patch-embedding weight, so that
        ``gather_patches(...) @ conv.weight.flatten(1).T + conv.bias`` is that embedding of the chosen patches.

    Differentiable in floating images, by torch ops on every device. Gradients of a patch that is read more than once
    add up in rising order of k, without atomics. Arithmetic is in float32 (float64 if an input is float64) and rounds
    once. Ids are checked on the CPU, and on a GPU with MVLM_KERNELS_DEBUG=1. Without the check a bad id gives NaN and
    reads nothing.

    Raises:
        ValueError: for an argument of another kind, a wrong rank, dtype, device or id, or a patch size that does not
            divide the image.
    """
    patch_size, means, stds, dtype = _checked(images, patch_ids, patch_size, mean, std, dtype)
    return _op.on(images, learns=images.requires_grad)(images, patch_ids, patch_size, means, stds, dtype)


def _num_patches(images: Tensor, patch_size: int) -> int:
    return (images.shape[2] // patch_size) * (images.shape[3] // patch_size)


def _forward(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    if dispatch.checks_values(images.device):
        check_id_values("patch_ids", patch_ids, _num_patches(images, patch_size))
    args = images, patch_ids, patch_size, mean, std, dtype
    if dispatch.choose(_why_not_triton(images, patch_size)) == "torch":
        return reference.gather_patches(*args)
    from mvlm_kernels.gather_patches import triton

    by_triton, by_torch = triton.gather_patches, reference.gather_patches
    return dispatch.run_kernels(("gather_patches", images.device), by_triton, by_torch, *args)


def _forward_fake(images, patch_ids, patch_size, mean, std, dtype):
    chosen = _num_patches(images, patch_size) if patch_ids is None else patch_ids.shape[1]
    return images.new_empty(images.shape[0], chosen, images.shape[1] * patch_size**2, dtype=dtype)


def _backward(
    grad: Tensor,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    std: Tensor | None,
) -> Tensor:
    return reference.gather_patches_backward(grad, images, patch_ids, patch_size, std)


def _backward_fake(grad, images, patch_ids, patch_size, std):
    return torch.empty_like(images)


class _GatherPatches(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward, images, patch_ids, patch_size, mean, std, dtype):
        if ctx.needs_input_grad[1]:
            # The backward needs only the shape, dtype and strides of images, but an op takes tensors.
            ctx.save_for_backward(images, patch_ids, std)
        ctx.patch_size = patch_size
        return forward(images, patch_ids, patch_size, mean, std, dtype)

    @staticmethod
    def backward(ctx, grad):
        if not ctx.needs_input_grad[1]:
            return (None,) * 7
        images, patch_ids, std = ctx.saved_tensors
        return None, _backward_op.in_function(grad, images)(grad, images, patch_ids, ctx.patch_size, std), *(None,) * 5


class _GatherPatchesBackward(torch.autograd.Function):
    """The backward is linear in grad, so its own backward is the forward again, without a mean."""

    @staticmethod
    def forward(ctx, backward, grad, images, patch_ids, patch_size, std):
        ctx.save_for_backward(patch_ids, std)
        ctx.patch_size, ctx.dtype = patch_size, grad.dtype
        return backward(grad, images, patch_ids, patch_size, std)

    @staticmethod
    def backward(ctx, grad):
        patch_ids, std = ctx.saved_tensors
        return None, _op.registered(grad, patch_ids, ctx.patch_size, None, std, ctx.dtype), *(None,) * 4


_backward_op = registration.define(
    "gather_patches_backward(Tensor grad, Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? std) -> Tensor",
    _backward,
    _backward_fake,
    _GatherPatchesBackward,
)
_op = registration.define(
    "gather_patches(Tensor images, Tensor? patch_ids, SymInt patch_size, Tensor? mean, Tensor? std, "
    "ScalarType dtype) -> Tensor",
    _forward,
    _forward_fake,
    _GatherPatches,
)
