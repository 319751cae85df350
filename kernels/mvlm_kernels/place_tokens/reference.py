"""``place_tokens`` and its gradient in torch ops, where no kernel runs.

Legend: B batch, N patches, K visible patches, C width. ``masked`` (B, N): True = replaced by the mask token.
Three things are slow on a CPU and avoided here:

- Fresh memory: almost no temporaries are made.
- float32 copies of 16-bit tensors: torch's ``+`` and ``sum`` of 16-bit operands compute in float32 and round once.
- ``where``, ``gather`` and ``scatter``, which handle one element at a time: values move by rows, or by vectorised
  operations on their bits.
"""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def output_dtype(tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor) -> torch.dtype:
    """The dtype that torch promotes the four tensors to: float32 for bfloat16 tokens with float32 parameters."""
    dtype = tokens.dtype
    for other in (mask_token, pos_embed, cls_token):
        dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def place_tokens(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    masked: Tensor | None,
    visible_ids: Tensor | None,
    both: bool,
) -> Tensor:
    """[CLS], then each patch's token or the mask token, plus the position embeddings: (B, 1+N, C).

    both: (2B, 1+N, C), the sequences without masks in front of those with them.

    tokens (B, N, C), or (B, K, C) with visible_ids (B, K); mask_token and cls_token (C,); pos_embed (1+N, C).
    """
    dtype = output_dtype(tokens, mask_token, pos_embed, cls_token)
    batch, _, width = tokens.shape
    positions = pos_embed.to(dtype)
    out = tokens.new_empty(batch * (2 if both else 1), positions.shape[0], width, dtype=dtype)
    out[:, 0] = cls_token.to(dtype) + positions[0]
    patches, without_token = out[:, 1:], mask_token.to(dtype) + positions[1:]
    if visible_ids is not None:
        patches.copy_(without_token.expand_as(patches))
        placed = tokens.flatten(0, 1) + positions.index_select(0, visible_ids.flatten() + 1)
        out.flatten(0, 1).index_put_((_rows_of(visible_ids, out.shape[1]),), placed)
        return out
    torch.add(tokens, positions[1:], out=patches[:batch])
    if both:
        patches[batch:] = patches[:batch]
        patches = patches[batch:]
    if masked is not None:
        bits, other = patches.view(_INTEGERS[dtype.itemsize]), without_token.view(_INTEGERS[dtype.itemsize])
        # A select by bits: ((x ^ other) & kept) ^ other is x if kept has all bits set, and other if it has none.
        bits.bitwise_xor_(other).bitwise_and_(_kept_bits(masked, bits.dtype)).bitwise_xor_(other)
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
    """Gradients of tokens (B, num_tokens, C), mask_token (C,), pos_embed (1+N, C) and cls_token (C,), in ``dtypes``.

    grad: of the output's shape. needs: four booleans. A gradient that is not needed is an empty tensor.
    """
    # The halves of both are summed apart, in a wide type, so that their sum rounds once.
    unmasked, wide = None, compute_dtype(grad.dtype) if both else grad.dtype
    if both:
        unmasked, grad = grad.chunk(2)
    batch, length, width = grad.shape
    rows = grad.flatten(0, 1)
    token_grad = mask_grad = pos_grad = cls_grad = None
    if needs[0]:
        if visible_ids is not None:
            token_grad = rows.index_select(0, _rows_of(visible_ids, length)).view(batch, num_tokens, width)
        else:
            token_grad = grad[:, 1:].clone() if masked is None else _zero_where(masked, grad[:, 1:])
        if unmasked is not None:
            token_grad += unmasked[:, 1:]
    if needs[1]:
        filled = masked
        if visible_ids is not None:
            filled = visible_ids.new_ones(batch, length - 1, dtype=torch.bool).scatter_(1, visible_ids.long(), False)
        if filled is None:
            mask_grad = grad.new_zeros(width)
        elif grad.device.type == "cpu":
            b, n = filled.nonzero().unbind(1)
            mask_grad = rows.index_select(0, b * length + 1 + n).sum(0)
        else:  # where counting the masked patches would wait for the device
            mask_grad = _sum_where(filled, grad[:, 1:])
    if needs[2]:
        pos_grad = grad.sum(0, dtype=wide)
        if unmasked is not None:
            pos_grad += unmasked.sum(0, dtype=wide)
    if needs[3]:
        cls_grad = grad[:, 0].sum(0, dtype=wide) if pos_grad is None else pos_grad[0].clone()
        if unmasked is not None and pos_grad is None:
            cls_grad += unmasked[:, 0].sum(0, dtype=wide)
    first, second, third, fourth = (
        grad.new_empty(0, dtype=dtype) if g is None else g.to(dtype).contiguous()
        for g, dtype in zip((token_grad, mask_grad, pos_grad, cls_grad), dtypes, strict=True)
    )
    return first, second, third, fourth


def _rows_of(visible_ids: Tensor, length: int) -> Tensor:
    """Rows (B * K,) of the visible patches among the B * length rows of all sequences."""
    begin = torch.arange(visible_ids.shape[0], device=visible_ids.device) * length + 1
    return (visible_ids + begin[:, None]).flatten()


def _kept_bits(masked: Tensor, integer: torch.dtype) -> Tensor:
    """(B, N, 1): all bits set for tokens that stay, no bit for masked ones. A product with 0 would keep a NaN."""
    return (masked.to(integer) - 1)[:, :, None]


def _zero_where(masked: Tensor, x: Tensor) -> Tensor:
    """x (B, N, C) with zeros where masked (B, N) is True."""
    integer = _INTEGERS[x.dtype.itemsize]
    return (x.view(integer) & _kept_bits(masked, integer)).view(x.dtype)


def _sum_where(masked: Tensor, x: Tensor) -> Tensor:
    """Sum (C,) of the rows of x (B, N, C) where masked (B, N) is True."""
    return _zero_where(~masked, x).sum((0, 1))
