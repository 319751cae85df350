"""Attention backends of the fast implementation: choosing one, and calling it.

A caller names a backend or asks for `auto`. With text on at least one side, that is what
`mvlm_kernels.cross_attention` chooses: its kernels on a GPU, if they cover the call, else SDPA or two matrix products
(`math`). Between images it is SDPA on a GPU, and on a CPU the same as with text. `mvlm doctor` prints the result.

`auto` never picks flash-attn or xformers, because SDPA ships flash attention already.

Shape legend: B sequences, R query sequences, L rows, Lq queries, Lk keys, T packed rows, H heads, D head width.
"""

from importlib.util import find_spec
from typing import Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from mvlm.config.model import ImageAttentionBackend, MaskVLMConfig, TextAttentionBackend
from mvlm.errors import ConfigError
from mvlm.model.packing import Packing
from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention import why_not_triton
from mvlm_kernels.cross_attention.composed import rule
from mvlm_kernels.dispatch import interpreting


class BackendChoice(NamedTuple):
    """Backend that was chosen for a kind of attention, and the reasons against those that cannot run."""

    backend: str
    reasons: dict[str, str]
    """Why each unavailable backend was not chosen; empty if the caller named the backend."""


def choose_backend(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    rows: tuple[int, int],
    *,
    text: bool,
) -> BackendChoice:
    """The backend for one kind of attention call of a training step: the wanted one, or the best one for "auto".

    Args:
        wanted: name of a backend, or "auto".
        device: device of q, k and v.
        dtype: dtype of q, k and v, after autocast.
        head_width: D.
        rows: rows of the longest sequence of queries, and of keys.
        text: True if queries or keys are text, False for only images.

    Raises:
        ConfigError: the wanted backend does not exist or cannot run here. The message has the reason.
    """
    reasons = _why_not(device, dtype, head_width, min(rows), text)
    names = get_args(TextAttentionBackend if text else ImageAttentionBackend)
    if wanted not in names:
        raise ConfigError(f"attention backend: wanted one of {', '.join(names)}, got {wanted!r}")
    if wanted != "auto":
        interpreted = wanted == "triton" and device.type == "cpu" and interpreting()
        if wanted in reasons and not interpreted:
            can = [name for name in names if name not in reasons and name != "auto"]
            raise ConfigError(
                f"attention backend {wanted}: {reasons[wanted]}; choose one that can run: {', '.join(can)}"
            )
        return BackendChoice(wanted, {})
    if device.type == "cuda" and text and "triton" not in reasons:
        return BackendChoice("triton", reasons)
    return BackendChoice(rule(device, dtype, rows[1], True), reasons)


def choose_for_model(
    config: MaskVLMConfig,
    device: torch.device,
    dtype: torch.dtype,
    image: str = "auto",
    text: str = "auto",
) -> dict[str, BackendChoice]:
    """The two backends of a model of these sizes: "image" for only images, "text" for attention with text.

    `image` and `text` are the wanted backends. ConfigError, with the reason, if one of them cannot run here.
    """
    head_width, patches = config.width // config.heads, 1 + config.num_patches
    return {
        "image": choose_backend(image, device, dtype, head_width, (patches, patches), text=False),
        "text": choose_backend(text, device, dtype, head_width, (patches, config.text_length), text=True),
    }


def _why_not(device: torch.device, dtype: torch.dtype, head_width: int, short_rows: int, text: bool) -> dict[str, str]:
    """Reasons why backends of attention cannot run: name of the backend -> reason. Others can.

    short_rows: rows of the shorter side, queries or keys. text: True if one side is text.
    """
    found = {}
    if device.type != "cuda":
        found |= dict.fromkeys(("triton", "flash-attn", "xformers"), f"the tensors are on {device.type}, not on a GPU")
        return found
    if against := why_not_triton(device, dtype, head_width=head_width, short_rows=short_rows):
        found["triton"] = "; ".join(against)
    for name, module in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        if find_spec(module) is None:
            found[name] = f"{module} is not installed: pip install 'mvlm[gpu]'"
        elif dtype not in (torch.bfloat16, torch.float16):
            found[name] = f"{module} takes bf16 and fp16, not {dtype}"
        elif text:
            found[name] = "not used where text is on one side"
    return found


def image_attention(q: Tensor, k: Tensor, v: Tensor, wanted: str = "auto") -> Tensor:
    """Attention between patches of images, without a mask: q, k and v (B, L, H, D) -> (B, L, H, D)."""
    if wanted == "flash-attn":
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        return flash_attn_func(q, k, v)
    if wanted == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q, k, v)
    if wanted == "auto" and q.device.type == "cuda":
        wanted = "sdpa"
    return cross_attention(q, k, v, backend=_named(wanted))


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_index: Tensor | None = None,
    wanted: str = "auto",
) -> Tensor:
    """Attention with text on at least one side. Either side may be packed.

    Args:
        q: (R, Lq, H, D), or packed (T, H, D) with `queries`.
        k, v: (B, Lk, H, D), or packed (T, H, D) with `keys`.
        queries, keys: layouts of packed rows; None for rows that are not packed.
        key_index: int64 (R,), the partner of each query sequence among those of k and v. None: sequence r attends to
            sequence r.
        wanted: name of a backend, or "auto".

    Returns a tensor of q's shape.
    """
    return cross_attention(
        q,
        k,
        v,
        key_index=key_index,
        cu_seqlens_q=queries.cu_seqlens if queries else None,
        cu_seqlens_k=keys.cu_seqlens if keys else None,
        max_len_q=queries.max_length if queries else None,
        max_len_k=keys.max_length if keys else None,
        backend=_named(wanted),
    )


def _named(wanted: str) -> Literal["auto", "sdpa", "math"]:
    """Argument `backend` of `mvlm_kernels.cross_attention` for a wanted backend: "auto" for triton, else its name.

    Where its kernels can run, "auto" takes them.
    """
    return "auto" if wanted == "triton" else cast(Literal["auto", "sdpa", "math"], wanted)
