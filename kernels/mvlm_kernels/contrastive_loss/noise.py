"""Gumbel noise of pairs of a row and a column: a hash, without generator state.

Shape legend: R rows, C columns.
"""

import torch
from torch import Tensor

# Constants of SplitMix64 (Steele, Lea and Flood, 2014): the increment, and the two multipliers of the finaliser.
GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """Convert a 64-bit pattern to the int64 with the same bits, because torch computes with int64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: Tensor, low_bits: bool = True) -> Tensor:
    """SplitMix64's finaliser, elementwise on int64, in place. Products wrap around.

    low_bits=False leaves out the last step, which changes only the lowest 33 bits.
    """
    x ^= _shift(x, 30)
    x *= _signed(MIX1)
    x ^= _shift(x, 27)
    x *= _signed(MIX2)
    if low_bits:
        x ^= _shift(x, 31)
    return x


def _mix_number(x: int) -> int:
    """SplitMix64's finaliser of a 64-bit pattern, on the host."""
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * MIX1 & mask
    x = (x ^ (x >> 27)) * MIX2 & mask
    return x ^ (x >> 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift. The shift of int64 would copy the sign bit."""
    x = x >> bits
    x &= (1 << (64 - bits)) - 1
    return x


def _times_golden(index: Tensor) -> Tensor:
    """The product of indices and SplitMix64's increment, modulo 2^64.

    NOTE: torch.compile takes the product of an `arange` and a number for an index, and writes it into a C++ loop as one
    of signed integers, which must not overflow there: gcc makes the loop endless. The result of `&` is no index.
    """
    return (index & -1) * _signed(GOLDEN)


def noise_key(seed: int, step: int | Tensor, direction: int, device: torch.device) -> Tensor:
    """Key of the noise of one direction, 0 or 1, in one step: an int64 scalar.

    A `step` on the device, an int64 scalar, gives the same key as the number; a CUDA graph needs that form.
    """
    if torch.compiler.is_compiling() and not isinstance(step, Tensor):
        # A number that changes is symbolic there, and torch cannot guard Python's arithmetic on it.
        step = torch.full((), step, dtype=torch.int64, device=device)
    key = seed * GOLDEN + direction * MIX2
    if isinstance(step, Tensor):
        return _mix(step * _signed(MIX1) + _signed(key))
    # torch.full fills the key on the device. torch.tensor would copy it from the host, and the step would wait.
    return torch.full((), _signed(_mix_number(key + step * MIX1)), dtype=torch.int64, device=device)


def gumbel_noise(key: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Standard Gumbel noise float32 (R, C) of rows int64 (R, 1) and columns int64 (C,), or (C, R) of (R,) and (C, 1).

    It is a hash of the arguments: the noise of a pair does not depend on the block that it is computed in.
    """
    bits = _mix(_times_golden(rows) + key) + _times_golden(columns)
    # (k + 0.5) / 2^23 with k < 2^23 is exact in fp32, so it is never 0 or 1.
    uniform = _shift(_mix(bits, low_bits=False), 41).float().add_(0.5).div_(1 << 23)
    return uniform.log_().neg_().log_().neg_()
