# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernel of ``gather_patches`` and its launcher.

A program owns a few patches, called rows: B*K of them, in the order of ``patch_ids``. It loads all their
pixels before it stores the first one, because a load cannot move across a store that may change what it reads. Offsets
into images are int64 from the first multiplication on, because strides and their products exceed 2^31. A patch id
outside the image reads nothing and gives NaN, so that a bad index is seen and nothing is read out of bounds.

Sizes that change from batch to batch are not specialised: no kernel is compiled in the middle of training. They are
arguments of their own, because Triton (3.6 to 3.9) specialises what is inside a tuple whatever is asked for.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import accumulator, cast, widen


@functools.lru_cache(maxsize=1024)
def row_grid(rows: int, features: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile of the programs that hold whole rows of ``features`` values. Do not change the cached dict.

    The tile has BLOCK_R rows, takes BLOCK_F features at a time and has num_warps warps. A warp owns a row of at most
    1,024 features, and a lane 8 neighbouring values. A longer row has a program of its own. At most 64 values per lane
    are held, about the most that fits without spilling registers. Raises ValueError for 2^31 rows, as row numbers are
    int32.
    """
    if rows >= 2**31:
        raise ValueError(f"the kernels take fewer than 2^31 patches at once, got {rows}; split the batch")
    block_r, warps = (4, 4) if features <= 1024 else (1, 4 if features <= 8192 else 16)
    block_f = min(power_of_two(features), 256 * warps // block_r)
    tile = {"BLOCK_R": block_r, "BLOCK_F": block_f, "num_warps": max(1, block_r * block_f // 256)}
    return (ceil_div(rows, block_r),), tile


def pixel_source(
    images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: Tensor | None, std: Tensor | None
) -> tuple[Any, ...]:
    """Arguments of a kernel that reads patches with :func:`load_patches`: images, norm, ids_ptr and those of SIZES.

    images (B, C, H, W) of any strides, patch_ids (B, K) or None, mean and std (C,) or None.
    """
    batch, _, height, width = images.shape
    grid_w = width // patch_size
    num_patches = height // patch_size * grid_w
    chosen = num_patches if patch_ids is None else patch_ids.shape[1]
    id_strides = (0, 0) if patch_ids is None else patch_ids.stride()
    sizes = batch * chosen, chosen, num_patches, grid_w
    return (images, *images.stride()), (mean, std), patch_ids, *id_strides, *sizes


SIZES = ["stride_kb", "stride_kk", "rows", "K", "num_patches", "grid_w"]


@triton.jit
def image_offsets(patch, c, p, grid_w, strides, P: tl.constexpr):
    """Offsets from an image's start to pixels p of channel c of a patch. strides: of channels, rows and columns."""
    top = (patch // grid_w).to(tl.int64) * P
    left = (patch % grid_w).to(tl.int64) * P
    return c * strides[0] + (top + p // P) * strides[1] + (left + p % P) * strides[2]


@triton.jit
def load_patches(
    row, images, norm, ids, sizes, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Patches of the rows (BLOCK_R,), as (x / 255 if uint8 else x - mean) / std, in ACC.

    A tuple of tiles (BLOCK_R, BLOCK_F): tile i holds features i * BLOCK_F and the next ones, in (c, y, x) order.
    Pixels of a patch id outside the image are NaN; rows and features that do not exist are NaN too. A pixel costs a
    multiply-add and a multiplication: 1/255 is a constant, and std is inverted once per channel.

    images: (pointer, strides of B, C, H, W). norm: pointers of mean and std. ids: (pointer, strides). A pointer may be
    None. sizes: (rows, K, patches of an image, patches in a row of an image). See :func:`pixel_source`.
    """
    rows, K, num_patches, grid_w = sizes
    b = row // K
    patch = row % K
    if ids[0] is not None:
        at = b.to(tl.int64) * ids[1] + patch.to(tl.int64) * ids[2]
        patch = tl.load(ids[0] + at, mask=row < rows, other=-1)
    exists = (row < rows) & (patch >= 0) & (patch < num_patches)
    start = (b.to(tl.int64) * images[1])[:, None]
    tiles = ()
    for i in tl.static_range(0, C * P * P, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = i + tl.arange(0, BLOCK_F)[None, :]
        if (P * P) % BLOCK_F == 0:
            c = tl.full((1, 1), i // (P * P), tl.int64)
            p = i % (P * P) + tl.arange(0, BLOCK_F)[None, :]
        else:
            c = (f // (P * P)).to(tl.int64)
            p = f % (P * P)
        readable = exists[:, None] & (f < C * P * P)
        offsets = start + image_offsets(patch[:, None], c, p, grid_w, images[2:], P)
        x = widen(tl.load(images[0] + offsets, mask=readable, other=0), ACC)
        if images[0].dtype.element_ty == tl.uint8:
            x = x * (1.0 / 255.0)
        if norm[0] is not None:
            x = x - widen(tl.load(norm[0] + c, mask=c < C, other=0.0), ACC)
        if norm[1] is not None:
            x = x * (1.0 / widen(tl.load(norm[1] + c, mask=c < C, other=1.0), ACC))
        tiles += (tl.where(readable, x, float("nan")),)
    return tiles


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(
    out_ptr, images, norm, ids_ptr, stride_kb, stride_kk, rows, K, num_patches, grid_w,
    C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gather BLOCK_R patches into out (B*K, C*P*P), contiguous."""
    F: tl.constexpr = C * P * P
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    ids, sizes = (ids_ptr, stride_kb, stride_kk), (rows, K, num_patches, grid_w)
    tiles = load_patches(row, images, norm, ids, sizes, C, P, ACC, BLOCK_F)
    out_rows = out_ptr + (row.to(tl.int64) * F)[:, None]
    for i in tl.static_range(0, F, BLOCK_F):  # pyright: ignore[reportGeneralTypeIssues]
        f = i + tl.arange(0, BLOCK_F)[None, :]
        value = cast(tiles[i // BLOCK_F], out_ptr.dtype.element_ty)
        tl.store(out_rows + f, value, mask=(row < rows)[:, None] & (f < F))


def gather_patches(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """images (B, C, H, W) of any strides, patch_ids (B, K) or None, mean and std (C,) -> (B, K, C*P*P), contiguous."""
    source = pixel_source(images, patch_ids, patch_size, mean, std)
    (batch, channels), (rows, chosen, *_) = images.shape[:2], source[-4:]
    features = channels * patch_size**2
    out = images.new_empty(batch, chosen, features, dtype=dtype)
    grid, tile = row_grid(rows, features)
    dispatch.launch(
        gather_kernel, grid, out, *source,
        C=channels, P=patch_size, ACC=accumulator(images.dtype, dtype), **tile, enable_fp_fusion=True,
    )  # fmt: skip
    return out
