"""Which implementation computes an attention, and why not another.

The rule of `auto`, by what the host knows (`mvlm doctor` prints it for this machine):

- self-attention of dense rows (images): SDPA on a GPU and in fp32 on a CPU; on a CPU in bf16 two matrix products.
- everything with text on one side (packed text, image to text, text to image): the kernels on a GPU that they cover;
  elsewhere packed rows are padded, and the dense rule holds.

flash-attn and xformers are used where they are asked for: SDPA ships flash attention already.

Shape legend: B sequences, R query sequences, Lq queries, Lk keys, T packed rows, H heads, D head width.
"""

from importlib.util import find_spec
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.config.model import CrossBackend, MaskVLMConfig, SelfBackend
from mvlm.errors import ConfigError
from mvlm.model.packing import Packing
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention import why_not_triton

INSTALLED = {module: find_spec(module) is not None for module in ("flash_attn", "xformers")}
"""Looked for once: every attention asks, and Python goes through the folders each time."""


class BackendChoice(NamedTuple):
    """A backend, and why each of the others is not the one."""

    backend: str
    reasons: dict[str, str]


def choose(
    wanted: str, device: torch.device, dtype: torch.dtype, width: int, shorter: int, *, text: bool
) -> BackendChoice:
    """The backend for heads of `width` where the shorter side has `shorter` rows; `text`: one side is text.

    ConfigError, with the reason, for a backend that is wanted and cannot run here.
    """
    reasons = _reasons(device, dtype, width, shorter, text)
    names = get_args(CrossBackend if text else SelfBackend)
    if wanted not in names:
        raise ConfigError(f"attention backend: wanted one of {', '.join(names)}, got {wanted!r}")
    if wanted != "auto":
        interpreted = wanted == "triton" and device.type == "cpu" and dispatch.interpreting()
        if wanted in reasons and not interpreted:
            can = [name for name in names if name not in reasons and name != "auto"]
            raise ConfigError(f"attention backend {wanted}: {reasons[wanted]}; here can run: {', '.join(can)}")
        return BackendChoice(wanted, {})
    if device.type == "cuda":
        return BackendChoice("triton" if text and "triton" not in reasons else "sdpa", reasons)
    return BackendChoice("math" if dtype == torch.bfloat16 else "sdpa", reasons)


def choices(
    config: MaskVLMConfig, device: torch.device, dtype: torch.dtype, own: str = "auto", cross: str = "auto"
) -> dict[str, BackendChoice]:
    """What a model of these sizes takes for "image" self-attention and where "text" is on one side.

    ConfigError where `own` or `cross`, what is wanted for each, cannot run.
    """
    width, rows = config.width // config.heads, 1 + config.num_patches
    return {
        "image": choose(own, device, dtype, width, rows, text=False),
        "text": choose(cross, device, dtype, width, min(rows, config.text_length), text=True),
    }


def _reasons(device: torch.device, dtype: torch.dtype, width: int, shorter: int, text: bool) -> dict[str, str]:
    """Why a backend cannot run."""
    found = {}
    if device.type != "cuda":
        found |= dict.fromkeys(("triton", "flash-attn", "xformers"), f"the tensors are on {device.type}, not on a GPU")
        return found
    if against := why_not_triton(device, dtype, head_width=width, short_rows=shorter):
        found["triton"] = "; ".join(against)
    for name, module in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        if not INSTALLED[module]:
            found[name] = f"{module} is not installed: pip install 'mvlm[gpu]'"
        elif dtype not in (torch.bfloat16, torch.float16):
            found[name] = f"{module} takes bf16 and fp16, not {dtype}"
        elif text:
            found[name] = "not used where text is on one side"
    return found


def self_attention(q: Tensor, k: Tensor, v: Tensor, wanted: str = "auto") -> Tensor:
    """Dense attention without a mask: q, k and v (B, L, H, D) -> (B, L, H, D)."""
    backend = choose(wanted, q.device, q.dtype, q.shape[-1], q.shape[1], text=False).backend
    if backend == "triton":
        return cross_attention(q, k, v)
    if backend == "flash-attn":
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        return flash_attn_func(q, k, v)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q, k, v)
    return _dense(q, k, v, None, backend)


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_index: Tensor | None = None,
    wanted: str = "auto",
) -> Tensor:
    """Attention with text on at least one side, each side dense or packed.

    q (R, Lq, H, D), or packed (T, H, D) with `queries`; k and v (B, Lk, H, D), or packed with `keys`. Query sequence r
    reads sequence key_index[r] of k and v, int64 (R,), or r. Returns what q is like.
    """
    longest = (queries.max_length if queries else q.shape[1], keys.max_length if keys else k.shape[1])
    backend = choose(wanted, q.device, q.dtype, q.shape[-1], min(longest), text=True).backend
    if backend == "triton":
        return cross_attention(
            q,
            k,
            v,
            key_index=key_index,
            cu_seqlens_q=queries.cu_seqlens if queries else None,
            cu_seqlens_k=keys.cu_seqlens if keys else None,
            max_len_q=longest[0] if queries else None,
            max_len_k=longest[1] if keys else None,
        )
    if queries:
        q = queries.pad(q)
    exists = None
    if keys:
        k, v, exists = keys.pad(k), keys.pad(v), keys.exists
    if key_index is not None:
        k, v = k.index_select(0, key_index), v.index_select(0, key_index)
        exists = None if exists is None else exists.index_select(0, key_index)
    heads = _dense(q, k, v, exists, backend)
    return queries.unpad(heads) if queries else heads


def _dense(q: Tensor, k: Tensor, v: Tensor, exists: Tensor | None, backend: str) -> Tensor:
    """q (B, Lq, H, D), k and v (B, Lk, H, D), exists bool (B, Lk), True = the key exists -> (B, Lq, H, D)."""
    mask = None if exists is None else exists[:, None, None, :]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "math":
        return math_attention(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by two batched matrix products, in the dtype of the inputs throughout.

    q (B, H, Lq, D), k and v (B, H, Lk, D); mask bool, broadcast to (B, H, Lq, Lk), True = the key exists.
    """
    with torch.autocast(q.device.type, enabled=False):  # autocast would copy the scores to fp32 and back
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1) @ v
