"""Attention of `transformers` models by :func:`mvlm_kernels.cross_attention`: ``attn_implementation="sdpa_mvlm"``.

    from mvlm_kernels.integrations.transformers import register, swap
    print(swap(model))                      # a model that exists: swaps what can be swapped, and says what not and why
    register()                              # or by name, for a model that is loaded
    model = BertModel.from_pretrained(name, attn_implementation="sdpa_mvlm")

The name must contain "sdpa". transformers then refuses models that do not support the attention interface. With any
other name it accepts them, and they silently ignore the mask.

Calls without a mask, or with plain key padding, take :func:`mvlm_kernels.cross_attention`, if a kernel runs them.
Everything else that transformers' SDPA attention computes goes there: :func:`why_not_fused` lists the reasons, and
`recorded_calls` (``integrations.calls``) shows them for the calls of a model. What neither computes raises a ValueError
that names the argument. One difference from SDPA: a query without any key gives zeros.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.dispatch import Refusal, refusal
from mvlm_kernels.integrations.calls import (
    ALREADY_SWAPPED,
    ELSEWHERE,
    Part,
    SwapReport,
    kernel_reasons,
    listening,
    note,
    record,
    recording,
)
from mvlm_kernels.integrations.classes import in_torchscript

NAME = "sdpa_mvlm"

_WITHOUT_EFFECT = {
    "cache_position",
    "deterministic",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}
"""Arguments that change no attention output: the mask holds their meaning, or they concern other code."""


def swap(model: torch.nn.Module, name: str = NAME) -> SwapReport:
    """Set ``attn_implementation=name`` in every part of a transformers model that supports it.

    A part is a ``PreTrainedModel`` with a configuration of its own, such as the vision tower of CLIP. The others keep
    their implementation, with the reason in the report. The state dict does not change.
    """
    from transformers import AttentionInterface

    register(name)
    known, parts, before = AttentionInterface(), [], []
    for path, config, owners in configs_of(model):
        reason = next((found for found in (why_not_swapped(owner, name) for owner in owners) if found), None)
        if reason is None and known.get(config._attn_implementation_internal) is attention:
            reason = ALREADY_SWAPPED
        parts.append(Part(path, type(owners[0]).__name__, reason))
        if reason is None:
            before.append((config, config._attn_implementation_internal))
            config._attn_implementation_internal = name  # the public setter would change the parts below as well

    def restore() -> None:
        for config, implementation in before:
            if config._attn_implementation_internal == name:  # else another was chosen after the swap
                config._attn_implementation_internal = implementation

    return SwapReport(parts, restore, model)


_NAMES_SDPA = re.compile(r"_attn_implementation\w*\s*(?:==|!=|in|not in)\s*[^\n]*[\"']sdpa[\"']")


@dispatch.constant_when_compiled
def names_sdpa(module_name: str) -> bool:
    """True if the code of a modelling module compares the implementation's name with "sdpa".

    Such a model builds its masks by that name (sparse indices of DeepSeek-V3.2, cut queries of Gemma 4). Under another
    name it would leave them out, without an error.
    """
    if module_name not in _found:
        module = sys.modules.get(module_name)
        try:
            source = inspect.getsource(module) if module is not None else ""
        except (OSError, TypeError):  # no source, as in a notebook
            source = ""
        _found[module_name] = _NAMES_SDPA.search(source) is not None
    return _found[module_name]


_found: dict[str, bool] = {}


def configs_of(model: torch.nn.Module) -> Iterator[tuple[str, Any, list[Any]]]:
    """(path, configuration, modules that share it) of every part of a model, the model itself first.

    Raises ValueError for a module that holds no ``PreTrainedModel``.
    """
    from transformers import PreTrainedModel

    found: dict[int, tuple[str, Any, list[Any]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            _, _, owners = found.setdefault(id(module.config), (path, module.config, []))
            owners.append(module)
    if not found:
        raise ValueError(f"model must hold a transformers PreTrainedModel, got {type(model).__name__}; {ELSEWHERE}")
    yield from found.values()


def why_not_swapped(part: Any, name: str) -> Refusal | None:
    """Reason why a ``PreTrainedModel`` cannot take the attention implementation ``name``; None if it can."""
    if not part._can_set_attn_implementation():
        reason = f"the code of {type(part).__name__} does not call transformers' attention interface"
        return refusal(reason, "its own attention runs; call cross_attention in it")
    if names_sdpa(type(part).__module__):
        reason = 'its code asks for "sdpa" by name and prepares other masks for other names'
        return refusal(reason, "its own attention runs")
    try:
        part.get_correct_attn_implementation(name)
    except (ValueError, ImportError) as error:
        return refusal(str(error).strip().split("\n")[0].split(" Please")[0], "its own attention runs")
    return None


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


def why_not_fused(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
) -> tuple[Refusal, ...]:
    """Every reason why a call of :func:`attention` with these arguments goes to SDPA; empty if the op computes it."""
    # As in transformers: without a mask the module's flag decides, and a single query sees every key.
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    queries, width = query.shape[2], query.shape[3]
    found: list[Refusal] = []
    if position_bias is not None:
        found.append(refusal("there is a position_bias", "SDPA adds it"))
    if sliding_window is not None:
        found.append(refusal("there is a sliding_window", "SDPA runs with its mask"))
    if output_attentions:
        reason = "output_attentions is set, and the op returns no probabilities"
        found.append(refusal(reason, 'SDPA runs; attn_implementation="eager" returns them'))
    if causal and attention_mask is None and queries > 1:
        found.append(refusal("the module is causal", "SDPA runs"))
    if attention_mask is not None and _key_padding(attention_mask, query, key) is None:
        reason = "the mask is not plain key padding: it differs between queries or heads, or it is floating"
        found.append(refusal(reason, "SDPA runs; pass the tokenizer's mask (batch, keys)"))
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3]:
        shapes = [tuple(x.shape) for x in (query, key, value)]
        found.append(refusal(f"query, key and value have batches and lengths of {shapes}", "SDPA broadcasts them"))
    if not width == key.shape[3] == value.shape[3]:
        reason = f"head widths differ: {width}, {key.shape[3]} and {value.shape[3]}"
        found.append(refusal(reason, "SDPA runs; give values the width of keys"))
    return (*found, *_kernel(query, key))


def _kernel(query: Tensor, key: Tensor) -> tuple[Refusal, ...]:
    if in_torchscript():
        return (refusal("torch.jit.trace records a program without our ops", "SDPA runs"),)
    dtype = dispatch.autocast_dtype(query.device) or query.dtype
    return kernel_reasons(query.device, dtype, query.shape[3], min(query.shape[2], key.shape[2]))


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
    for a mask of another rank, for a model whose code asks for the name "sdpa", and for every further argument that is
    not known to be without effect: ``softcap``, ``s_aux``, sparse ``indices``, packed ``cu_seq_lens_q`` and so on.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if names_sdpa(type(module).__module__):
        raise ValueError(
            f'{type(module).__name__} must have attn_implementation="sdpa" or "eager", got {NAME!r}: the code of its '
            'model asks for "sdpa" by name and prepares other masks for other names'
        )
    for name, given in kwargs.items():
        if given is not None and name not in _WITHOUT_EFFECT:
            raise ValueError(
                f"{name} must be None, got {type(given).__name__}: {NAME} attention does not compute it; "
                'use attn_implementation="eager"'
            )
    if attention_mask is not None and attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask must have shape (batch, heads or 1, queries, keys), got {tuple(attention_mask.shape)}"
        )
    padding = None if attention_mask is None else _key_padding(attention_mask, query, key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, L, H, D), no copy
    reasons = of_device = _kernel(query, key)
    if not reasons or recording() or listening():  # without a kernel the other reasons matter to a record alone
        reasons = why_not_fused(
            module,
            query,
            key,
            value,
            attention_mask,
            is_causal=is_causal,
            position_bias=position_bias,
            sliding_window=kwargs.get("sliding_window"),
            output_attentions=kwargs.get("output_attentions"),
        )
        own = [reason for reason in reasons if reason not in of_device]
        note(module, cross_attention, own, q, k, v, key_mask=padding, dropout_p=dropout)
    record(module, query.shape[2], key.shape[2], reasons)
    if not reasons:
        return cross_attention(q, k, v, key_mask=padding, scale=scaling, dropout_p=dropout), None
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
