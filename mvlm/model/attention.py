"""Layers of every block: the residual stream with its sums and norms, attention, and the feed-forward layer.

`add_norm` is the sum and the norm at the end of a sub-layer, in one op. Attention's projections can also be called one
by one.

The plain implementation calls `attend_heads`; the fast one `mvlm_kernels.cross_attention`, which on a CPU computes the
same. The feed-forward layer's backward is that of `mvlm_kernels.gelu_linear`.

Shape legend: B batch, L rows, Lq queries, Lk keys, T packed rows, R pairs, C width, H heads, D head width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.device import compute_dtype
from mvlm.model.packing import Packing
from mvlm_kernels import add_layer_norm, gelu_linear, shadows
from mvlm_kernels.cross_attention import attend_heads
from mvlm_kernels.dispatch import without_autocast
from mvlm_kernels.split_linear import split_linear


class Residual(NamedTuple):
    """Residual stream between two blocks, as input or output of a block."""

    x: Tensor
    """(B, L, C), or packed (T, C): the residual stream, fp32 under autocast."""
    y: Tensor | None = None
    """Rows of the same shape, or None. Of a pre-norm block, the output of its feed-forward, which the next `add_norm`
    adds to x; with its bias, because FSDP frees a block's parameters when the block ends. Of a post-norm block, x in
    the dtype of matrix products."""


class Branch(NamedTuple):
    """Output of a sub-layer (attention or feed-forward) that `add_norm` adds to the residual stream."""

    rows: Tensor
    """(..., C), output of the sub-layer's last matrix product."""
    bias: Tensor | None = None
    """(C,), still to be added to the rows, or None."""


def adds_bias_later(device: torch.device) -> bool:
    """True if biases are better added by the next op than by the matrix product.

    On a GPU the next op is a kernel that gives the bias's gradient in passing. On a CPU it would be one more pass.
    """
    return device.type != "cpu"


def project(layer: nn.Linear, x: Tensor) -> Branch:
    """Last linear layer of a sub-layer: (..., C') -> (..., C). On a GPU its bias is left to `add_norm`."""
    if adds_bias_later(x.device):
        return Branch(F.linear(x, shadows.under_autocast(layer.weight)), layer.bias)
    return Branch(shadows.linear(layer, x))


def add_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    branch: Branch | None,
    *,
    post_norm: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add the output of a sub-layer to the residual stream x (..., C), and apply LayerNorm to the sum.

    Returns the new residual stream, and the norm in `out_dtype`, by default the dtype of matrix products. The new
    stream is the sum, or with `post_norm` the norm. A `branch` of None adds nothing.
    """
    rows, bias = branch or Branch(x, None)
    return add_layer_norm(
        x,
        None if branch is None else rows,
        norm.weight,
        norm.bias,
        norm.eps,
        y_bias=bias,
        out_dtype=out_dtype or compute_dtype(x),
        post_norm=post_norm,
    )


class Attention(nn.Module):
    """Multi-head attention with projections. Keys and values come from the queries' stream or from another one."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.image_backend: str = "auto"
        """Backend of the fast implementation for attention between image patches (`mvlm.model.attention_backends`)."""
        self.text_backend: str = "auto"
        """Backend of the fast implementation if queries or keys are text."""
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Branch:
        """Attention of x (B, Lq, C) to memory (B, Lk, C). Returns a `Branch` of rows (B, Lq, C).

        key_mask: bool (B, Lk), True = a key that may be attended to. None: all may.
        """
        q, k, v = self.query(x), self.key(memory), self.value(memory)
        return project(self.out, self.attend_heads(q, k, v, key_mask))

    def packed(self, x: Tensor, packing: Packing) -> Branch:
        """Self-attention of packed sequences x (T, C) -> (T, C). Rows are padded only for the softmax."""
        q, k, v = (packing.pad(projection(x)) for projection in (self.query, self.key, self.value))
        return project(self.out, packing.unpad(self.attend_heads(q, k, v, packing.key_mask)))

    def attend_heads(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Attention of all heads: projected q (B, Lq, C), k and v (B, Lk, C) -> (B, Lq, C). No projection follows.

        key_mask: bool (B, Lk), True = a key. None: all are.
        """
        heads = attend_heads(self._split(q), self._split(k), self._split(v), key_mask)  # (B, H, Lq, D)
        return heads.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, L, C) -> (B, H, L, D)

    # The same projections as separate calls, so that the fast implementation can cache keys and values and leave out
    # queries that nobody needs.

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project rows (..., C) to queries, keys and values, (..., H, D) each, by one matrix product."""
        q, k, v = self._project(x, self.query, self.key, self.value)
        return q, k, v

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Project rows (..., C) to keys and values, (..., H, D) each, by one matrix product."""
        k, v = self._project(x, self.key, self.value)
        return k, v

    def queries(self, x: Tensor) -> Tensor:
        """Project rows (..., C) to queries (..., H, D)."""
        return shadows.linear(self.query, x).unflatten(-1, (self.heads, -1))

    def project_out(self, heads: Tensor) -> Branch:
        """Output projection: heads (..., H, D) -> (..., C)."""
        return project(self.out, heads.flatten(-2))

    def _project(self, x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
        """Apply several linear layers to rows (..., C) by one matrix product: (..., H, D) of each."""
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        return split_linear(x.to(compute_dtype(x)), weights, biases, self.heads)

    def attend_first_row(self, first: Tensor, x: Tensor, key_mask: Tensor | None) -> Branch:
        """Attention of each sequence's first row to all of its rows, projected, without keys and values.

        first (R, C) are the first rows, x (R, L, C) all rows, key_mask bool (R, L), True = the row exists, None = all
        exist. Returns (R, C).

        One query needs no key and value of every row, because both projections are linear:

        - The score of row j is q . (W_k x_j + b_k) = (W_k^T q) . x_j + const. The softmax drops the constant.
        - The weights p_j add up to one, so sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v.
        """
        dtype = compute_dtype(x)
        first, x = first.to(dtype), x.to(dtype)
        # Everything is in `dtype` already. Autocast would copy the scores to fp32 for the softmax.
        with without_autocast(x.device):
            parameters = self.query.weight, self.query.bias, self.key.weight, self.value.weight, self.value.bias
            query, query_bias, key, value, value_bias = shadows.cast(parameters, dtype)
            key, value = (weight.unflatten(0, (self.heads, -1)) for weight in (key, value))  # (H, D, C)
            q = F.linear(first, query, query_bias)  # (R, C)
            q = q.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (H, R, D)
            folded = (q * q.shape[-1] ** -0.5) @ key  # (H, R, C), W_k^T q of each head
            scores = folded.transpose(0, 1) @ x.transpose(1, 2)  # (R, H, L)
            if key_mask is not None:
                scores = scores.masked_fill(~key_mask[:, None, :], float("-inf"))
            mean = scores.softmax(-1) @ x  # (R, H, C)
            heads = mean.transpose(0, 1) @ value.transpose(1, 2)  # (H, R, D)
            heads = heads.transpose(0, 1).flatten(1) + value_bias  # (R, C)
        return project(self.out, heads)


Attend = Callable[..., Branch]
"""Computes attention in a block: (attention module, rows that attend) -> output that is added to the residual stream.
For self-attention, `keys` may be other rows to attend to."""


class FeedForward(nn.Module):
    """Linear to four times the width, GELU, linear back to the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Linear layer, GELU, linear layer: (..., C) -> (..., C)."""
        h, bias = project(self.up, x)  # (..., 4C)
        return gelu_linear(h, self.down.weight, self.down.bias, h_bias=bias)

    def branch(self, x: Tensor) -> Branch:
        """Output (..., C) that `add_norm` adds to the residual stream.

        On devices where `add_norm` adds the bias of the last layer too, it comes beside an output without it.
        """
        if not adds_bias_later(x.device):
            return Branch(self(x))
        h, bias = project(self.up, x)  # (..., 4C)
        return Branch(gelu_linear(h, self.down.weight, h_bias=bias), self.down.bias)
