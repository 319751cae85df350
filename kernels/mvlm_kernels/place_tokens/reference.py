"""Specification of ``place_tokens`` in plain torch, and its implementation on a GPU without the kernels.

Legend: B batch, N patches, K visible patches, C width. ``masked`` (B, N): True = replaced by the mask token.
"""

import torch
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype


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
    both: bool = False,
) -> Tensor:
    """[CLS], then each patch's token or the mask token, plus the position embeddings: (B, 1+N, C).

    both: (2B, 1+N, C), the sequences without masks in front of those with them.

    tokens (B, N, C), or (B, K, C) with visible_ids (B, K); mask_token and cls_token (C,); pos_embed (1+N, C).
    """
    parameters = mask_token, pos_embed, cls_token
    if both:
        return torch.cat([place_tokens(tokens, *parameters, m, None, False) for m in (None, masked)])
    dtype = output_dtype(tokens, *parameters)
    wide = compute_dtype(dtype)
    batch, num_patches = tokens.shape[0], pos_embed.shape[0] - 1
    patches, mask, positions = tokens.to(wide), mask_token.to(wide), pos_embed.to(wide)
    if visible_ids is not None:
        index = visible_ids.long()[:, :, None].expand_as(patches)
        patches = mask.expand(batch, num_patches, -1).scatter(1, index, patches)  # (B, N, C)
    elif masked is not None:
        patches = torch.where(masked[:, :, None], mask, patches)
    first = (cls_token.to(wide) + positions[0]).expand(batch, 1, -1)
    return torch.cat([first, patches + positions[1:]], dim=1).to(dtype)  # (B, 1+N, C)


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
    if both:
        wide = compute_dtype(grad.dtype)
        wide_types = (wide, wide, wide, wide)
        unmasked, others = (
            place_tokens_backward(g, m, None, False, num_tokens, wide_types, needs)
            for g, m in zip(grad.chunk(2), (None, masked), strict=True)
        )
        first, second, third, fourth = ((a + b).to(dtype) for a, b, dtype in zip(unmasked, others, dtypes, strict=True))
        return first, second, third, fourth
    wide = compute_dtype(grad.dtype)
    patches = grad[:, 1:].to(wide)  # (B, N, C)
    zero = patches.new_zeros(())
    token_grad = mask_grad = positions = None
    index = None if visible_ids is None else visible_ids.long()[:, :, None].expand(-1, -1, patches.shape[2])
    if needs[0]:
        if index is not None:
            token_grad = patches.gather(1, index)  # (B, K, C)
        else:
            token_grad = patches.where(~masked[:, :, None], zero) if masked is not None else patches.clone()
        assert token_grad.shape[1] == num_tokens
    if needs[1]:
        if index is not None:
            mask_grad = patches.scatter(1, index, 0.0).sum(dim=(0, 1))
        elif masked is not None:
            mask_grad = patches.where(masked[:, :, None], zero).sum(dim=(0, 1))
        else:
            mask_grad = patches.new_zeros(patches.shape[2])
    if needs[2] or needs[3]:
        positions = grad.sum(dim=0, dtype=wide)  # (1+N, C)
    grads = token_grad, mask_grad, positions, None if positions is None else positions[0].clone()
    first, second, third, fourth = (
        g.to(dtype).contiguous() if need and g is not None else grad.new_empty(0, dtype=dtype)
        for g, dtype, need in zip(grads, dtypes, needs, strict=True)
    )
    return first, second, third, fourth
