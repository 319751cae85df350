"""Cases of the byte counter for cross-attention; the others are in :mod:`mvlm_kernels.cases`."""

import torch
from torch import Tensor

from mvlm_kernels.cache_model import caching
from mvlm_kernels.case import Case, Sizes
from mvlm_kernels.cross_attention import cross_attention
from mvlm_kernels.dispatch import use_backend

L2 = 50_000_000
"""Bytes of the second-level cache of an H100: NVIDIA H100 Tensor Core GPU architecture, white paper."""


def attention(queries: int, keys: int) -> Case:
    """Dense attention of ``queries`` rows to ``keys`` rows, 256 times 12 heads."""
    width = 64  # of a head; batch times heads is one size, because the programs of all heads are alike

    def run(sizes: Sizes, device: str):
        shapes = [(sizes["B*H"], n, 1, width) for n in (queries, keys, keys)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes]
        return leaves, lambda q, k, v: cross_attention(q, k, v)

    def eager(sizes: Sizes, device: str):
        leaves, _ = run(sizes, device)

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            p = ((q @ k.transpose(2, 3)) * width**-0.5).softmax(dim=-1)
            return (p @ v).transpose(1, 2).contiguous()

        return leaves, attend

    def minimum(sizes: Sizes) -> tuple[int, int]:
        per_row = sizes["B*H"] * width * 2
        lse = 4 * sizes["B*H"] * queries
        # The short-KV backward sees every key of a query at once and does not read the output.
        read = 3 * queries if keys <= 128 else 4 * queries
        return per_row * (2 * queries + 2 * keys) + lse, per_row * (read + 4 * keys) + lse

    def flops(sizes: Sizes) -> tuple[int, int]:
        product = 2 * sizes["B*H"] * queries * keys * width
        return 2 * product, 5 * product

    name = f"B256 H12 D64 {queries}x{keys}"
    return Case("cross_attention", name, {"B*H": 256 * 12}, {"B*H": (1, 2)}, run, eager, minimum, flops)


def pair_index(images: int, device: str = "cpu") -> Tensor:
    """Images of ITM's pairs (3 * images,): each caption's own, and two drawn ones."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, images, (images,), generator=draw) for _ in range(2)]
    return torch.cat([torch.arange(images), *drawn]).to(device)


def indexed_attention(queries: int, keys: int) -> Case:
    """Three captions read each image by key_index; bytes by the model of the cache.

    Batch and cache are 1/192 of an H100's, so that the images' keys and values are as many times larger than the cache.
    The backward is two kernels that read every input. The minimum is that of one.
    """
    heads, width, share = 2, 64, 192

    def run(sizes: Sizes, device: str):
        shapes = [(n, rows, heads, width) for n, rows in ((3 * sizes["B"], queries), *[(sizes["B"], keys)] * 2)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes]
        index = pair_index(sizes["B"], device)
        return leaves, lambda q, k, v: cross_attention(q, k, v, key_index=index)

    def eager(sizes: Sizes, device: str):
        leaves, _ = run(sizes, device)
        index = pair_index(sizes["B"], device)

        def attend(q, k, v):
            q, k, v = q.transpose(1, 2), k[index].transpose(1, 2), v[index].transpose(1, 2)
            p = ((q @ k.transpose(2, 3)) * width**-0.5).softmax(dim=-1)
            return (p @ v).transpose(1, 2).contiguous()

        return leaves, attend

    def minimum(sizes: Sizes) -> tuple[int, int]:
        row = heads * width * 2
        q, lse = 3 * sizes["B"] * queries * row, 4 * 3 * sizes["B"] * queries * heads
        read = 2 * len(pair_index(sizes["B"]).unique()) * keys * row
        return 2 * q + read + lse, 4 * q + read + 2 * sizes["B"] * keys * row + lse

    def moved(sizes: Sizes) -> tuple[int, int]:
        leaves, call = run(sizes, "cpu")
        with use_backend("triton"):
            with caching(L2 // share) as forward:
                out = call(*leaves)
            with caching(L2 // share) as backward:
                out.backward(torch.zeros_like(out))
        return forward.bytes, backward.bytes

    name = f"B8 H{heads} D{width} {queries}x{keys}, 3 readers by key_index, L2 of 50 MB / {share}"
    return Case("cross_attention", name, {"B": 8}, {}, run, eager, minimum, moved=moved)
