# pyright: reportArgumentType=false
"""Triton kernels of ``place_tokens`` and their launchers.

One program owns one position of the sequence and a slice of the width, and loops over the batch. It reads the
position's embedding once. It sums the gradient of the embedding, and that of the mask token at this position, in
registers in the order of the batch, without atomics and without partial sums of the size of the tokens.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.gather_patches.triton import accumulator, reader_lists
from mvlm_kernels.language import cast, widen
from mvlm_kernels.place_tokens.reference import output_dtype

BLOCK_B, BLOCK_C, WARPS = 16, 128, 4


@triton.jit
def token_of(masked_ptr, table_ptr, b, n, limit, table_width, stride_mb, stride_mn, MODE: tl.constexpr):
    """Index of the token at patch n for batch rows b; -1 for the mask token, and for b >= limit."""
    if MODE == "visible":
        source = tl.load(table_ptr + b * table_width + n, mask=b < limit, other=-1)
    elif MODE == "masked":
        masked = tl.load(masked_ptr + b * stride_mb + n * stride_mn, mask=b < limit, other=1)
        source = tl.where(masked != 0, -1, n.to(tl.int32))
    else:
        source = tl.where(b < limit, n.to(tl.int32), -1)
    return source.to(tl.int64)


@triton.jit
def place_kernel(
    tokens_ptr, mask_token_ptr, pos_embed_ptr, cls_token_ptr, masked_ptr, table_ptr, out_ptr,
    B, N, C, table_width,
    stride_tb, stride_tk, stride_tc, stride_m, stride_pn, stride_pc, stride_c, stride_mb, stride_mn,
    MODE: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (B, 1+N, C), contiguous. Program (position, width slice); position 0 is [CLS], position 1+n is patch n.

    table (B, N+K): reader lists of the visible patches, see ``reader_lists_kernel`` in gather_patches. Only the first
    entries of the lists are read.
    """
    position = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    embedding = widen(tl.load(pos_embed_ptr + position * stride_pn + c * stride_pc, mask=c < C, other=0.0), ACC)
    if position == 0:
        fill = widen(tl.load(cls_token_ptr + c * stride_c, mask=c < C, other=0.0), ACC)
    elif MODE == "all":
        fill = tl.zeros((BLOCK_C,), ACC)
    else:
        fill = widen(tl.load(mask_token_ptr + c * stride_m, mask=c < C, other=0.0), ACC)
    # [CLS] has no patch. With a limit of 0 rows every source is -1 there, so the fill, the [CLS] token, is stored.
    limit = tl.where(position > 0, B, 0)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        source = token_of(masked_ptr, table_ptr, b, position - 1, limit, table_width, stride_mb, stride_mn, MODE)
        keep = (source >= 0)[:, None]
        token_offsets = (b * stride_tb + source * stride_tk)[:, None] + (c * stride_tc)[None, :]
        x = widen(tl.load(tokens_ptr + token_offsets, mask=keep & (c < C)[None, :], other=0.0), ACC)
        y = tl.where(keep, x, fill[None, :]) + embedding[None, :]
        out_offsets = ((b * (N + 1) + position) * C)[:, None] + c[None, :]
        tl.store(out_ptr + out_offsets, cast(y, out_ptr.dtype.element_ty), mask=(b < B)[:, None] & (c < C)[None, :])


@triton.jit
def place_backward_kernel(
    grad_ptr, masked_ptr, table_ptr, tokens_grad_ptr, mask_partial_ptr, pos_grad_ptr, cls_grad_ptr,
    B, N, C, T, table_width, stride_gb, stride_gn, stride_gc, stride_mb, stride_mn,
    MODE: tl.constexpr, NEEDS_TOKENS: tl.constexpr, NEEDS_MASK: tl.constexpr, NEEDS_POS: tl.constexpr,
    NEEDS_CLS: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients from grad (B, 1+N, C). Program (position, width slice) reads its column of grad once.

    Writes tokens_grad (B, T, C), with T = N or the number of visible patches, pos_grad (1+N, C), cls_grad (C,), and
    mask_partial (N, C), the part of the mask token's gradient that comes from each patch.
    """
    position = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    total = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    of_mask = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    limit = tl.where(position > 0, B, 0)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        inside = (b < B)[:, None] & (c < C)[None, :]
        grad_offsets = (b * stride_gb + position * stride_gn)[:, None] + (c * stride_gc)[None, :]
        g = widen(tl.load(grad_ptr + grad_offsets, mask=inside, other=0.0), ACC)
        total += g
        source = token_of(masked_ptr, table_ptr, b, position - 1, limit, table_width, stride_mb, stride_mn, MODE)
        keep = (source >= 0)[:, None]
        of_mask += tl.where(keep, 0.0, g)  # where and not a product: a kept position's gradient may be NaN
        if NEEDS_TOKENS:
            if MODE == "visible":
                row = source
                written = inside & keep
            else:
                row = position - 1
                written = inside & (b < limit)[:, None]
            token_offsets = ((b * T + row) * C)[:, None] + c[None, :]
            token_grad = cast(tl.where(keep, g, 0.0), tokens_grad_ptr.dtype.element_ty)
            tl.store(tokens_grad_ptr + token_offsets, token_grad, mask=written)
    summed = tl.sum(total, axis=0)
    if NEEDS_POS:
        tl.store(pos_grad_ptr + position * C + c, cast(summed, pos_grad_ptr.dtype.element_ty), mask=c < C)
    if position == 0:
        if NEEDS_CLS:
            tl.store(cls_grad_ptr + c, cast(summed, cls_grad_ptr.dtype.element_ty), mask=c < C)
    elif NEEDS_MASK:
        tl.store(mask_partial_ptr + (position - 1) * C + c, tl.sum(of_mask, axis=0), mask=c < C)


@triton.jit
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


def _mode(masked: Tensor | None, visible_ids: Tensor | None) -> str:
    return "visible" if visible_ids is not None else "all" if masked is None else "masked"


def place_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    masked: Tensor | None,
    visible_ids: Tensor | None,
) -> Tensor:
    """Output (B, 1+N, C), contiguous, for tokens (B, N, C) or (B, K, C) of any strides."""
    batch, _, width = tokens.shape
    num_patches = pos_embed.shape[0] - 1
    dtype = output_dtype(tokens, mask_token, pos_embed, cls_token)
    out = tokens.new_empty(batch, num_patches + 1, width, dtype=dtype)
    # Ids are distinct, so each list has at most one entry: the index of the patch's token.
    table = None if visible_ids is None else reader_lists(visible_ids, num_patches)
    dispatch.launch(
        place_kernel, (num_patches + 1, ceil_div(width, BLOCK_C)),
        tokens, mask_token, pos_embed, cls_token, masked, table, out,
        batch, num_patches, width, table.shape[1] if table is not None else 0,
        *tokens.stride(), mask_token.stride(0), *pos_embed.stride(), cls_token.stride(0),
        *(masked.stride() if masked is not None else (0, 0)),
        MODE=_mode(masked, visible_ids), ACC=accumulator(dtype), BLOCK_B=BLOCK_B, BLOCK_C=BLOCK_C,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def place_tokens_backward(
    grad: Tensor,
    masked: Tensor | None,
    visible_ids: Tensor | None,
    num_tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, mask_token, pos_embed and cls_token, see :func:`.reference.place_tokens_backward`.

    grad: (B, 1+N, C), of any strides.
    """
    batch, positions, width = grad.shape
    num_patches = positions - 1
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    tokens_grad = grad.new_empty((batch, num_tokens, width) if needs[0] else (0,), dtype=dtypes[0])
    mask_grad = grad.new_empty(width if needs[1] else 0, dtype=dtypes[1])
    pos_grad = grad.new_empty((positions, width) if needs[2] else (0,), dtype=dtypes[2])
    cls_grad = grad.new_empty(width if needs[3] else 0, dtype=dtypes[3])
    mask_partial = grad.new_empty((num_patches, width) if needs[1] else (0,), dtype=wide)
    table = None if visible_ids is None else reader_lists(visible_ids, num_patches)
    dispatch.launch(
        place_backward_kernel, (positions, ceil_div(width, BLOCK_C)),
        grad, masked, table, tokens_grad, mask_partial, pos_grad, cls_grad,
        batch, num_patches, width, num_tokens, table.shape[1] if table is not None else 0, *grad.stride(),
        *(masked.stride() if masked is not None else (0, 0)),
        MODE=_mode(masked, visible_ids), NEEDS_TOKENS=needs[0], NEEDS_MASK=needs[1], NEEDS_POS=needs[2],
        NEEDS_CLS=needs[3], ACC=accumulator(wide), BLOCK_B=BLOCK_B, BLOCK_C=BLOCK_C,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if needs[1]:
        dispatch.launch(
            column_sum_kernel, (ceil_div(width, 32),), mask_partial, mask_grad, num_patches, width,
            ACC=accumulator(wide), BLOCK_N=64, BLOCK_C=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return tokens_grad, mask_grad, pos_grad, cls_grad


def aot_cases() -> Iterable[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case for :mod:`mvlm_kernels.aot`, on meta tensors at the paper's shapes."""

    def both(mode: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
        count = 49 if mode == "visible" else 196
        tokens = torch.empty(64, count, 768, dtype=dtype, device="meta")
        token = torch.empty(768, dtype=parameter_dtype, device="meta")
        positions = torch.empty(197, 768, dtype=parameter_dtype, device="meta")
        masked = torch.empty(64, 196, dtype=torch.bool, device="meta") if mode == "masked" else None
        ids = torch.empty(64, 49, dtype=torch.int32, device="meta") if mode == "visible" else None
        out = place_tokens(tokens, token, positions, token, masked, ids)
        place_tokens_backward(out, masked, ids, count, (dtype, *(parameter_dtype,) * 3), (True,) * 4)

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        yield f"{name}/masked", partial(both, "masked", dtype, dtype)
    for mode in ("all", "visible"):
        yield f"bf16/{mode}", partial(both, mode, torch.bfloat16, torch.bfloat16)
    yield "bf16/masked/fp32-parameters", partial(both, "masked", torch.bfloat16, torch.float32)
