"""Random numbers that are a function of what they are for, and of nothing else.

A draw is a hash of (purpose, seed, epoch, sample id, ...). So it does not matter in which batch, on which rank, in
which thread or after how many earlier draws a sample is met: its crop, its masks and its caption in an epoch are the
same. There is no state to save.
"""

import hashlib
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]


class Purpose(IntEnum):
    """What a draw is for: equal seeds, epochs and ids give unrelated numbers for different purposes."""

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


def hash64(*words: Any) -> UInt64:
    """Hash broadcastable integers (each word taken modulo 2^64) into uint64 of the broadcast shape.

    The words are folded with the finaliser of splitmix64 (Steele, Lea, Flood 2014), whose output bits are each close
    to fair.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is wanted
        for word in words:
            state = _mix((state ^ _as_uint64(word)) + np.uint64(0x9E3779B97F4A7C15))
    return state


def uniforms(purpose: Purpose, seed: int, epoch: Any, sample_ids: Any, count: int) -> NDArray[np.float64]:
    """float64 (n, count) in [0, 1), `count` numbers for each of n samples. `epoch` is one number or one a sample."""
    base = hash64(purpose, seed, epoch, sample_ids)  # (n,)
    return (hash64(base[:, None], np.arange(count)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def text_hash(text: str | bytes) -> int:
    """A stable int64 of a text: equal texts, equal numbers, on every machine."""
    # JSON may spell half of a surrogate pair, which plain UTF-8 cannot.
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _as_uint64(word: Any) -> UInt64:
    if isinstance(word, int):
        return np.asarray(word & 0xFFFFFFFFFFFFFFFF, np.uint64)
    return np.asarray(word).astype(np.uint64)


def _mix(x: UInt64) -> UInt64:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
