# pyright: reportArgumentType=false
"""Triton kernels of ``gather_patches`` and their launchers.

One program owns one patch: a tile of (channels, P*P pixels), both padded to powers of two. Offsets into images are
int64 from the first multiplication on, because strides and their products exceed 2^31. A patch id outside the image
reads nothing and gives NaN, so that a bad index is seen and nothing is read out of bounds.
"""

import functools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div, power_of_two
from mvlm_kernels.language import cast, widen


@functools.cache
def tile_of(channels: int, patch_size: int) -> tuple[int, int, int]:
    """(BLOCK_C, BLOCK_P, num_warps) of the tile that holds one patch."""
    block_c, block_p = power_of_two(channels), power_of_two(patch_size**2)
    return block_c, block_p, min(16, max(1, block_c * block_p // 256))


def accumulator(*dtypes: torch.dtype) -> tl.dtype:
    """The dtype to compute in: float64 if an input is (gradcheck, interpreted), else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


@triton.jit
def image_offsets(patch, c, p, grid_w, stride_c, stride_y, stride_x, P: tl.constexpr):
    """Offsets from an image's start to the pixels of one patch. patch is a scalar, c (BLOCK_C, 1), p (1, BLOCK_P)."""
    top = (patch // grid_w).to(tl.int64) * P
    left = (patch % grid_w).to(tl.int64) * P
    return c.to(tl.int64) * stride_c + (top + p // P) * stride_y + (left + p % P) * stride_x


@triton.jit
def readable_pixels(patch, num_patches, P: tl.constexpr):
    """Number of pixels to read in each channel of the patch: P*P, or 0 for an id outside the image."""
    return tl.where((patch >= 0) & (patch < num_patches), P * P, 0)


@triton.jit
def normalized_pixels(
    images_ptr, offsets, c, mask, mean_ptr, std_ptr,
    C: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Pixels at ``offsets`` where ``mask`` is set, as (x / 255 - mean) / std; 0 elsewhere. c broadcasts with offsets.

    A pixel costs a multiply-add and a multiplication: 1/255 is a constant, and std is inverted once per channel.
    """
    x = widen(tl.load(images_ptr + offsets, mask=mask, other=0), ACC)
    if IS_UINT8:
        x = x * (1.0 / 255.0)
    if HAS_MEAN:
        x = x - widen(tl.load(mean_ptr + c, mask=c < C, other=0.0), ACC)
    if HAS_STD:
        x = x * (1.0 / widen(tl.load(std_ptr + c, mask=c < C, other=1.0), ACC))
    return tl.where(mask, x, 0.0)


@triton.jit
def gather_kernel(
    images_ptr, ids_ptr, mean_ptr, std_ptr, out_ptr,
    K, num_patches, grid_w,
    stride_ib, stride_ic, stride_iy, stride_ix, stride_kb, stride_kk,
    C: tl.constexpr, P: tl.constexpr,
    HAS_IDS: tl.constexpr, IS_UINT8: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_STD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gather one patch of an image into out (B, K, C*P*P), contiguous. Program (b*K + k)."""
    row = tl.program_id(0).to(tl.int64)
    b = row // K
    k = row % K
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (c < C) & (p < P * P)
    patch = tl.load(ids_ptr + b * stride_kb + k * stride_kk).to(tl.int64) if HAS_IDS else k
    readable = (c < C) & (p < readable_pixels(patch, num_patches, P))
    offsets = b * stride_ib + image_offsets(patch, c, p, grid_w, stride_ic, stride_iy, stride_ix, P)
    x = normalized_pixels(images_ptr, offsets, c, readable, mean_ptr, std_ptr, C, IS_UINT8, HAS_MEAN, HAS_STD, ACC)
    x = tl.where(readable, x, float("nan"))
    tl.store(out_ptr + row * (C * P * P) + c * (P * P) + p, cast(x, out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def reader_lists_kernel(
    ids_ptr, table_ptr, K, N, stride_kb, stride_kk, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Build linked lists of the readers of each patch, in rising order and without atomics.

    A reader of patch n is an index k with patch_ids[b, k] = n. table is (B, N+K) int32: table[b, n] is the first reader
    of patch n, and table[b, N+k] is the reader that follows k; -1 ends a list. Program (b, block of the N+K entries)
    compares its entries with all ids of image b, so no order of execution can change the result.
    """
    b = tl.program_id(0).to(tl.int64)
    q = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    follows = (q >= N) & (q < N + K)
    own = tl.load(ids_ptr + b * stride_kb + (q - N).to(tl.int64) * stride_kk, mask=follows, other=0).to(tl.int64)
    wanted = tl.where(follows, own, q.to(tl.int64))
    after = tl.where(follows, q - N, -1)
    first = tl.full((BLOCK_Q,), 2147483647, tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        ids = tl.load(ids_ptr + b * stride_kb + k.to(tl.int64) * stride_kk, mask=k < K, other=-1).to(tl.int64)
        reads = (ids[None, :] == wanted[:, None]) & (k[None, :] > after[:, None]) & (k[None, :] < K)
        first = tl.minimum(first, tl.min(tl.where(reads, k[None, :], 2147483647), axis=1))
    first = tl.where(first == 2147483647, -1, first)
    tl.store(table_ptr + b * (N + K) + q, first, mask=q < N + K)


@triton.jit
def gather_backward_kernel(
    grad_ptr, table_ptr, std_ptr, out_ptr,
    K, num_patches, grid_w,
    stride_gb, stride_gk, stride_gf, stride_ib, stride_ic, stride_iy, stride_ix,
    C: tl.constexpr, P: tl.constexpr, HAS_IDS: tl.constexpr, HAS_STD: tl.constexpr,
    ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of one patch of an image, summed over its readers in rising order of k. Program (b*N + n).

    Every patch has one program, which also stores zeros for a patch without readers, so the output needs no fill.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // num_patches
    n = row % num_patches
    c = tl.arange(0, BLOCK_C)[:, None]
    p = tl.arange(0, BLOCK_P)[None, :]
    inside = (c < C) & (p < P * P)
    features = (c * (P * P) + p).to(tl.int64) * stride_gf
    if HAS_IDS:
        total = tl.zeros((BLOCK_C, BLOCK_P), ACC)
        k = tl.load(table_ptr + b * (num_patches + K) + n)
        while k >= 0:
            g = tl.load(grad_ptr + b * stride_gb + k.to(tl.int64) * stride_gk + features, mask=inside, other=0.0)
            total += widen(g, ACC)
            k = tl.load(table_ptr + b * (num_patches + K) + num_patches + k)
    else:
        total = widen(tl.load(grad_ptr + b * stride_gb + n * stride_gk + features, mask=inside, other=0.0), ACC)
    if HAS_STD:
        total = total / widen(tl.load(std_ptr + c, mask=c < C, other=1.0), ACC)
    offsets = b * stride_ib + image_offsets(n, c, p, grid_w, stride_ic, stride_iy, stride_ix, P)
    tl.store(out_ptr + offsets, cast(total, out_ptr.dtype.element_ty), mask=inside)


def gather_patches(
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """images (B, C, H, W) of any strides, patch_ids (B, K) or None, mean and std (C,) -> (B, K, C*P*P), contiguous."""
    batch, channels, height, width = images.shape
    grid_w = width // patch_size
    num_patches = (height // patch_size) * grid_w
    chosen = num_patches if patch_ids is None else patch_ids.shape[1]
    out = images.new_empty(batch, chosen, channels * patch_size**2, dtype=dtype)
    block_c, block_p, warps = tile_of(channels, patch_size)
    dispatch.launch(
        gather_kernel, (batch * chosen,),
        images, patch_ids, mean, std, out, chosen, num_patches, grid_w,
        *images.stride(), *(patch_ids.stride() if patch_ids is not None else (0, 0)),
        C=channels, P=patch_size, HAS_IDS=patch_ids is not None, IS_UINT8=images.dtype == torch.uint8,
        HAS_MEAN=mean is not None, HAS_STD=std is not None, ACC=accumulator(images.dtype, dtype),
        BLOCK_C=block_c, BLOCK_P=block_p, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def reader_lists(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Readers of each patch as linked lists, (B, N+K) int32; see :func:`reader_lists_kernel`. patch_ids: (B, K)."""
    batch, chosen = patch_ids.shape
    table = patch_ids.new_empty(batch, num_patches + chosen, dtype=torch.int32)
    dispatch.launch(
        reader_lists_kernel, (batch, ceil_div(num_patches + chosen, 64)),
        patch_ids, table, chosen, num_patches, *patch_ids.stride(),
        BLOCK_Q=64, BLOCK_K=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return table


def gather_patches_backward(
    grad: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, std: Tensor | None
) -> Tensor:
    """grad (B, K, C*P*P) of any strides -> gradient of images, in their dtype and memory format."""
    batch, channels, height, width = images.shape
    grid_w = width // patch_size
    num_patches = (height // patch_size) * grid_w
    out = torch.empty_like(images)
    table = None if patch_ids is None else reader_lists(patch_ids, num_patches)
    block_c, block_p, warps = tile_of(channels, patch_size)
    dispatch.launch(
        gather_backward_kernel, (batch * num_patches,),
        grad, table, std, out, grad.shape[1], num_patches, grid_w, *grad.stride(), *out.stride(),
        C=channels, P=patch_size, HAS_IDS=patch_ids is not None, HAS_STD=std is not None,
        ACC=accumulator(grad.dtype, images.dtype), BLOCK_C=block_c, BLOCK_P=block_p,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def aot_cases() -> Iterable[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case for :mod:`mvlm_kernels.aot`, on meta tensors at the paper's shapes."""
    ids = torch.empty(64, 116, dtype=torch.int32, device="meta")
    values = torch.empty(3, device="meta")

    def both(images: Tensor, dtype: torch.dtype, patch_size: int) -> None:
        gather_patches(images, ids, patch_size, values, values, dtype)
        if images.dtype != torch.uint8:
            grad = torch.empty(64, 116, 3 * patch_size**2, dtype=dtype, device="meta")
            gather_patches_backward(grad, images, ids, patch_size, values)

    for name, images_dtype, dtype in (
        ("uint8-bf16", torch.uint8, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("fp32", torch.float32, torch.float32),
    ):
        for patch_size in (14, 16, 32) if name == "uint8-bf16" else (16,):
            images = torch.empty(64, 3, 224, 224, dtype=images_dtype, device="meta")
            yield f"{name}/p{patch_size}", partial(both, images, dtype, patch_size)
    images = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    yield "bf16/p16/channels-last", partial(both, images, torch.bfloat16, 16)
