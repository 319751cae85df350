"""Putting masks to work on the device, and random draws that belong to what they are drawn for.

The masks themselves are drawn by the loader. Shape legend: B batch, N patches, K masked patches, M masked tokens.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def masked_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """patch_ids int64 (B, K) -> bool (B, N), True = masked."""
    mask = torch.zeros(len(patch_ids), num_patches, dtype=torch.bool, device=patch_ids.device)
    return mask.scatter_(1, patch_ids, True)


def visible_patches(patch_ids: Tensor, num_patches: int) -> Tensor:
    """The others: masked patch_ids int64 (B, K) -> int64 (B, N-K), ascending."""
    visible = ~masked_patches(patch_ids, num_patches)  # (B, N), True = not masked
    return visible.byte().argsort(dim=1, descending=True, stable=True)[:, : num_patches - patch_ids.shape[1]]


def mask_tokens(tokens: Tensor, token_ids: Tensor, mask_token_id: int) -> Tensor:
    """A copy of the packed tokens int64 (T,) with [MASK] at the positions token_ids int64 (M,)."""
    return tokens.index_fill(0, token_ids, mask_token_id)


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch can hold."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014), elementwise on int64; products wrap around."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX2)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: int64's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def gumbel(seed: int, step: int | Tensor, stream: int, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise float32 (R, C) for the pairs of rows int64 (R,) and columns int64 (C,).

    A pure function of its arguments (a counter hash, no generator state), so that a pair's noise does not depend on
    how the batch lies across devices. `step` as an int64 scalar on the device gives what the number gives: a CUDA graph
    and a compiled step need it so.
    """
    # Filled on the device: a number copied there would be waited for.
    key = torch.full((), _signed(seed * _GOLDEN + stream * _MIX2), dtype=torch.int64, device=rows.device)
    key = key + (step * _signed(_MIX1) if isinstance(step, Tensor) else _signed(step * _MIX1))
    by_row = _mix(_mix(key) + rows * _signed(_GOLDEN))[:, None]  # (R, 1)
    bits = _mix(by_row + columns * _signed(_GOLDEN))  # (R, C)
    uniform = (_shift(bits, 41).float() + 0.5) / (1 << 23)  # 23 bits and a half are exact in fp32: never 0 or 1
    return -torch.log(-torch.log(uniform))
