"""Dropout of attention probabilities as a function of a seed and of indices, in plain torch.

A word of Philox-4x32 decides whether the probability of query sequence b, query head h, query i and key j is kept. The
64-bit seed is the key of Philox, (j // 4, i, h, b) its counter, and j % 4 the word. So forward and backward, all tiles,
all layouts and all backends draw the same bits, and no mask is stored. ``tile_io.kept`` computes the same in a kernel.

Philox: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. There 7 rounds are the fewest that pass
TestU01's BigCrush.
"""

import torch
from torch import Tensor

ROUNDS = 7
_LOW = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator of the device, int64 (), without waiting for the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def threshold(p: float) -> int:
    """Smallest 24-bit word that is kept; p is the probability to drop."""
    return round(p * 2**24)


def kept(seed: Tensor, shape: tuple[int, ...], p: float, dtype: torch.dtype) -> Tensor:
    """Factors (B, H, Lq, Lk) of the probabilities: 1 / (1 - p) where kept, 0 where dropped. seed: int64 ()."""
    sizes = *shape[:3], (shape[3] + 3) // 4
    b, h, i, quad = (
        torch.arange(size, device=seed.device).view([-1 if axis == at else 1 for axis in range(4)])
        for at, size in enumerate(sizes)
    )
    words = torch.stack(torch.broadcast_tensors(*philox((quad, i, h, b), seed, ROUNDS)), dim=-1).flatten(-2)
    return ((words[..., : shape[3]] >> 8) >= threshold(p)).to(dtype) / (1 - p)


def philox(counter: tuple[Tensor, ...], seed: Tensor, rounds: int) -> tuple[Tensor, ...]:
    """Four words of Philox-4x32, each below 2^32 in an int64 tensor, of counters that broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW
    for _ in range(rounds):
        high_a, low_a = _product(0xD2511F53, c0)
        high_b, low_b = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor * x. The product itself would overflow int64, whose low bits stay right."""
    high = ((factor >> 16) * x + (((factor & 0xFFFF) * x) >> 16)) >> 16
    return high, (factor * x) & _LOW
