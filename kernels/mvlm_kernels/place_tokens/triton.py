# pyright: reportArgumentType=false
"""Triton kernels of ``place_tokens`` and their launchers.

One program owns one position of the sequence and a slice of the width, and loops over the batch. It reads the
position's embedding once. It sums the gradient of the embedding, and that of the mask token at this position, in
registers in the order of the batch, without atomics and without partial sums of the size of the tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.dispatch import ceil_div
from mvlm_kernels.language import accumulator, cast, sum_columns, widen
from mvlm_kernels.place_tokens.reference import output_dtype

# Rows of the batch at a time. Backward keeps two sums, and a forward of both halves two outputs, in registers. With few
# rows all programs of a sequence of 197 positions and width 768 run at once on an H100.
ROWS, FEW_ROWS, BLOCK_C, WARPS = 16, 8, 128, 4


@triton.jit(do_not_specialize=["K", "N", "stride_kb", "stride_kk", "stride_tb", "stride_tq"])
def reader_lists_kernel(
    ids_ptr, table_ptr, K, N, stride_kb, stride_kk, stride_tb, stride_tq, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
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
    tl.store(table_ptr + b * stride_tb + q.to(tl.int64) * stride_tq, first, mask=q < N + K)


@triton.jit
def token_of(source_ptr, b, n, B, limit, MODE: tl.constexpr):
    """Index of the token at patch n for batch rows b; -1 for the mask token, and for b >= limit.

    source is (N, B): the rows of one patch are neighbours. In mode "visible" it is int32, the first entries of
    ``reader_lists``; in modes "masked" and "both" bool, True = masked; in mode "all" None.
    """
    if MODE == "visible":
        source = tl.load(source_ptr + n * B + b, mask=b < limit, other=-1)
    elif MODE == "all":
        source = tl.where(b < limit, n.to(tl.int32), -1)
    else:
        masked = tl.load(source_ptr + n * B + b, mask=b < limit, other=1)
        source = tl.where(masked != 0, -1, n.to(tl.int32))
    return source.to(tl.int64)


@triton.jit(do_not_specialize=["B"])
def place_kernel(
    out_ptr, tokens, mask_token, pos_embed, cls_token, source_ptr, B, N, C,
    MODE: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out (B, 1+N, C), contiguous; in mode "both" (2B, 1+N, C), first without masks and then with them.

    Program (position, width slice); position 0 is [CLS], position 1+n is patch n. The four tensors are (pointer,
    *strides). source: see :func:`token_of`.
    """
    position = tl.program_id(0).to(tl.int64)
    c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    embedding_ptrs = pos_embed[0] + position * pos_embed[1] + c * pos_embed[2]
    embedding = widen(tl.load(embedding_ptrs, mask=c < C, other=0.0), ACC)
    if position == 0:
        fill = widen(tl.load(cls_token[0] + c * cls_token[1], mask=c < C, other=0.0), ACC)
    elif MODE == "all":
        fill = tl.zeros((BLOCK_C,), ACC)
    else:
        fill = widen(tl.load(mask_token[0] + c * mask_token[1], mask=c < C, other=0.0), ACC)
    # [CLS] has no patch. With a limit of 0 rows every source is -1 there, so the fill, the [CLS] token, is stored.
    limit = tl.where(position > 0, B, 0)
    for start in range(0, B, BLOCK_B):
        b = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        source = token_of(source_ptr, b, position - 1, B, limit, MODE)
        keep = (source >= 0)[:, None]
        row = source
        read = keep
        if MODE == "both":
            row = tl.zeros_like(source) + position - 1
            read = (b < limit)[:, None]
        token_offsets = (b * tokens[1] + row * tokens[2])[:, None] + (c * tokens[3])[None, :]
        x = widen(tl.load(tokens[0] + token_offsets, mask=read & (c < C)[None, :], other=0.0), ACC)
        inside = (b < B)[:, None] & (c < C)[None, :]
        out_ptrs = out_ptr + ((b * (N + 1) + position) * C)[:, None] + c[None, :]
        if MODE == "both":
            y = tl.where(read, x, fill[None, :]) + embedding[None, :]
            tl.store(out_ptrs, cast(y, out_ptr.dtype.element_ty), mask=inside)
            out_ptrs += B.to(tl.int64) * (N + 1) * C
        y = tl.where(keep, x, fill[None, :]) + embedding[None, :]
        tl.store(out_ptrs, cast(y, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B", "T"])
def place_backward_kernel(
    tokens_grad_ptr, mask_partial_ptr, pos_grad_ptr, cls_grad_ptr, grad, source_ptr, B, N, C, T,
    MODE: tl.constexpr, NEEDS_TOKENS: tl.constexpr, NEEDS_MASK: tl.constexpr, NEEDS_POS: tl.constexpr,
    NEEDS_CLS: tl.constexpr, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients from grad = (pointer, *strides), of out's shape. Program (position, width slice) reads it once.

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
        grad_ptrs = grad[0] + (b * grad[1] + position * grad[2])[:, None] + (c * grad[3])[None, :]
        if MODE == "both":
            unmasked = widen(tl.load(grad_ptrs, mask=inside, other=0.0), ACC)
            grad_ptrs += B.to(tl.int64) * grad[1]
        g = widen(tl.load(grad_ptrs, mask=inside, other=0.0), ACC)
        total += g
        source = token_of(source_ptr, b, position - 1, B, limit, MODE)
        keep = (source >= 0)[:, None]
        of_mask += tl.where(keep, 0.0, g)  # where and not a product: a kept position's gradient may be NaN
        of_token = tl.where(keep, g, 0.0)
        if MODE == "both":
            total += unmasked
            of_token += unmasked
        if NEEDS_TOKENS:
            if MODE == "visible":
                row = source
                written = inside & keep
            else:
                row = position - 1
                written = inside & (b < limit)[:, None]
            token_offsets = ((b * T + row) * C)[:, None] + c[None, :]
            tl.store(tokens_grad_ptr + token_offsets, cast(of_token, tokens_grad_ptr.dtype.element_ty), mask=written)
    summed = tl.sum(total, axis=0)
    if NEEDS_POS:
        tl.store(pos_grad_ptr + position * C + c, cast(summed, pos_grad_ptr.dtype.element_ty), mask=c < C)
    if position == 0:
        if NEEDS_CLS:
            tl.store(cls_grad_ptr + c, cast(summed, cls_grad_ptr.dtype.element_ty), mask=c < C)
    elif NEEDS_MASK:
        tl.store(mask_partial_ptr + (position - 1) * C + c, tl.sum(of_mask, axis=0), mask=c < C)


def reader_lists(patch_ids: Tensor, num_patches: int) -> Tensor:
    """Readers of each patch as linked lists, (B, N+K) int32 with B in memory last; see :func:`reader_lists_kernel`.

    patch_ids: (B, K).
    """
    batch, chosen = patch_ids.shape
    table = patch_ids.new_empty(num_patches + chosen, batch, dtype=torch.int32).t()
    dispatch.launch(
        reader_lists_kernel, (batch, ceil_div(num_patches + chosen, 64)),
        patch_ids, table, chosen, num_patches, *patch_ids.stride(), *table.stride(),
        BLOCK_Q=64, BLOCK_K=64, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return table


def _source(
    masked: Tensor | None, visible_ids: Tensor | None, num_patches: int, both: bool
) -> tuple[str, Tensor | None]:
    """Mode of the kernels, "visible", "all", "both" or "masked" tokens, and the tensor by which they find a token.

    It is the index of the token of each patch for "visible", and the mask with the batch last for "both" and "masked".
    A mask that has this layout in memory is not copied.
    """
    if visible_ids is not None:
        # Ids are distinct, so each list has at most one entry: the index of the patch's token.
        return "visible", reader_lists(visible_ids, num_patches)
    if masked is None:
        return "all", None
    return "both" if both else "masked", masked.t().contiguous()


def place_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    masked: Tensor | None,
    visible_ids: Tensor | None,
    both: bool,
) -> Tensor:
    """Output (B, 1+N, C), or (2B, 1+N, C) for both, contiguous, for tokens (B, N, C) or (B, K, C) of any strides."""
    batch, _, width = tokens.shape
    num_patches = pos_embed.shape[0] - 1
    dtype = output_dtype(tokens, mask_token, pos_embed, cls_token)
    out = tokens.new_empty(2 * batch if both else batch, num_patches + 1, width, dtype=dtype)
    mode, source = _source(masked, visible_ids, num_patches, both)
    dispatch.launch(
        place_kernel, (num_patches + 1, ceil_div(width, BLOCK_C)), out,
        (tokens, *tokens.stride()), (mask_token, mask_token.stride(0)), (pos_embed, *pos_embed.stride()),
        (cls_token, cls_token.stride(0)), source, batch, num_patches, width,
        MODE=mode, ACC=accumulator(dtype), BLOCK_B=FEW_ROWS if both else ROWS, BLOCK_C=BLOCK_C,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def place_tokens_backward(
    grad: Tensor,
    masked: Tensor | None,
    visible_ids: Tensor | None,
    both: bool,
    num_tokens: int,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of tokens, mask_token, pos_embed and cls_token, see :func:`.reference.place_tokens_backward`.

    grad: of the output's shape and any strides.
    """
    sequences, positions, width = grad.shape
    batch, num_patches = sequences // 2 if both else sequences, positions - 1
    wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
    tokens_grad = grad.new_empty((batch, num_tokens, width) if needs[0] else (0,), dtype=dtypes[0])
    mask_grad = grad.new_empty(width if needs[1] else 0, dtype=dtypes[1])
    pos_grad = grad.new_empty((positions, width) if needs[2] else (0,), dtype=dtypes[2])
    cls_grad = grad.new_empty(width if needs[3] else 0, dtype=dtypes[3])
    mask_partial = grad.new_empty((num_patches, width) if needs[1] else (0,), dtype=wide)
    mode, source = _source(masked, visible_ids, num_patches, both)
    dispatch.launch(
        place_backward_kernel, (positions, ceil_div(width, BLOCK_C)),
        tokens_grad, mask_partial, pos_grad, cls_grad, (grad, *grad.stride()), source,
        batch, num_patches, width, num_tokens,
        MODE=mode, NEEDS_TOKENS=needs[0], NEEDS_MASK=needs[1], NEEDS_POS=needs[2],
        NEEDS_CLS=needs[3], ACC=accumulator(wide), BLOCK_B=FEW_ROWS, BLOCK_C=BLOCK_C,
        num_warps=WARPS, enable_fp_fusion=True,
    )  # fmt: skip
    if needs[1]:
        sum_columns(mask_partial, mask_grad, num_patches, width)
    return tokens_grad, mask_grad, pos_grad, cls_grad
