# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
"""Triton helpers that several ops share, with the same meaning in compiled and in interpreted kernels.

Triton's interpreter is wrong for bfloat16: ``tl.dot`` multiplies bit patterns, sums are wrong, and conversions truncate
where a GPU rounds to nearest even (triton issue 11584). So every kernel of this package multiplies with :func:`dot`,
computes on values that :func:`widen` has converted to the accumulator's dtype, and stores values that :func:`cast` has
rounded. Compiled, the three are exactly ``tl.dot``, ``.to`` and ``.to``.

Importing this module imports Triton. Only kernel modules import it, when a kernel first runs.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from mvlm_kernels import dispatch
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.hardware import blocks

# Triton decides between interpreter and compiler when a kernel is decorated. This constant is read at the same time.
INTERPRETING: bool = bool(knobs.runtime.interpret)
_INTERPRET = tl.constexpr(INTERPRETING)


@triton.jit
def _round_to_tf32(x):
    """Round float32 to TF32's 10 bits of fraction.

    A matrix instruction ignores the other 13 bits. Without this it would multiply operands cut towards zero, an error
    three times as large, and one that shrinks every product.
    """
    return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """``acc + a @ b`` in the dtype of ``acc``.

    a (M, K) and b (K, N) of one dtype, acc (M, N) float32 (float64 interpreted). PRECISION is ``"tf32"``, ``"tf32x3"``
    or ``"ieee"`` and matters for float32 operands only. The interpreter always computes IEEE products.
    """
    if _INTERPRET:
        a = a.to(acc.dtype)
        b = b.to(acc.dtype)
    elif PRECISION == "tf32" and a.dtype == tl.float32:
        a = _round_to_tf32(a)
        b = _round_to_tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in the accumulator's dtype ACC (float32, or float64 interpreted). Arithmetic on bfloat16 needs this first."""
    return x.to(ACC)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """x (float32, or float64 interpreted) as DTYPE, rounded to nearest even, NaN kept."""
    if _INTERPRET and DTYPE == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # A NaN with its payload in the low bits would round to infinity, so NaNs keep their high half and become quiet.
        rounded = tl.where(x != x, (bits >> 16) | 0x40, rounded)
        y = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def reciprocal(x):
    """1 / x of float32 to within an ulp, in one instruction; a division by Triton takes eight."""
    if _INTERPRET:
        y = 1.0 / x
    else:
        y = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def fast_log2(x):
    """Logarithm of float32 in base 2, in one instruction. Its error is up to 2^-22, of the result where |result| > 1.

    It is 0 or of few digits near 1. ``tl.log2`` is exact there too, and takes twenty instructions.
    """
    if _INTERPRET:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y


@triton.jit
def quotient(a, b):
    """a // b of int32 that are not negative. Without signs a division takes two thirds of the instructions."""
    return (a.to(tl.uint32) // b.to(tl.uint32)).to(tl.int32)


@functools.cache
def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """The dtype to compute in: float64 if an input is (gradcheck, interpreted), else float32."""
    return tl.float64 if compute_dtype(*dtypes) == torch.float64 else tl.float32


def walking(
    kernel: Any, device: torch.device, rows: int, slices: int = 1, **options: Any
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid (programs along rows, slices) of a kernel whose programs walk over tiles of BLOCK_R rows, and its options.

    As many programs as run at once by the option `maxnreg`, at most one a tile. The interpreter takes those of an H100.
    """
    options = dispatch.overridden(kernel.__name__, options)
    held = blocks(options["maxnreg"] or 255, options["num_warps"], 0, dispatch.arch(device))
    programs = max(1, held * (dispatch.multiprocessors(device) or 132) // slices)
    return (min(ceil_div(rows, options["BLOCK_R"]), programs), slices), options


@triton.jit(do_not_specialize=["N"])
def column_sum_kernel(
    x_ptr, out_ptr, N, C, ACC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """out (C,) = column sums of x (N, C), in a fixed order. Program (width slice)."""
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    total = tl.zeros((BLOCK_N, BLOCK_C), ACC)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        total += tl.load(x_ptr + (n * C)[:, None] + c[None, :], mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
    tl.store(out_ptr + c, cast(tl.sum(total, axis=0), out_ptr.dtype.element_ty), mask=c < C)


def sum_columns(x: Tensor, out: Tensor, rows: int, width: int) -> None:
    """Sum the rows of x (rows, width) into out (width,), in a fixed order. x has the dtype of the sums."""
    dispatch.launch(
        column_sum_kernel, (dispatch.ceil_div(width, 32),), x, out, rows, width,
        ACC=accumulator(x.dtype), BLOCK_N=64, BLOCK_C=32, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


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
    y = quotient(patch, grid_w)
    top = y.to(tl.int64) * P
    left = (patch - y * grid_w).to(tl.int64) * P
    return c * strides[0] + (top + p // P) * strides[1] + (left + p % P) * strides[2]


@triton.jit
def load_patches(
    row, images, norm, ids, sizes, C: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """Patches of the rows (BLOCK_R,), as (x / 255 if uint8 else x - mean) / std, in ACC.

    A tuple of tiles (BLOCK_R, BLOCK_F): tile i holds features i * BLOCK_F and the next ones, in (c, y, x) order.
    Pixels of a patch id outside the image are NaN, and so are rows that do not exist; features that do not exist have
    any value. A pixel costs a multiply-add and a multiplication: 1/255 is a constant, and std is inverted once per
    channel.

    images: (pointer, strides of B, C, H, W). norm: pointers of mean and std. ids: (pointer, strides). A pointer may be
    None. sizes: (rows, K, patches of an image, patches in a row of an image). See :func:`pixel_source`.
    """
    rows, K, num_patches, grid_w = sizes
    b = quotient(row, K)
    patch = row - b * K
    if ids[0] is not None:
        at = b.to(tl.int64) * ids[1] + patch.to(tl.int64) * ids[2]
        patch = tl.load(ids[0] + at, mask=row < rows, other=-1)
    exists = (row < rows) & (patch >= 0) & (patch < num_patches)
    patch = patch.to(tl.int32)
    start = (b.to(tl.int64) * images[1])[:, None]
    # One NaN a row, in a factor of all its pixels: a choice for each of them would cost more than the rest.
    of_bytes = tl.where(exists, tl.full((), 1.0 / 255.0, ACC), float("nan"))[:, None]
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
        if images[0].dtype.element_ty == tl.uint8:
            x = widen(tl.load(images[0] + offsets, mask=readable, other=0), ACC) * of_bytes
        else:
            x = widen(tl.load(images[0] + offsets, mask=readable, other=float("nan")), ACC)
        if norm[0] is not None:
            x = x - widen(tl.load(norm[0] + c, mask=c < C, other=0.0), ACC)
        if norm[1] is not None:
            x = x * reciprocal(widen(tl.load(norm[1] + c, mask=c < C, other=1.0), ACC))
        tiles += (x,)
    return tiles
