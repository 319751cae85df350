"""Cases of cross-attention for :mod:`mvlm_kernels.aot`: calls of the launchers on meta tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mvlm_kernels.cross_attention.arguments import HEAD_WIDTHS
from mvlm_kernels.cross_attention.launch import backward, forward
from mvlm_kernels.cross_attention.tiles import has_tiles


def aot_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case; labels are dtype/width/short length/variant.

    Variant ``lengths`` has every dtype, width and short length: a dense batch with key_lengths. The other variants have
    bfloat16, width 64 and short length 32 only.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in HEAD_WIDTHS:
            for short in (16, 32, 64, 128):
                # has_tiles looks for tiles of short_kv_backward, and all targets have the same keys of that kernel.
                if has_tiles(dtype, width, short, 80):
                    yield f"{name}/{width}/{short}/lengths", partial(_aot_call, dtype, width, short, lengths=True)
    for variant in ("mask", "index", "packed", "splits"):
        yield f"bfloat16/64/32/{variant}", partial(_aot_call, torch.bfloat16, 64, 32, **{variant: True})


def _aot_call(
    dtype: torch.dtype, width: int, short: int, *, lengths: bool = False, mask: bool = False, index: bool = False,
    packed: bool = False, splits: bool = False,
) -> None:  # fmt: skip
    """Forward and backward of both kernel families: 197 patches read ``short`` text rows, and the reverse."""
    batch, heads, patches = 2 if splits else 256, 12, 197
    meta = partial(torch.empty, device="meta")
    ints = partial(meta, dtype=torch.int32)
    for len_q, len_k in ((patches, short), (short, patches)):
        text_q, text_k = packed and len_q == short, packed and len_k == short
        q = meta((batch * 24, heads, width) if text_q else (batch, len_q, heads, width), dtype=dtype)
        k, v = (
            meta((batch * 24, heads, width) if text_k else (batch, len_k, heads, width), dtype=dtype) for _ in range(2)
        )
        sides = (
            ints(batch) if lengths else None,
            meta((batch, (len_k + 63) // 64), dtype=torch.int64) if mask else None,
            ints(batch) if index else None,
            ints(batch + 1) if text_q else None,
            ints(batch + 1) if text_k else None,
        )
        bounds = (width**-0.5, len_q, len_k)
        out, lse = forward(q, k, v, *sides, *bounds)
        backward(out, q, k, v, out, lse, *sides, *bounds, True, True)
