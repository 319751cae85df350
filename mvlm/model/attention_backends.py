"""Attention backends of the fast implementation: choosing one, and calling it.

A caller names a backend or asks for `auto`, which decides by device, dtype and shape (`mvlm doctor` prints the result):

- Only images: SDPA on a GPU. On a CPU, SDPA or two matrix products (`math`), by `cpu_backend`.
- Text on at least one side (text to text, image to text, text to image): our Triton kernels on a GPU, if they cover
  the call. Otherwise packed rows are padded and the rule for images holds.

Backward: `triton` calls `mvlm_kernels.cross_attention`, whose backward is in `mvlm_kernels/cross_attention/` (its
`__init__.py` says where). `math` has its own, `_MathAttention.backward` below. All other backends use the backward of
torch or of their library.

`auto` never picks flash-attn or xformers, because SDPA ships flash attention already.

Shape legend: B sequences, R query sequences, L rows, Lq queries, Lk keys, T packed rows, H heads, D head width.
"""

from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvlm.config.model import ImageAttentionBackend, MaskVLMConfig, TextAttentionBackend
from mvlm.errors import ConfigError
from mvlm.model.packing import Packing
from mvlm_kernels import cross_attention
from mvlm_kernels.cross_attention import invert_key_index, why_not_triton
from mvlm_kernels.dispatch import interpreting

# Looked up once, at import: find_spec searches the path, and every call of attention asks.
INSTALLED_LIBRARIES = frozenset(module for module in ("flash_attn", "xformers") if find_spec(module))
"""Optional attention libraries that are installed here, by module name."""

# In fp32 on two cores attention alone, forward and backward, is faster by matrix products than by SDPA up to so many
# keys, and a step of a run by 2 %. With 197 keys it is as fast or slower, and the probabilities take memory.
_MOST_KEYS_BY_MATH = 128


class BackendChoice(NamedTuple):
    """A chosen backend."""

    backend: str
    reasons: dict[str, str]
    """Why each unavailable backend was not chosen; empty if the caller named the backend."""


class KeyIndex:
    """Partners of query sequences: sequence r attends to sequence rows[r] of the keys.

    Args:
        rows: int64 (R,).
        sequences: number of key sequences.
    """

    def __init__(self, rows: Tensor, sequences: int) -> None:
        self.rows, self.sequences = rows, sequences
        self._readers: tuple[Tensor, Tensor] | None = None

    @property
    def readers(self) -> tuple[Tensor, Tensor]:
        """The index inverted, for the kernels: once for all layers, forward and backward."""
        if self._readers is None:
            self._readers = invert_key_index(self.rows, self.sequences)
        return self._readers


def choose_backend(
    wanted: str,
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
    rows: tuple[int, int],
    *,
    text: bool,
    gradients: bool = True,
) -> BackendChoice:
    """The backend for one kind of attention call: the wanted one, or the best one for "auto".

    Args:
        wanted: name of a backend, or "auto".
        device: device of q, k and v.
        dtype: dtype of q, k and v, after autocast.
        head_width: D.
        rows: rows of the longest sequence of queries, and of keys.
        text: True if queries or keys are text, False for only images.
        gradients: True if a backward pass follows.

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
    if device.type == "cuda":
        return BackendChoice("triton" if text and "triton" not in reasons else "sdpa", reasons)
    return BackendChoice(cpu_backend(dtype, rows[1], gradients), reasons)


def cpu_backend(dtype: torch.dtype, keys: int, gradients: bool) -> str:
    """The faster attention on a CPU: "math" for two matrix products, "sdpa" for SDPA.

    SDPA's bf16 backward on CPUs runs in scalar code. In fp32 SDPA gains little from a second core where keys are few. A
    forward pass alone is left to SDPA, which is faster on one core.

    Args:
        dtype: dtype of q, k and v.
        keys: rows of the longest sequence of keys.
        gradients: True if a backward pass follows.
    """
    if dtype == torch.bfloat16 or (dtype == torch.float32 and gradients and keys <= _MOST_KEYS_BY_MATH):
        return "math"
    return "sdpa"


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
    """Reasons against the backends that cannot run, by backend."""
    found = {}
    if device.type != "cuda":
        found |= dict.fromkeys(("triton", "flash-attn", "xformers"), f"the tensors are on {device.type}, not on a GPU")
        return found
    if against := why_not_triton(device, dtype, head_width=head_width, short_rows=short_rows):
        found["triton"] = "; ".join(against)
    for name, module in (("flash-attn", "flash_attn"), ("xformers", "xformers")):
        if module not in INSTALLED_LIBRARIES:
            found[name] = f"{module} is not installed: pip install 'mvlm[gpu]'"
        elif dtype not in (torch.bfloat16, torch.float16):
            found[name] = f"{module} takes bf16 and fp16, not {dtype}"
        elif text:
            found[name] = "not used where text is on one side"
    return found


def image_attention(q: Tensor, k: Tensor, v: Tensor, wanted: str = "auto") -> Tensor:
    """Attention between patches of images, without a mask: q, k and v (B, L, H, D) -> (B, L, H, D)."""
    rows = (q.shape[1], k.shape[1])
    backend = choose_backend(
        wanted, q.device, q.dtype, q.shape[-1], rows, text=False, gradients=torch.is_grad_enabled()
    ).backend
    if backend == "triton":
        return cross_attention(q, k, v)
    if backend == "flash-attn":
        from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

        return flash_attn_func(q, k, v)
    if backend == "xformers":
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

        return memory_efficient_attention(q, k, v)
    return _padded_attention(q, k, v, None, backend)


def text_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Packing | None,
    keys: Packing | None,
    key_index: KeyIndex | None = None,
    wanted: str = "auto",
) -> Tensor:
    """Attention with text on at least one side. Either side may be packed.

    Args:
        q: (R, Lq, H, D), or packed (T, H, D) with `queries`.
        k, v: (B, Lk, H, D), or packed (T, H, D) with `keys`.
        queries, keys: layouts of packed rows; None for rows that are not packed.
        key_index: the partner of each query sequence among those of k and v. None: sequence r attends to sequence r.
        wanted: name of a backend, or "auto".

    Returns a tensor of q's shape. ConfigError if the wanted backend cannot run here.
    """
    longest = (queries.max_length if queries else q.shape[1], keys.max_length if keys else k.shape[1])
    backend = choose_backend(
        wanted, q.device, q.dtype, q.shape[-1], longest, text=True, gradients=torch.is_grad_enabled()
    ).backend
    if backend == "triton":
        # The kernels read packed rows and key_index in place. Nothing is padded or copied.
        return cross_attention(
            q,
            k,
            v,
            key_index=None if key_index is None else key_index.rows,
            key_readers=None if key_index is None else key_index.readers,
            cu_seqlens_q=queries.cu_seqlens if queries else None,
            cu_seqlens_k=keys.cu_seqlens if keys else None,
            max_len_q=longest[0] if queries else None,
            max_len_k=longest[1] if keys else None,
        )
    if queries:
        q = queries.pad(q)
    key_mask = None
    if keys:
        k, v, key_mask = keys.pad(k), keys.pad(v), keys.key_mask
    if key_index is not None:
        # Heads first, as the products read them. The gradients come in that layout too, and are added up in it.
        k, v = (x.transpose(1, 2).contiguous().index_select(0, key_index.rows).transpose(1, 2) for x in (k, v))
        key_mask = None if key_mask is None else key_mask.index_select(0, key_index.rows)
    heads = _padded_attention(q, k, v, key_mask, backend)
    return queries.unpad(heads) if queries else heads


def _padded_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, backend: str) -> Tensor:
    """q (B, Lq, H, D), k and v (B, Lk, H, D), key_mask bool (B, Lk), True = the key exists -> (B, Lq, H, D)."""
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, Lk)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if backend == "math":
        return math_attention(q, k, v, mask).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def math_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by two batched matrix products, all in the dtype of the inputs.

    q (B, H, Lq, D), k and v (B, H, Lk, D); mask bool, broadcast to (B, 1, 1, Lk), True = the key exists.
    """
    return _MathAttention.apply(q, k, v, mask)  # pyright: ignore[reportReturnType]


class _MathAttention(torch.autograd.Function):
    """Attention by batched matrix products, for CPUs.

    Scores are transposed, (B*H, Lk, Lq): torch's softmax over the last dimension is scalar code for a few keys in bf16,
    and several times as fast over the second. Each operand is brought once into the layout that the products need.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads = q.shape[:2]
        q, k, v = (x.contiguous().flatten(0, 1) for x in (q, k, v))  # (B*H, L, D)
        scale = q.shape[-1] ** -0.5
        with torch.autocast(q.device.type, enabled=False):  # autocast would copy the scores to fp32 and back
            unused = q.new_empty(len(q), k.shape[1], q.shape[1])
            scores = torch.baddbmm(unused, k, q.transpose(1, 2), beta=0, alpha=scale)  # (B*H, Lk, Lq)
            if mask is not None:
                absent = mask.new_zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
                scores.view(batch, heads, *scores.shape[1:]).add_(absent.transpose(-1, -2))
            p = scores.softmax(1)
            out = p.transpose(1, 2) @ v
        ctx.save_for_backward(q, k, v, p)
        return out.unflatten(0, (batch, heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        shape, scale = grads[0].shape[:2], q.shape[-1] ** -0.5
        grad = grads[0].contiguous().flatten(0, 1)
        dv = p @ grad
        # A key that does not exist has p = 0, so its score has no gradient.
        ds = torch.ops.aten._softmax_backward_data(v @ grad.transpose(1, 2), p, 1, p.dtype)
        dq = torch.baddbmm(torch.empty_like(q), ds.transpose(1, 2), k, beta=0, alpha=scale)
        dk = torch.baddbmm(torch.empty_like(k), ds, q, beta=0, alpha=scale)
        return dq.unflatten(0, shape), dk.unflatten(0, shape), dv.unflatten(0, shape), None
