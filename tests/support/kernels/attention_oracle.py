"""Attention of any combination of features, and its gradients, in numpy by formulas and loops in float64.

Nothing here comes from the library: no mask, no padding, no autograd, and a Philox in Python's integers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any


def philox_by_hand(counter: tuple[int, ...], seed: int, rounds: int) -> tuple[int, ...]:
    """Philox-4x32 in Python's integers, as Salmon et al. define it."""
    (c0, c1, c2, c3), k0, k1 = counter, seed % 2**32, seed >> 32
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Query sequences, and of each the key sequence that it reads and the keys of that one that exist.

    q, grad: (Lq, H, D) of each query sequence. k, v: (Lk, Hk, D) of each key sequence. reads: number of a key sequence
    for each query sequence. exists: numbers of the keys that exist, for each key sequence.
    """

    q: list[Array]
    k: list[Array]
    v: list[Array]
    grad: list[Array]
    reads: list[int]
    exists: list[list[int]]


def attend(
    x: Sequences, scale: float, dropout_p: float, seed: int
) -> tuple[list[Array], list[Array], list[Array], list[Array], list[Array]]:
    """Output, log-sum-exp (Lq, H) and gradients of q of each query sequence; gradients of k and v of each key sequence.

    Keys that do not exist are not looked at. A query without keys gives zeros and a log-sum-exp of -inf.
    """
    out, dq = [np.zeros_like(rows) for rows in x.q], [np.zeros_like(rows) for rows in x.q]
    dk, dv = [np.zeros_like(rows) for rows in x.k], [np.zeros_like(rows) for rows in x.v]
    lse = [np.full(rows.shape[:2], -np.inf) for rows in x.q]
    for b, r in enumerate(x.reads):
        keys = x.exists[r]
        for i in range(len(x.q[b]) if keys else 0):
            for h in range(x.q[b].shape[1]):
                g = h // (x.q[b].shape[1] // x.k[r].shape[1])
                query, grad = x.q[b][i, h], x.grad[b][i, h]
                key, value = x.k[r][keys, g], x.v[r][keys, g]
                s = scale * key @ query
                top = s.max()
                lse[b][i, h] = top + np.log(np.exp(s - top).sum())
                p = np.exp(s - lse[b][i, h])
                z = np.ones(len(keys))
                if dropout_p:
                    words = [philox_by_hand((j // 4, i, h, b), seed, 7)[j % 4] for j in keys]
                    z = np.array([w / 2**32 >= dropout_p for w in words]) / (1 - dropout_p)
                out[b][i, h] = (p * z) @ value
                dp = z * (value @ grad)
                ds = scale * p * (dp - p @ dp)
                dq[b][i, h] = ds @ key
                dk[r][keys, g] += ds[:, None] * query
                dv[r][keys, g] += (p * z)[:, None] * grad
    return out, lse, dq, dk, dv
