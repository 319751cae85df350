"""Cross-attention for any model of `transformers` that takes an ``attn_implementation``.

    from mvlm_kernels.integrations.transformers import register
    register()
    model = BertModel.from_pretrained(name, attn_implementation="mvlm")

Key padding reaches the kernel as it is, (batch, keys); it is never expanded to (batch, 1, queries, keys). What the op
does not compute goes to transformers' own SDPA attention: causal masks, ready-made 4D masks, dropout in training,
grouped heads, position biases, widths other than 32, 64, 80, 96, 128. One difference from SDPA: a query without any key
gives zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention.bounds import HEAD_WIDTHS

NAME = "mvlm"


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` known to transformers (4.56 or later); may be called again."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def mask(
    *args: Any,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that :func:`attention` gets: for plain key padding the padding itself, (batch, keys), True = the key
    exists (None where there is none); for anything else what SDPA would get, (batch, 1, queries, keys).
    """
    from transformers.masking_utils import bidirectional_mask_function, sdpa_mask

    if mask_function is bidirectional_mask_function and not use_vmap:
        return None if attention_mask is None else attention_mask[:, -kv_length:].bool()
    return sdpa_mask(
        *args,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        use_vmap=use_vmap,
        **kwargs,
    )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (B, H, Lq, D), key and value (B, H, Lk, D) -> ((B, Lq, H, D), None)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    padding = attention_mask is None or attention_mask.dim() == 2
    # As in transformers: without a mask the module's flag decides, and a single query sees every key.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = (
        padding
        and not dropout
        and position_bias is None
        and not (causal and attention_mask is None and query.shape[2] > 1)
        and query.shape[1] == key.shape[1]
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in HEAD_WIDTHS
    )
    if plain:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D), no copy
        return cross_attention(q, k, v, key_mask=attention_mask, scale=scaling), None
    if padding and attention_mask is not None:
        attention_mask = attention_mask[:, None, None, :].expand(
            -1, 1, query.shape[2], -1
        )  # True = attend, as SDPA reads it
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        position_bias=position_bias,
        **kwargs,
    )
