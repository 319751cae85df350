"""``attn_implementation="sdpa_mvlm"`` for the models of `transformers` that set ``_supports_sdpa``.

    from mvlm_kernels.integrations.transformers import register
    register()
    model = BertModel.from_pretrained(name, attn_implementation="sdpa_mvlm")

The name must contain "sdpa". transformers then refuses models that do not support the attention interface. With any
other name it accepts them, and they silently ignore the mask.

Plain key padding takes :func:`mvlm_kernels.cross_attention`. Everything that the op does not compute goes to
transformers' own SDPA attention: causal masks, masks that differ between queries or heads, dropout in training, grouped
heads, position biases, sliding windows, and head widths other than 32, 64, 80, 96 and 128. Logit soft-capping and
attention sinks, which SDPA does not compute either, raise a ValueError. One difference from SDPA: a query without any
key gives zeros.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention.arguments import HEAD_WIDTHS

NAME = "sdpa_mvlm"


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` known to transformers; may be called again.

    Needs a transformers that passes ``q_length`` to mask functions (tested with 5.24). Raises ValueError for a name
    without "sdpa", see the module.
    """
    if "sdpa" not in name:
        raise ValueError(
            f'name must contain "sdpa", got {name!r}: with any other name transformers does not check that a model has '
            "an attention interface, and models without one give wrong results"
        )
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Attention mask in the form of transformers' ``sdpa_mask``: bool (batch, 1, queries, keys), True = attend.

    For plain key padding, ``attention_mask`` (batch, keys), the result is an expanded view of the padding, which takes
    no memory and by which :func:`attention` recognises it. None where there is no padding and the model allows None.
    """
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

    mask_function = mask_function or causal_mask_function
    if mask_function is not bidirectional_mask_function or use_vmap:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            use_vmap=use_vmap,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **kwargs,
        )
    if attention_mask is not None:
        exists = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        if exists.shape[1] < kv_length:  # a static KV cache is longer than the tokens written so far
            exists = torch.nn.functional.pad(exists, (0, kv_length - exists.shape[1]))
    elif allow_is_bidirectional_skip:
        return None
    else:  # some models combine masks, so they need one even if every key exists
        exists = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    return exists[:, None, None, :].expand(-1, 1, q_length, -1)


def _key_padding(attention_mask: Tensor, query: Tensor, key: Tensor) -> Tensor | None:
    """The (batch, keys) padding of a (batch, 1, queries, keys) mask whose queries all see the same keys, else None."""
    batch, keys = query.shape[0], key.shape[2]
    if attention_mask.dtype != torch.bool or attention_mask.shape[:2] != (batch, 1) or attention_mask.shape[3] != keys:
        return None
    # A stride of 0 shows that all queries see the same keys. Reading the mask on a GPU would wait for the device.
    if attention_mask.shape[2] != 1 and attention_mask.stride(2) != 0:
        return None
    return attention_mask[:, 0, 0]


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
    """transformers' attention signature: query (B, H, Lq, D), key and value (B, H, Lk, D) -> ((B, Lq, H, D), None).

    attention_mask: (B, 1 or H, Lq, Lk), bool with True = attend, or floating and added to the scores. Raises ValueError
    for a mask of another rank, and for ``softcap`` and ``s_aux`` (attention sinks), which change the scores.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name} must be None, got {type(kwargs[name]).__name__}: {NAME} attention does not compute it; "
                'use attn_implementation="eager"'
            )
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask must have shape (batch, heads or 1, queries, keys), got {tuple(attention_mask.shape)}"
        )
    padding = None if attention_mask is None else _key_padding(attention_mask, query, key)
    # As in transformers: without a mask the module's flag decides, and a single query sees every key.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = (
        (attention_mask is None or padding is not None)
        and not dropout
        and position_bias is None
        and kwargs.get("sliding_window") is None
        and not (causal and attention_mask is None and query.shape[2] > 1)
        and query.shape[1] == key.shape[1]
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in HEAD_WIDTHS
    )
    if plain:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D), no copy
        return cross_attention(q, k, v, key_mask=padding, scale=scaling), None
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
