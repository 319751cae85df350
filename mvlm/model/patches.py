"""The grid of patches of an image: cutting, joining, and masks of patches.

The loader draws the masks. Shape legend: B batch, N patches, K masked patches, P patch side, S image side.
"""

import torch
from torch import Tensor


def masked_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Mask of the masked patches: patch_ids int64 (B, K) -> bool (B, N), True = masked.

    Neighbours in memory are the images, not the patches, as the kernel of `place_tokens` reads them.
    """
    mask = torch.zeros(num_patches, len(patch_ids), dtype=torch.bool, device=patch_ids.device)
    return mask.scatter_(0, patch_ids.t(), True).t()


def visible_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Indices of the patches that are not masked: masked patch_ids int64 (B, K) -> int64 (B, N-K), ascending."""
    # A stable sort of the flags keeps the indices ascending, with a shape that the host knows.
    visible = ~masked_patches(patch_ids, num_patches)  # (B, N), True = not masked
    return visible.byte().argsort(dim=1, descending=True, stable=True)[:, : num_patches - patch_ids.shape[1]]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images (B, 3, S, S) into patches (B, N, 3*P*P), in row-major order; values of a patch in (c, y, x) order."""
    rows = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, 3, S/P, P, S/P, P)
    return rows.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of `patchify`: (B, N, 3*P*P) -> (B, 3, S, S)."""
    side = round(patches.shape[1] ** 0.5)
    grid = patches.unflatten(2, (3, patch_size, patch_size)).unflatten(1, (side, side))  # (B, S/P, S/P, 3, P, P)
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
