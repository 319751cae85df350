"""Specification of ``gather_patches`` in plain torch, and its implementation on the CPU.

Legend: B batch, C channels, (H, W) image, P patch side, N = (H/P)(W/P) patches in row-major order, K chosen patches.
Patches are gathered before they are normalised, so that pixels outside the chosen patches cost nothing.
"""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype


def patch_grid(images: Tensor, patch_size: int) -> Tensor:
    """A view of images (B, C, H, W) as (B, H/P, W/P, C, P, P)."""
    grid = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, H/P, P, W/P, P)
    return grid.permute(0, 2, 4, 1, 3, 5)


def gather_patches(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Chosen patches of images, normalised: ((x / 255 if uint8 else x) - mean) / std.

    images (B, C, H, W), patch_ids (B, K) or None for all, mean and std (C,) or None -> (B, K, C*P*P) in ``dtype``,
    contiguous and rounded once. Features are in (c, y, x) order, as in the weight of a conv patch embedding.
    """
    batch, channels = images.shape[:2]
    grid = patch_grid(images, patch_size)
    patches = grid.reshape(batch, grid.shape[1] * grid.shape[2], channels * patch_size**2)  # (B, N, C*P*P)
    if patch_ids is not None:
        rows = patch_rows(patch_ids, patches.shape[1])
        chosen = patches.flatten(0, 1).index_select(0, rows)
        # Not a view: autograd forbids to write to a view that a Function made.
        patches = torch.ops.aten._unsafe_view(chosen, (*patch_ids.shape, patches.shape[2]))  # (B, K, C*P*P)
    # Patches as large as the image are a view of it. An op must not write to its inputs or return a view of them.
    shared = patches.untyped_storage().data_ptr() == images.untyped_storage().data_ptr()
    if mean is None and std is None and images.dtype != torch.uint8:
        return patches.to(dtype, copy=shared).contiguous()
    patches = patches.to(compute_dtype(images.dtype, dtype), copy=shared)
    pixels = patches.view(*patches.shape[:2], channels, patch_size**2)  # of the same memory, which is normalised
    if images.dtype == torch.uint8:
        pixels.div_(255)
    if mean is not None:
        pixels.sub_(mean.to(pixels.dtype)[:, None])
    if std is not None:
        pixels.div_(std.to(pixels.dtype)[:, None])
    return patches.to(dtype).contiguous()


def patch_rows(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Rows (B*K,) int64 of the chosen patches among all B*N. An id out of range gives a row out of range: an error."""
    ids = patch_ids.long()
    rows = ids + torch.arange(ids.shape[0], device=ids.device)[:, None] * num_patches
    return rows.masked_fill_((ids < 0) | (ids >= num_patches), ids.shape[0] * num_patches).flatten()


def gather_patches_backward(
    grad: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, std: Tensor | None
) -> Tensor:
    """grad (B, K, C*P*P) -> gradient of images (B, C, H, W). Repeated patches add up in the order of K."""
    out = torch.empty_like(images)
    grid = patch_grid(out, patch_size)
    patches = grad if patch_ids is None and std is None else grad.to(compute_dtype(grad.dtype, images.dtype))
    if patch_ids is not None:
        num_patches = grid.shape[1] * grid.shape[2]
        row = patch_rows(patch_ids, num_patches)
        total = patches.new_zeros(images.shape[0] * num_patches + 1, patches.shape[2])  # the last row: of bad ids
        if total.device.type == "cpu":
            total.index_add_(0, row, patches.flatten(0, 1))  # adds the rows in order
        else:
            # index_put sorts its indices, so repeated runs agree bit for bit. index_add would use atomics.
            total.index_put_((row,), patches.flatten(0, 1), accumulate=True)
        patches = total[:-1]
    pixels = patches.reshape(grid.shape)
    if std is not None:
        pixels = pixels / std.to(pixels.dtype)[:, None, None]
    grid.copy_(pixels)
    return out
