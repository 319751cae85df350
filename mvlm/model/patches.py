"""The grid of patches of an image: cutting, joining, and masks of patches.

The loader draws the masks. Shape legend: B batch, N patches, K masked patches, P patch side, S image side.
"""

import math

import torch
import torch.nn.functional as F
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


def resize_positions(position: Tensor, side: int) -> Tensor:
    """Resize positions of a square grid, (1+N, C) or without [CLS] (N, C), to (1 + side^2, C).

    The interpolation is bicubic with antialiasing, as in timm. Without [CLS], its row is zero. ValueError if N is not a
    square number.
    """
    rows = len(position)
    cls_rows = 0 if round(rows**0.5) ** 2 == rows else 1
    old_side = round((rows - cls_rows) ** 0.5)
    if old_side**2 != rows - cls_rows:
        raise ValueError(f"wanted positions of a square grid, with or without [CLS], got {rows}")
    first = position[:1] if cls_rows else torch.zeros_like(position[:1])
    grid = position[cls_rows:]
    if old_side != side:
        square = grid.T.reshape(1, -1, old_side, old_side).to(torch.promote_types(grid.dtype, torch.float32))
        square = F.interpolate(square, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        grid = square.flatten(2)[0].T.to(position.dtype)
    return torch.cat([first, grid])


def sine_positions(side: int, width: int) -> Tensor:
    """Fixed embeddings of the places of patches (side^2, width), float32, row by row, as in DETR (Carion et al. 2020).

    The first half of the channels tells the column, the second the row: the sines and then the cosines of the
    coordinate times width / 4 frequencies from 1 to 1/10,000. Coordinates of the image's edges are 0 and 2 pi, so a
    place has the same embedding whatever the grid. ValueError if 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"width: wanted a multiple of 4, got {width}")
    quarter = width // 4
    frequencies = 10_000 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    coordinates = 2 * math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side
    angles = coordinates[:, None] * frequencies  # (side, width / 4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width / 2)
    columns, rows = one_axis.repeat(side, 1), one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()
