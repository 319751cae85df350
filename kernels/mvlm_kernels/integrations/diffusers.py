"""Cross-attention of diffusers models by :func:`mvlm_kernels.cross_attention`.

    from mvlm_kernels.integrations.diffusers import swap
    print(swap(unet))  # what was swapped, and what not and why; `undo()` of the report puts everything back

Attention layers with diffusers' default processor, ``AttnProcessor2_0``, get a :class:`KernelAttnProcessor`. It calls
the op where a kernel runs the call (one side is short, as text is), and otherwise the original's code.
"""

from typing import Any, cast

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.dispatch import Refusal, refusal
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, Part, SwapReport, kernel_reasons, record


class KernelAttnProcessor(AttnProcessor2_0):
    """``AttnProcessor2_0`` that calls :func:`mvlm_kernels.cross_attention` where a kernel runs the call.

    padding_masks: True if floating masks hold 0 for keys that exist and a large negative number for all others, as
    diffusers' models make them of ``encoder_attention_mask``. Their values cannot be checked without waiting for the
    device, so by default calls with a floating mask run the original's code. One difference from it: a query without
    any key gives zeros.
    """

    def __init__(self, padding_masks: bool = False) -> None:
        super().__init__()
        self.padding_masks = padding_masks

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention of hidden_states (B, Lq, C) or (B, C, height, width) to encoder_hidden_states (B, Lk, C').

        attention_mask: (B, Lk), (B, 1, Lk) or (B, 1, 1, Lk), bool with True = the key exists, or floating and added to
        the scores. None as encoder_hidden_states means self-attention. Returns the shape of hidden_states.
        """
        is_image = hidden_states.ndim == 4
        queries = hidden_states.shape[2] * hidden_states.shape[3] if is_image else hidden_states.shape[1]
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        reasons = self.why_not_fused(attn, hidden_states, queries, keys, attention_mask)
        if args or any(value is not None for value in kwargs.values()):
            further = f"there are further arguments: {', '.join(kwargs) or 'positional ones'}"
            reasons = (*reasons, refusal(further, "the original's code computes them; leave them out"))
        record(attn, queries, keys, reasons)
        if reasons:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        spatial_norm, group_norm = cast(Any, attn.spatial_norm), cast(Any, attn.group_norm)
        states = hidden_states if spatial_norm is None else spatial_norm(hidden_states, temb)
        if is_image:
            states = states.flatten(2).transpose(1, 2)
        if group_norm is not None:
            states = group_norm(states.transpose(1, 2)).transpose(1, 2)
        context = states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        projections = cast(Any, ((attn.to_q, states), (attn.to_k, context), (attn.to_v, context)))
        query, key, value = (linear(x).unflatten(-1, (attn.heads, -1)) for linear, x in projections)  # (B, L, H, D)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        out = cross_attention(query, key, value, key_mask=_key_padding(attention_mask, keys))
        project, dropout = cast(nn.ModuleList, attn.to_out)
        out = dropout(project(out.flatten(2)))
        if is_image:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

    def why_not_fused(
        self, attn: Attention, hidden_states: Tensor, queries: int, keys: int, attention_mask: Tensor | None
    ) -> tuple[Refusal, ...]:
        """Every reason why a call with these tensors runs the original's code; empty if the op computes it."""
        reasons = []
        if attention_mask is not None:
            batch, mask_shape = hidden_states.shape[0], tuple(attention_mask.shape)
            if mask_shape not in ((batch, keys), (batch, 1, keys), (batch, 1, 1, keys)):
                reason = f"the mask of shape {mask_shape} is not one row of {keys} keys for each sample"
                reasons.append(refusal(reason, f"the original's code runs; pass a mask of shape {(batch, keys)}"))
            if attention_mask.dtype != torch.bool and not self.padding_masks:
                way_out = "the original's code runs; swap(..., padding_masks=True) if it marks padding alone"
                reasons.append(refusal("the mask is floating", way_out))
        dtype = dispatch.autocast_dtype(hidden_states.device) or hidden_states.dtype
        width = attn.inner_dim // attn.heads
        return (*reasons, *kernel_reasons(hidden_states.device, dtype, width, min(queries, keys)))


def _key_padding(attention_mask: Tensor | None, keys: int) -> Tensor | None:
    """bool (B, keys), True = the key exists."""
    if attention_mask is None:
        return None
    rows = attention_mask.reshape(-1, keys)
    return rows if rows.dtype == torch.bool else rows == 0


def why_not_swapped(layer: Attention) -> Refusal | None:
    """Reason why a layer cannot take a :class:`KernelAttnProcessor`; None if it can."""
    processor = layer.processor
    if isinstance(processor, KernelAttnProcessor):
        return ALREADY_SWAPPED
    if type(processor) is not AttnProcessor2_0:
        reason = f"its processor must be an AttnProcessor2_0, got {type(processor).__name__}"
        return refusal(reason, "leave it: an AttnProcessor2_0 there may compute something else")
    if layer.inner_dim != layer.inner_kv_dim:
        reason = f"queries are {layer.inner_dim} wide and keys {layer.inner_kv_dim}: heads are grouped"
        return refusal(reason, "diffusers' processor runs; build the layer without kv_heads")
    return None


def swap(model: nn.Module, *, padding_masks: bool = False) -> SwapReport:
    """Give every attention layer of a diffusers model a :class:`KernelAttnProcessor`, in place.

    padding_masks: see there. Processors hold no parameters, so the state dict does not change. The report lists every
    ``Attention``; those with a processor of their model (SD 3, Sana) are kept. A model whose layers are of another
    class (Flux) has nothing to swap.
    """
    parts, before = [], []
    for path, layer in model.named_modules():
        if isinstance(layer, Attention):
            reason = why_not_swapped(layer)
            parts.append(Part(path, type(layer).__name__, reason))
            if reason is None:
                before.append((layer, layer.processor))
                cast(Any, layer).set_processor(KernelAttnProcessor(padding_masks))

    def restore() -> None:
        for layer, processor in before:
            if isinstance(layer.processor, KernelAttnProcessor):
                layer.set_processor(processor)

    return SwapReport(parts, restore)
