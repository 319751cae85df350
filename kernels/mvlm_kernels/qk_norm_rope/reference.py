"""Specification of ``qk_norm_rope`` in plain torch, and its implementation without the kernels.

Legend: B samples, N tokens, H heads, D width of a head, P tokens in front that are not rotated. Shapes are those of
dense rows; packed ones have T tokens in the place of (B, N).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.arguments import compute_dtype

Tables = tuple[Tensor, Tensor] | None
"""sin and cos, (N, 1, D) or (B, N, 1, D); None: nothing is rotated."""


def tables_of(sin: Tensor | None, cos: Tensor | None, prefix: int, dtype: torch.dtype) -> Tables:
    """Tables of all tokens from (.., N - P, D): angles of 0 for the first P."""
    if sin is None or cos is None:
        return None
    padded = (F.pad(table.to(dtype), (0, 0, prefix, 0), value=of_zero) for table, of_zero in ((sin, 0.0), (cos, 1.0)))
    sin, cos = (table.unsqueeze(-2) for table in padded)
    return sin, cos


def quarter(x: Tensor, interleaved: bool) -> Tensor:
    """Pairs (a, b) of x (.., D) turned by 90 degrees: (-b, a)."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def standardized(x: Tensor, eps: float, norm: str) -> tuple[Tensor, Tensor]:
    """x (.., D) without its mean, if norm is "layer", over its root mean square; and 1 over that, (.., 1)."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def norm_rope(
    qkv: Tensor, sin: Tensor | None, cos: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None,
    q_bias: Tensor | None, k_bias: Tensor | None, eps: float, norm: str, interleaved: bool, prefix: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries and keys of qkv (B, N, 3, H, D), normed and rotated, (B, N, H, D) each, in qkv's dtype.

    sin and cos (.., N - P, D), weights and biases (D,). norm: "layer", "rms", or "" for none.
    """
    wide = compute_dtype(qkv.dtype)
    tables = tables_of(sin, cos, prefix, wide)

    def part(number: int, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = qkv.select(-3, number).to(wide)
        if norm:
            x = standardized(x, eps, norm)[0]
            x = x if weight is None else x * weight.to(wide)
            x = x if bias is None else x + bias.to(wide)
        if tables is not None:
            x = x * tables[1] + quarter(x, interleaved) * tables[0]
        return x.to(qkv.dtype, memory_format=torch.contiguous_format, copy=True)

    return part(0, q_weight, q_bias), part(1, k_weight, k_bias)


def norm_rope_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor | None, sin: Tensor | None, cos: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float, norm: str, interleaved: bool, prefix: int, sums: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of qkv, (B, N, 3, H, D), from those of queries, keys and values, (B, N, H, D).

    qkv is not read, and may be None, without a norm. The second result is (sums, 2, D): of q and k, sums over tokens
    and heads of gradient times norm, if sums is 1 or 2, and of the gradient, if it is 2.
    """
    wide = compute_dtype(dq.dtype)
    tables = tables_of(sin, cos, prefix, wide)
    found = []

    def part(number: int, grad: Tensor, weight: Tensor | None) -> Tensor:
        grad = grad.to(wide)
        if tables is not None:
            grad = grad * tables[1] - quarter(grad * tables[0], interleaved)
        if qkv is None:
            return grad
        normed, rstd = standardized(qkv.select(-3, number).to(wide), eps, norm)
        found.append([(grad * normed).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)][:sums])
        scaled = grad if weight is None else grad * weight.to(wide)
        dx = scaled - normed * (scaled * normed).mean(-1, keepdim=True)
        return (dx - scaled.mean(-1, keepdim=True) if norm == "layer" else dx) * rstd

    parts = part(0, dq, q_weight), part(1, dk, k_weight), dv
    dqkv = torch.stack([x.to(dq.dtype) for x in parts], dim=-3)
    if not sums:
        return dqkv, dq.new_empty((0, 2, dq.shape[-1]), dtype=wide)
    return dqkv, torch.stack([torch.stack(of_both) for of_both in zip(*found, strict=True)])
