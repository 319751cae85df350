# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton kernel of ``gather_patches`` and its launcher.

A program owns a few patches, called rows: B*K of them, in the order of ``patch_ids``. It loads all their
pixels before it stores the first one, because a load cannot move across a store that may change what it reads. Offsets
into images are int64 from the first multiplication on, because strides and their products exceed 2^31. A patch id
outside the image reads nothing and gives NaN, so that a bad index is seen and nothing is read out of bounds.

Sizes that change from batch to batch are not specialised: no kernel is compiled in the middle of training. They are
arguments of their own, because Triton (3.6 to 3.9) specialises what is inside a tuple whatever is asked for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.language import SIZES, accumulator, cast, load_patches, pixel_source, row_grid


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
