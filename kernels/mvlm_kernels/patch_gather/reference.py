"""Specification of ``gather_patches`` in plain torch, which is also what runs on the CPU.

Legend: B batch, C channels, (H, W) image, P patch side, N = (H/P)(W/P) patches in row-major order, K chosen patches.
"""

import torch
from torch import Tensor


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type that pixels are normalised and summed in: float64 where any input is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def normalize(images: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(x / 255 if uint8 else x - mean) / std in ``dtype``; images (B, C, H, W), mean and std (C,) or None."""
    pixels = images.to(dtype)
    if images.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None:
        pixels = pixels - mean.to(dtype)[:, None, None]
    if std is not None:
        pixels = pixels / std.to(dtype)[:, None, None]
    return pixels


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P), features in (c, y, x) order: a flattened conv patch-embedding weight's order."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    patches = images.reshape(batch, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: Tensor, channels: int, height: int, width: int, patch_size: int) -> Tensor:
    """The inverse of :func:`patchify`: (B, N, C*P*P) -> (B, C, H, W)."""
    rows, columns = height // patch_size, width // patch_size
    grid = patches.reshape(-1, rows, columns, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(-1, channels, height, width)


def gather_patches(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """images (B, C, H, W), patch_ids (B, K) or None for all -> (B, K, C*P*P) in ``dtype``, rounded once."""
    patches = patchify(normalize(images, mean, std, compute_dtype(images.dtype, dtype)), patch_size)  # (B, N, C*P*P)
    if patch_ids is not None:
        patches = patches.gather(1, patch_ids.long()[:, :, None].expand(-1, -1, patches.shape[2]))  # (B, K, C*P*P)
    # Whole images may come through every step above as a view of themselves, and an op must not return its input.
    return patches.to(dtype, copy=True, memory_format=torch.contiguous_format)


def gather_patches_backward(
    grad: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, std: Tensor | None
) -> Tensor:
    """grad (B, K, C*P*P) -> gradient of images (B, C, H, W): patches read more than once add up in the order of K."""
    batch, channels, height, width = images.shape
    patches = grad.to(compute_dtype(grad.dtype, images.dtype))
    if patch_ids is not None:
        num_patches = (height // patch_size) * (width // patch_size)
        total = patches.new_zeros(batch, num_patches, patches.shape[2])
        # index_put walks K in order, on a GPU after a sort, so repeated runs agree bit for bit; scatter_add would not.
        row = torch.arange(batch, device=total.device)[:, None].expand_as(patch_ids)
        patches = total.index_put((row, patch_ids.long()), patches, accumulate=True)
    pixels = unpatchify(patches, channels, height, width, patch_size)
    if std is not None:
        pixels = pixels / std.to(pixels.dtype)[:, None, None]
    return torch.empty_like(images).copy_(pixels)
