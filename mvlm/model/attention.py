"""Multi-head attention: the module, and its projections as separate calls.

Shape legend: B batch, Lq queries, Lk keys, T packed rows, R pairs, C width, H heads, D head width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mvlm.device import compute_dtype
from mvlm.model import attention_backends as backends
from mvlm.model.packing import Packing


def attend(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q (B, H, Lq, D), k and v (B, H, Lk, D); key_mask bool (B, Lk), True = the key exists. Returns (B, H, Lq, D).
    On a CPU in bf16 two batched matrix products are about four times as fast as SDPA, forward and backward together
    (its bf16 backward runs in scalar code); everywhere else SDPA is used.
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, Lk)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return backends.math_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Attention with projections: queries from one stream, keys and values from the same or from another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self_backend: str = "auto"
        self.cross_backend: str = "auto"
        """Backends of the fast implementation; see `mvlm.model.attention_backends`."""
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """x (B, Lq, C) attends to memory (B, Lk, C); key_mask bool (B, Lk), True = exists. Returns (B, Lq, C)."""
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return self.out(self._attend(q, k, v, key_mask))

    def packed(self, x: Tensor, packing: Packing) -> Tensor:
        """Self-attention of packed sequences x (T, C) -> (T, C). Only the attention itself sees padding."""
        q, k, v = (packing.pad(projection(x)) for projection in (self.query, self.key, self.value))
        return self.out(packing.unpad(self._attend(q, k, v, packing.exists)))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Projected q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C)."""
        heads = attend(self._split(q), self._split(k), self._split(v), key_mask)  # (B, H, Lq, D)
        return heads.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, H, L, D)

    # The same projections as separate calls, so that the fast implementation can cache and share them.

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(..., C) -> queries, keys and values (..., H, D), by one matrix product."""
        q, k, v = self._project(x, (self.query, self.key, self.value)).unbind(-3)
        return q, k, v

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., C) -> keys and values (..., H, D), by one matrix product."""
        k, v = self._project(x, (self.key, self.value)).unbind(-3)
        return k, v

    def queries(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., H, D)."""
        return self._project(x, (self.query,)).squeeze(-3)

    def project_out(self, heads: Tensor) -> Tensor:
        """The output projection of attention's heads (..., H, D) -> (..., C)."""
        return self.out(heads.flatten(-2))

    def _project(self, x: Tensor, layers: tuple[nn.Linear, ...]) -> Tensor:
        """(..., C) -> (..., len(layers), H, D)."""
        weight = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        bias = layers[0].bias if len(layers) == 1 else torch.cat([layer.bias for layer in layers])
        return F.linear(x, weight, bias).unflatten(-1, (len(layers), self.heads, -1))

    def first_rows(self, first: Tensor, x: Tensor, exists: Tensor | None) -> Tensor:
        """Attention of each sequence's first row to all its rows, without making their keys and values.

        first (R, C) are the first rows, x (R, L, C) all rows, exists bool (R, L), True = a row, or None: all exist.
        Returns (R, C), projected. A score is q . (W_k x + b_k) = (W_k^T q) . x + const, and the softmax drops the
        constant. The weights add up to one, so sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v.
        """
        dtype = compute_dtype(x)
        first, x = first.to(dtype), x.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            key, value = (
                layer.weight.to(dtype).unflatten(0, (self.heads, -1)) for layer in (self.key, self.value)
            )  # (H, D, C)
            q = F.linear(first, self.query.weight.to(dtype), self.query.bias.to(dtype))  # (R, C)
            q = q.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, R, D)
            folded = (q * q.shape[-1] ** -0.5) @ key  # (H, R, C)
            scores = folded.transpose(0, 1) @ x.transpose(1, 2)  # (R, H, L)
            if exists is not None:
                scores = scores.masked_fill(~exists[:, None, :], float("-inf"))
            mean = scores.softmax(-1) @ x  # (R, H, C)
            heads = mean.transpose(0, 1) @ value.transpose(1, 2)  # (H, R, D)
            heads = heads.transpose(0, 1).flatten(1) + self.value.bias.to(dtype)  # (R, C)
        return self.out(heads)


Attend = Callable[[Attention, Tensor], Tensor]
"""Computation of a block's attention: from the module and the rows that attend to what is added to the stream."""


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return _GeluLinear.apply(self.up(x), self.down.weight, self.down.bias)  # pyright: ignore[reportReturnType]


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(h)) that saves h alone for backward and recomputes gelu(h) there.

    A block needs a fifth less memory for three per cent more time.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(F.gelu(h), weight.to(h.dtype), bias.to(h.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        dh = torch.ops.aten.gelu_backward((grad @ weight.to(h.dtype)).view_as(h), h)
        dw = grad.T @ F.gelu(h).flatten(0, -2)
        return dh, dw.to(weight.dtype), grad.sum(0, dtype=torch.promote_types(h.dtype, torch.float32)).to(weight.dtype)
