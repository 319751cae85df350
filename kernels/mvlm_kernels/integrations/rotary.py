"""Self-attention of timm with rotary positions: norm and rotation of queries and keys by ``qk_norm_rope``.

``EvaAttention`` (DINOv3, EVA-02) and ``AttentionRope`` (Perception Encoder, axial RoPE-ViT) project queries, keys and
values by one layer. :mod:`.blocks` swaps their forward for :func:`forward`, which attends by torch's SDPA as timm does.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm_kernels import qk_norm_rope
from mvlm_kernels.dispatch import Refusal, refusal
from mvlm_kernels.integrations.calls import note
from mvlm_kernels.integrations.norms import eps_of, of_timm, why_not_norm, why_not_replaced
from mvlm_kernels.qk_norm_rope import WIDEST

_OWN = "the original forward runs"


def why_not(attn: Any) -> Refusal | None:
    """Reason why the op cannot norm and rotate for this attention; None if it can."""
    if attn.qkv is None:
        reason = "queries, keys and values have a projection each, the op reads that of all three"
        return refusal(reason, f"{_OWN}; build the model with qkv_fused=True")
    if not attn.fused_attn:
        return refusal("timm's fused attention is off", "call timm.layers.set_fused_attn(True) before building")
    q_norm, k_norm = _norms(attn)
    for norm in (q_norm, k_norm):
        plain = type(norm) is nn.Identity
        rms = nn.RMSNorm, *of_timm("norm", "RmsNorm")
        reason = why_not_replaced(norm, nn.Identity) if plain else why_not_norm(norm, *rms)
        if reason is not None:
            return reason
    if _form(q_norm) != _form(k_norm):
        return refusal(f"the norms differ: {q_norm} of queries and {k_norm} of keys", _OWN)
    return None


def fused(attn: Any) -> str:
    """The steps that are one call in a swapped attention."""
    norm = _norms(attn)[0]
    return f"{'' if type(norm) is nn.Identity else f'{type(norm).__name__}, '}rotation of queries and keys"


def forward(
    attn: Any, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    """Forward of timm's attention: x and result (B, N, C); rope (N - P, 2 D), or (B, 1, N - P, 2 D)."""
    if _why_not_call(attn, x, rope) is not None:
        return attn.swapped_from.forward(attn, x, rope, attn_mask, **({"is_causal": True} if is_causal else {}))
    gate = None if getattr(attn, "gate", None) is None else attn.gate(x).sigmoid()
    tables, options = _arguments(attn, rope)
    qkv = _projected(attn, x).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = (part.transpose(1, 2) for part in qk_norm_rope(qkv, *tables, **options))
    dropout = attn.attn_drop.p if attn.training else 0.0
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout, is_causal=is_causal)
    y = attn.norm(y.transpose(1, 2).flatten(2))
    return attn.proj_drop(attn.proj(y if gate is None else y * gate))


def explain(attn: Any, reason: Refusal | None, x: Tensor, rope: Tensor | None = None, *_: Any, **__: Any) -> None:
    """Tell :func:`.calls.note` of a call."""
    reasons = [reason, None if reason else _why_not_call(attn, x, rope)]
    qkv = x.new_empty(*x.shape[:2], 3, attn.num_heads, _width(attn, x))
    tables, options = ((None, None), {}) if any(reasons) else _arguments(attn, rope)
    note(attn, qk_norm_rope, reasons, qkv, *tables, **options)


def _why_not_call(attn: Any, x: Tensor, rope: Tensor | None) -> Refusal | None:
    width = _width(attn, x)
    if width % 2 or width > WIDEST:
        return refusal(f"a head has {width} values, the op takes even numbers up to {WIDEST}", _OWN)
    if rope is None:
        nothing = type(_norms(attn)[0]) is nn.Identity
        return refusal("queries and keys are neither normed nor rotated", _OWN) if nothing else None
    if rope.requires_grad:
        return refusal("the angles are learned, and the op has no gradient for them", _OWN)
    if rope.shape[-1] != 2 * width or (rope.ndim != 2 and (rope.ndim != 4 or rope.shape[:2] != (x.shape[0], 1))):
        reason = f"each head, or a part of it, has angles of its own, in a table of {tuple(rope.shape)}"
        return refusal(reason, f"{_OWN}; the op takes one table for all heads")
    return None


def _arguments(attn: Any, rope: Tensor | None) -> tuple[tuple[Tensor | None, Tensor | None], dict[str, Any]]:
    """sin and cos of the op, and its other arguments by name."""
    q_norm, k_norm = _norms(attn)
    options: dict[str, Any] = {
        "interleaved": not getattr(attn, "rotate_half", False),
        "prefix_tokens": 0 if rope is None else attn.num_prefix_tokens,
    }
    if type(q_norm) is not nn.Identity:
        layer = isinstance(q_norm, nn.LayerNorm)
        options |= {"norm": "layer" if layer else "rms", "eps": eps_of(q_norm)}
        options |= {"q_weight": q_norm.weight, "k_weight": k_norm.weight}
        if layer:
            options |= {"q_bias": q_norm.bias, "k_bias": k_norm.bias}
    if rope is None:
        return (None, None), options
    sin, cos = (rope if rope.ndim == 2 else rope.squeeze(1)).chunk(2, dim=-1)
    return (sin, cos), options


def _projected(attn: Any, x: Tensor) -> Tensor:
    """Queries, keys and values (B, N, 3 H D) with their biases, as timm computes them."""
    if getattr(attn, "q_bias", None) is None:
        return attn.qkv(x)
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if not attn.qkv_bias_separate:
        return F.linear(x, attn.qkv.weight, bias)
    qkv = attn.qkv(x)
    qkv += bias  # keeps the dtype of autocast
    return qkv


def _norms(attn: Any) -> tuple[Any, Any]:
    """Modules of queries and of keys, which are nn.Identity without norms; older versions of timm have none."""
    return (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else (nn.Identity(), nn.Identity())


def _form(norm: Any) -> tuple[Any, ...]:
    """Class, eps and dtypes of a norm, which two norms must share to be computed by one call."""
    vectors = (getattr(norm, name, None) for name in ("weight", "bias"))
    return type(norm), getattr(norm, "eps", None), *(None if v is None else v.dtype for v in vectors)


def _width(attn: Any, x: Tensor) -> int:
    """Values of a head; older versions of timm do not keep it."""
    return getattr(attn, "head_dim", x.shape[-1] // attn.num_heads)
