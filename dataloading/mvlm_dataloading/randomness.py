"""Stateless random numbers: each draw is a hash of (purpose, seed, epoch, sample id, ...).

The crop, masks and caption of a sample in an epoch therefore do not depend on batch, rank, thread or earlier draws.
There is no generator state to save.
"""

import hashlib
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]


class Purpose(IntEnum):
    """Purpose of a random draw, the first input of its hash. Draws for different purposes are independent.

    NOTE: a purpose keeps its number. With another one, resumed runs would draw other crops, captions or masks.
    """

    ORDER = 1
    RUNS = 2
    CROP = 3
    CAPTION = 4
    PATCHES = 5
    TOKENS = 6
    SUBSTITUTE = 7
    AUGMENT = 8
    SIGN = 9
    SHARDS = 10
    TOKEN_COUNT = 11
    TOGETHER = 13
    PIECES = 14
    BLOCKS = 15
    MIX = 16


def hash64(*values: Any) -> UInt64:
    """Hash broadcastable integers, each taken modulo 2^64, into uint64 of the broadcast shape.

    Values are mixed in one after another with the finaliser of splitmix64 (Steele, Lea, Flood 2014). Each of its output
    bits is close to fair.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is intended
        for value in values:
            state = _mix((state ^ _as_uint64(value)) + np.uint64(0x9E3779B97F4A7C15))
    return state


def uniforms(purpose: Purpose, seed: int, epoch: Any, sample_ids: Any, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), float64 (n, count), for n samples.

    Args:
        epoch: one number, or int (n,).
    """
    base = hash64(purpose, seed, epoch, sample_ids)  # (n,)
    return (hash64(base[:, None], np.arange(count)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_hash(text: str | bytes) -> int:
    """Hash of a text as a signed 64-bit integer, equal on all machines."""
    # JSON can hold a lone surrogate, which strict UTF-8 cannot encode.
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _as_uint64(value: Any) -> UInt64:
    if isinstance(value, int):
        return np.asarray(value & 0xFFFFFFFFFFFFFFFF, np.uint64)
    return np.asarray(value).astype(np.uint64)


def _mix(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
