"""Cases of cross-attention for :mod:`mvlm_kernels.aot`: calls of the launchers on meta tensors."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from mvlm_kernels import dispatch
from mvlm_kernels.cross_attention.arguments import short_sides_up_to
from mvlm_kernels.cross_attention.launch import backward, forward
from mvlm_kernels.cross_attention.tiles import has_tiles

# Widths of each tile width (16, 32, 64, 128), also such that are no multiple of 16.
_WIDTHS = (16, 32, 40, 64, 72, 80, 96, 128)
# Calls of a training step: 256 images of 197 rows, their captions masked and not, 768 pairs. Totals of packed rows are
# odd, as they come.
_STEP: dict[str, dict[str, Any]] = {
    "text to text": {"batch": 512, "len_q": 32, "len_k": 32, "rows_q": 6001, "rows_k": 6001},
    "long text to text": {"batch": 512, "len_q": 48, "len_k": 48, "rows_q": 6001, "rows_k": 6001},
    "image to text": {"batch": 256, "len_q": 197, "len_k": 32, "rows_k": 3001},
    "image to text, masked patches": {"batch": 256, "len_q": 116, "len_k": 32, "rows_k": 3001},
    "image to text, pairs": {"batch": 768, "len_q": 197, "len_k": 32, "rows_k": 3001, "indexed": 256},
    "image to text, first rows of pairs": {"batch": 768, "len_q": 1, "len_k": 32, "rows_k": 3001, "indexed": 256},
    "text to image": {"batch": 256, "len_q": 32, "len_k": 197, "rows_q": 3001},
    "long text to image": {"batch": 256, "len_q": 48, "len_k": 197, "rows_q": 3001},
    "text to image, pairs": {"batch": 768, "len_q": 32, "len_k": 197, "rows_q": 9001, "indexed": 256},
    "long text to image, pairs": {"batch": 768, "len_q": 48, "len_k": 197, "rows_q": 9001, "indexed": 256},
    "text to image, first rows of pairs": {"batch": 768, "len_q": 1, "len_k": 197, "indexed": 256},
    "one image to text": {"batch": 1, "len_q": 197, "len_k": 32, "rows_k": 17},
    "one text to image": {"batch": 1, "len_q": 32, "len_k": 197, "rows_q": 17},
    "unaligned, image to text": {"batch": 256, "len_q": 197, "len_k": 32, "rows_k": 3001, "unaligned": True},
    "unaligned, text to image": {"batch": 256, "len_q": 32, "len_k": 197, "rows_q": 3001, "unaligned": True},
}


def aot_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    """(label, call) of each case.

    Labels ``dtype/width/short length/lengths`` have every dtype, width and short length: a batch with key_lengths,
    197 patches to text and text to 197 patches. The other labels of that form have bfloat16, width 64 and short length
    32 only. Labels ``step/...`` are the calls of a training step in bfloat16 with 12 heads of 64.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in _WIDTHS:
            for short in (16, 32, 64, 128):
                if has_tiles(dtype, width, short, 80):
                    options = {"dtype": dtype, "width": width, "lengths": True}
                    yield f"{name}/{width}/{short}/lengths", partial(_both, short, **options)
    for variant in ("mask", "index", "splits", "grouped", "dropout"):
        yield f"bfloat16/64/32/{variant}", partial(_both, 32, **{variant: True})
    # The widest tiles, which would spill first.
    for dtype, width, short in ((torch.bfloat16, 64, 64), (torch.bfloat16, 128, 64), (torch.float32, 64, 32)):
        options = {"dtype": dtype, "width": width, "dropout": True}
        name = str(dtype).removeprefix("torch.")
        yield f"{name}/{width}/{short}/dropout", partial(_both, short, **options)
    for name, options in _STEP.items():
        yield f"step/{name}", partial(_call, **options)
    yield "bfloat16/64/256/image to image", _image_to_image


def _both(short: int, *, splits: bool = False, index: bool = False, grouped: bool = False, **options: Any) -> None:
    """Both kernel families: 197 patches attend to ``short`` text rows, and the reverse."""
    batch = 2 if splits else 256
    for len_q, len_k in ((197, short), (short, 197)):
        _call(batch, len_q, len_k, indexed=batch if index else None, key_heads=4 if grouped else 12, **options)


def _image_to_image() -> None:
    """Self-attention of 197 patches in a tile of 256, an option that is not the default."""
    if has_tiles(torch.bfloat16, 64, 197, dispatch.arch(torch.device("meta"))):
        with short_sides_up_to(256):
            _call(512, 197, 197)


def _call(
    batch: int, len_q: int, len_k: int, *, rows_q: int | None = None, rows_k: int | None = None,
    indexed: int | None = None, lengths: bool = False, mask: bool = False, unaligned: bool = False,
    dropout: bool = False,
    dtype: torch.dtype = torch.bfloat16, width: int = 64, key_heads: int = 12,
) -> None:  # fmt: skip
    """Forward and backward of one call. rows_q, rows_k: packed rows. indexed: key sequences that queries share."""
    k_seqs, first = indexed or batch, 1 if unaligned else 0

    def heads(shape: tuple[int, ...], count: int = 12) -> torch.Tensor:
        # A view that begins at an odd element is not aligned to 16 bytes.
        size = torch.Size((*shape, count, width)).numel()
        return torch.empty(size + first, dtype=dtype, device="meta")[first:].view(*shape, count, width)

    def vector(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = heads((batch, len_q) if rows_q is None else (rows_q,))
    k, v = (heads((k_seqs, len_k) if rows_k is None else (rows_k,), key_heads) for _ in range(2))
    long = torch.int64
    sides = (
        vector(k_seqs) if lengths else None,
        vector(k_seqs, (len_k + 63) // 64, dtype=long) if mask else None,
        vector(batch, dtype=long) if indexed else None,
        None if rows_q is None else vector(batch + 1),
        None if rows_k is None else vector(k_seqs + 1),
        vector(batch, dtype=long) if indexed else None,
        vector(k_seqs, 3, dtype=long) if indexed else None,
    )
    bounds = (width**-0.5, len_q, len_k)
    extras = (0.1 if dropout else 0.0, vector(dtype=long) if dropout else None)
    out, lse = forward(q, k, v, *sides, *bounds, *extras)
    backward(out, q, k, v, out, lse, *sides, *bounds, True, True, *extras)
