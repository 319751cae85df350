"""Cases of ``cross_attention``, and its oracle.

Legend: B query sequences, B' key sequences, Lq and Lk their lengths, H heads of q, Hk of k and v, D head width.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mvlm_kernels.case import Case, Draw, Inputs, name_of
from mvlm_kernels.cross_attention import cross_attention
from mvlm_kernels.cross_attention.arguments import (
    LONGEST_SHORT_SIDE,
    Sides,
    longest_sequences,
    short_side,
    short_sides_up_to,
)
from mvlm_kernels.cross_attention.reference import cross_attention_reference

FAST = {
    "paper/image-text/bf16/whole",
    "paper/text-image/bf16/splits",
    "paper/captions-of-one-image/bf16/splits",
    "paper/cls-packed-index/bf16/whole",
}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BF16 = torch.bfloat16


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, key_lengths: Tensor | None = None, key_mask: Tensor | None = None,
    key_index: Tensor | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    scale: float | None = None, dropout_p: float = 0.0, seed: Any = 0, return_lse: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Attention of one query sequence after another, over the keys that exist and no others.

    Rows of no sequence are zeros. The log-sum-exp of a query without keys is -inf, and rows of no sequence have none.
    """
    queries, keys, values = _sequences(q, cu_seqlens_q), _sequences(k, cu_seqlens_k), _sequences(v, cu_seqlens_k)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    outs, sums = [], []
    for b, rows in enumerate(queries):
        r = b if key_index is None else int(key_index[b])
        exists = torch.ones(len(keys[r]), dtype=torch.bool, device=q.device)
        if key_lengths is not None:
            exists[int(key_lengths[r]) :] = False
        if key_mask is not None:
            exists &= key_mask[r]
        chosen, group = exists.nonzero()[:, 0], q.shape[-2] // k.shape[-2] if k.shape[-2] else 1
        key, value = (x[r][chosen].repeat_interleave(group, 1) for x in (keys, values))
        scores = factor * torch.einsum("qhd,khd->hqk", rows, key)
        weights = scores.softmax(-1)
        if dropout_p:
            kept = kept_by_hand(int(seed), b, (scores.shape[0], scores.shape[1]), len(keys[r]), dropout_p)
            weights = weights * torch.from_numpy(kept).to(q.device)[..., chosen]
        outs.append(torch.einsum("hqk,khd->qhd", weights, value))
        sums.append(scores.logsumexp(-1))  # (H, Lq)
    if cu_seqlens_q is None:
        out = torch.stack(outs) if outs else q
        return (out, torch.stack(sums)) if return_lse else out
    rest = q.new_zeros(len(q) - int(cu_seqlens_q[-1]), *q.shape[1:])
    out = torch.cat([*outs, rest])
    return (out, torch.cat(sums, 1)) if return_lse else out


def _sequences(x: Tensor, bounds: Tensor | None) -> list[Tensor]:
    if bounds is None:
        return list(x)
    return [x[first:last] for first, last in itertools.pairwise(bounds.tolist())]


def kept_by_hand(seed: int, b: int, shape: tuple[int, int], keys: int, p: float) -> np.ndarray:
    """Factors (H, Lq, keys) of a dropout in query sequence b, by Philox-4x32 of 7 rounds as Salmon et al. define it."""
    h, i, quad = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in (*shape, (keys + 3) // 4)), indexing="ij")
    low, shift = np.uint64(2**32 - 1), np.uint64(32)
    c0, c1, c2, c3 = quad, i, h, np.full_like(h, b)
    k0, k1 = seed % 2**32, seed >> 32
    for _ in range(7):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> shift) ^ c1 ^ np.uint64(k0), second & low
        c2, c3 = (first >> shift) ^ c3 ^ np.uint64(k1), first & low
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    words = np.stack([c0, c1, c2, c3], -1).reshape(*shape, 4 * h.shape[2])[..., :keys]
    return (words / 2.0**32 >= p) / (1 - p)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Description of a call of cross-attention, from which its tensors are drawn.

    len_q and len_k are the longest sequences; packed sides draw lengths up to them.
    """

    len_q: int
    len_k: int
    batch: int = 2
    """Number of key sequences."""
    heads: int = 1
    key_heads: int = 0
    """Heads of k and v; 0: as many as q has."""
    width: int = 32
    dtype: torch.dtype = torch.float32
    lengths: bool = False
    """True if the call has key_lengths."""
    mask: bool = False
    """True if the call has a key_mask."""
    readers: int = 0
    """Number of query sequences that read the key sequences by key_index; 0: no index, each reads its own."""
    index: Literal["random", "in turn", "popular"] = "random"
    """Choice of the key sequence that each query sequence reads: drawn, one after another, or by :func:`popular`."""
    packed_q: bool = False
    packed_k: bool = False
    hostile: bool = True
    """Some sequences are empty, keys that do not exist hold NaN, and so do rows behind the last packed sequence."""
    captions: bool = False
    """True if lengths are drawn as those of captions (gamma distribution), with the same draws for both sides."""
    layout: Literal["contiguous", "strided", "expanded", "unaligned"] = "contiguous"
    """Layout in memory of q, k, v and the output's gradient. strided: slices of wider buffers, heads outermost.
    expanded: one sequence for all. unaligned: the first byte is at no multiple of 16."""
    ids: torch.dtype = torch.int32
    index_ids: torch.dtype | None = None
    """Dtype of key_index, if it is not that of the other ids."""
    bounded: bool = True
    """True if the call has max_len_q or max_len_k for a packed side."""
    dropout: bool = False
    seed: int = 0

    @property
    def queries(self) -> int:
        """Number of query sequences."""
        return self.readers or self.batch

    def inputs(self, device: str, seed: int = 0) -> Inputs:
        """Draw the arguments of the call on a device.

        Rows have no key or at least two: over a single key P is 1 and dS is 0 whatever the inputs, torch makes no error
        at all, and that of a kernel has nothing to be compared with (single keys have a test with other bounds).
        """
        draw, of_case = Draw(device, seed or self.seed), torch.Generator().manual_seed(self.seed)
        bounds = {side: self._bounds(side, of_case) for side in "qk"}
        key_heads = self.key_heads or self.heads
        leaves = {"q": self._rows(draw, "q", bounds["q"], self.heads)}
        leaves |= {name: self._rows(draw, "k", bounds["k"], key_heads) for name in "kv"}
        fixed: dict[str, Any] = {}
        for side, found in bounds.items():
            if found is not None:
                fixed[f"cu_seqlens_{side}"] = found.to(device)
                if self.bounded:
                    fixed[f"max_len_{side}"] = self.len_q if side == "q" else self.len_k
        exists = torch.ones(self.batch, self.len_k, dtype=torch.bool)
        if self.lengths:
            lengths = self._key_lengths(of_case)
            fixed["key_lengths"] = lengths.to(device, self.ids)
            exists &= torch.arange(self.len_k) < lengths[:, None]
        if self.mask:
            mask = torch.rand(self.batch, self.len_k, generator=of_case) < 0.6
            mask[:, :2] = True
            if self.hostile:
                mask[0], mask[-1] = True, False
            fixed["key_mask"] = mask.to(device)
            exists &= mask
        if self.readers:
            fixed["key_index"] = self._index(of_case).to(device, self.index_ids or self.ids)
        if self.dropout:
            fixed |= {"dropout_p": 0.1, "seed": torch.tensor(2**62 + 5, device=device)}
        if self.hostile and not exists.all() and self.layout != "expanded" and device != "meta":
            for name in "kv":
                leaves[name][~exists.to(device)] = torch.nan
        return Inputs(leaves, fixed)

    def _lengths(self, count: int, longest: int, draw: torch.Generator) -> Tensor:
        if self.captions:  # round(Gamma(shape 4, mean a third of the longest)), at least 6
            drawn = np.random.default_rng(0).gamma(4.0, longest / 12, count)
            return torch.from_numpy(np.clip(np.rint(drawn), 6, longest).astype(np.int64))
        return torch.randint(min(2, longest), longest + 1, (count,), generator=draw)

    def _key_lengths(self, draw: torch.Generator) -> Tensor:
        lengths = self._lengths(self.batch, self.len_k, draw)
        if self.hostile:
            lengths[-1] = 0
        return lengths

    def _bounds(self, side: str, draw: torch.Generator) -> Tensor | None:
        """Offsets cu_seqlens of side "q" or "k", int (sequences + 1,) on the CPU; None if the side is not packed."""
        packed, count, longest = (
            (self.packed_q, self.queries, self.len_q) if side == "q" else (self.packed_k, self.batch, self.len_k)
        )
        if not packed:
            return None
        lengths = self._lengths(count, longest, draw)
        if self.hostile:
            lengths[0] = longest
            lengths[1:2] = 0
        return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(self.ids)

    def _rows(self, draw: Draw, side: str, bounds: Tensor | None, heads: int) -> Tensor:
        """Draw q, or k or v: a tensor of side "q" or "k" with so many heads. bounds: its cu_seqlens, None if dense."""
        count, longest = (self.queries, self.len_q) if side == "q" else (self.batch, self.len_k)
        behind = 5 if self.hostile else 0  # of a rounded-up bucket
        leading = (count, longest) if bounds is None else (int(bounds[-1]) + behind,)
        return self.laid_out(draw.normal(*leading, heads, self.width, dtype=self.dtype), bounds)

    def laid_out(self, x: Tensor, bounds: Tensor | None) -> Tensor:
        """x (.., H, D) in the call's layout, with NaN behind the last of its packed sequences."""
        if self.layout == "strided":  # one of two interleaved projections, heads outermost
            x = torch.stack([x, x], -2).movedim(-3, 0).contiguous()[..., 0, :].movedim(0, -2)
        elif self.layout == "expanded" and bounds is None:
            x = x[:1].expand_as(x)
        elif self.layout == "unaligned":
            x = x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
        if bounds is not None and self.hostile and x.device.type != "meta":
            x[int(bounds[-1]) :] = torch.nan
        return x

    def _index(self, draw: torch.Generator) -> Tensor:
        if self.index == "random":
            return torch.randint(0, self.batch, (self.readers,), generator=draw)
        in_turn = torch.arange(self.readers) % self.batch
        return in_turn if self.index == "in turn" else popular(self.readers, self.batch)

    def case(self, label: str, multiprocessors: int = 0) -> Case:
        def incoming(grad: Tensor) -> Tensor:
            return self.laid_out(grad, self._bounds("q", torch.Generator().manual_seed(self.seed)))

        def yardstick(max_len_q: Any = None, max_len_k: Any = None, **arguments: Any) -> Tensor:
            return cross_attention_reference(**arguments)

        minimum, flops = self._costs()
        return Case(
            "cross_attention", label, self.dtype, self.inputs, cross_attention, oracle, minimum, flops,
            left_to_torch=min(self.len_q, self.len_k) > LONGEST_SHORT_SIDE, runs_on=self.has_tiles, multiplies=True,
            multiprocessors=multiprocessors, incoming=incoming, yardstick=yardstick,
            # dQ and dK are sums of differences dP - delta of size sqrt(width): those set the size of an ulp.
            rounded={"out": 1.0, "q": 8.0, "k": 8.0, "v": 1.0},
        )  # fmt: skip

    def has_tiles(self, arch: int) -> bool:
        """True if a GPU of this compute capability has a kernel for the lengths that the host knows."""
        from mvlm_kernels.cross_attention.tiles import has_tiles  # imports Triton

        lengths = longest(self.inputs("meta"))
        short = lengths[1] if short_side(*lengths) == "kv" else lengths[0]
        return has_tiles(self.dtype, self.width, short, arch)

    def _costs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Fewest bytes, and operations, of (forward, backward), for sequences without a mask."""
        draw = torch.Generator().manual_seed(self.seed)
        lengths_q, lengths_k = (
            torch.full((count,), longest) if bounds is None else bounds.diff().long()
            for bounds, count, longest in (
                (self._bounds("q", draw), self.queries, self.len_q), (self._bounds("k", draw), self.batch, self.len_k),
            )
        )  # fmt: skip
        if self.lengths:
            lengths_k = self._key_lengths(draw)
        queries, existing = int(lengths_q.sum()), int(lengths_k.sum())
        # Padding of k and v is not read, but its zero gradients are written.
        stored = self.batch * self.len_k if self.lengths else existing
        row, lse = self.heads * self.width * self.dtype.itemsize, 4 * self.heads * queries
        integers = 4 * (
            self.lengths * self.batch
            + self.packed_k * (self.batch + 1)
            + self.packed_q * (self.queries + 1)
            + bool(self.readers) * self.queries
        )
        minimum = (
            row * (2 * queries + 2 * existing) + lse + integers,
            # With at most 128 keys, a kernel holds all keys of a query at once, and its backward reads no output.
            row * ((3 if self.len_k <= 128 else 4) * queries + 2 * existing + 2 * stored) + lse + integers,
        )
        read = lengths_k[self._index(draw)] if self.readers else lengths_k
        product = 2 * self.heads * self.width * int((lengths_q * read).sum())
        return minimum, (2 * product, 5 * product)


def popular(queries: int, keys: int) -> Tensor:
    """Key sequences as ITM reads them, int64 (queries,): all in order, but for the last third, which is drawn.

    Hard negatives have favourites: of the drawn ones, the most popular is read by about a twentieth of the batch.
    """
    draw = torch.Generator().manual_seed(2)
    popularity = (2 * torch.randn(keys, generator=draw)).softmax(0)
    drawn = torch.multinomial(popularity, queries - 2 * (queries // 3), replacement=True, generator=draw)
    return torch.cat([torch.arange(2 * (queries // 3)) % keys, drawn])


def longest(inputs: Inputs) -> tuple[int, int]:
    """Longest query and key sequence of a case, as far as the host knows, by :func:`.arguments.longest_sequences`."""
    fixed = inputs.fixed
    sides = Sides(cu_seqlens_q=fixed.get("cu_seqlens_q"), cu_seqlens_k=fixed.get("cu_seqlens_k"))
    lengths = fixed.get("max_len_q"), fixed.get("max_len_k")
    return longest_sequences(inputs.leaves["q"], inputs.leaves["k"], sides, *lengths)


SIDES = {
    "lengths": Shape(len_q=67, len_k=37, lengths=True),
    "mask": Shape(len_q=67, len_k=65, batch=3, mask=True),
    "both": Shape(len_q=67, len_k=127, batch=3, mask=True, lengths=True),
    "index": Shape(len_q=67, len_k=17, batch=3, readers=5, lengths=True),
    "packed-k": Shape(len_q=67, len_k=19, batch=3, packed_k=True),
    "packed-q": Shape(len_q=139, len_k=19, batch=3, packed_q=True),
    "packed-both": Shape(len_q=23, len_k=23, batch=3, packed_q=True, packed_k=True),
    "packed-index": Shape(len_q=67, len_k=19, batch=3, packed_k=True, packed_q=True, readers=4),
    "long-lengths": Shape(len_q=17, len_k=197, lengths=True),
    "long-mask": Shape(len_q=17, len_k=197, batch=3, mask=True),
    "long-index": Shape(len_q=17, len_k=131, readers=5, lengths=True),
    "long-packed-q": Shape(len_q=17, len_k=131, batch=3, packed_q=True, lengths=True),
    "long-packed-k": Shape(len_q=17, len_k=149, batch=3, packed_k=True),
    "long-packed-index": Shape(len_q=17, len_k=149, batch=3, packed_k=True, readers=4),
}
"""Small calls by name, which use every feature of both kernel families: for short keys, and for short queries."""
PAPER = {
    "image-text": Shape(len_q=197, len_k=32, batch=3, heads=2, width=64, lengths=True),
    "text-image": Shape(len_q=32, len_k=197, batch=3, heads=2, width=64),
    "text-self-packed": Shape(len_q=32, len_k=32, batch=6, heads=2, width=64, packed_q=True, packed_k=True),
    "text-self": Shape(len_q=32, len_k=32, batch=3, heads=2, width=64, lengths=True),
    "384px-image-text": Shape(len_q=577, len_k=32, batch=2, heads=2, width=64, lengths=True),
    "384px-text-image": Shape(len_q=32, len_k=577, batch=2, heads=2, width=64),
    "captions-of-one-image": Shape(len_q=32, len_k=197, batch=2, readers=5, heads=2, width=64),
    "packed-text-image": Shape(len_q=32, len_k=197, batch=3, heads=2, width=64, packed_q=True),
    "image-packed-text": Shape(len_q=197, len_k=32, batch=3, heads=2, width=64, packed_k=True),
    "batch-1": Shape(len_q=197, len_k=32, batch=1, heads=1, width=64),
    # [CLS] alone asks in the last block: one query an image, its keys packed and shared by an index.
    "cls-packed-index": Shape(len_q=1, len_k=32, batch=3, readers=5, heads=2, width=64, packed_k=True),
}
"""Calls of attention in a training step by name, at the paper's lengths, on a few pairs and heads."""


def of_captions(dtype: torch.dtype, heads: int = 12, core: bool = False, **sizes: Any) -> Case:
    """Case whose lengths are drawn as those of captions, with a mean of a third of the longest, which its label has."""
    shape = Shape(dtype=dtype, heads=heads, width=64, hostile=False, captions=True, **sizes)
    label = f"B{shape.batch} H{heads} D64 {shape.len_q}x{shape.len_k}"
    if shape.packed_q and shape.packed_k:
        label += ", packed self-attention of captions"
    elif shape.packed_q:
        label += ", packed queries"
    elif shape.packed_k or shape.lengths:
        label += f", captions as keys, {'packed' if shape.packed_k else 'padded'}"
    if shape.readers:
        how = {"in turn": "", "popular": " on average, drawn"}[shape.index]
        label += f", {shape.readers // shape.batch} query sequences per key sequence{how} (key_index)"
    return replace(shape.case(label), core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    """Calls for `batch` images with a caption each, the most important first."""

    def of(len_q: int, len_k: int, times: int = 1, **options: Any) -> Case:
        return of_captions(dtype, len_q=len_q, len_k=len_k, batch=times * batch, **options)

    triple: dict[str, Any] = {"readers": 3 * batch, "index": "popular"}
    return [
        of(197, 32, core=True),
        of(32, 197, core=True),
        of(197, 32, packed_k=True, core=True),
        of(32, 197, core=True, readers=3 * batch, index="in turn"),
        of(32, 32, 2, packed_q=True, packed_k=True),
        of(1, 32, packed_k=True, **triple),
        of(32, 197, packed_q=True, **triple),
        of(197, 197, 2),
        of(197, 32, lengths=True),
        of(577, 64),
    ]


def small(dtype: torch.dtype) -> list[Case]:
    def of(len_q: int, len_k: int, batch: int = 2, **options: Any) -> Case:
        return of_captions(dtype, 1, len_q=len_q, len_k=len_k, batch=batch, **options)

    return [
        of(37, 19),
        of(19, 37 + 128),
        of(37, 19, packed_k=True),
        of(19, 37 + 128, readers=5, index="popular"),
        of(19, 19, 3, packed_q=True, packed_k=True),
        of(1, 19, packed_k=True, readers=5, index="popular"),
    ]


# Calls of a training step: 256 images of 197 rows, their captions masked and not, 768 pairs.
_STEP: dict[str, dict[str, Any]] = {
    "text to text": {"batch": 512, "len_q": 32, "len_k": 32, "packed_q": True, "packed_k": True},
    "long text to text": {"batch": 512, "len_q": 48, "len_k": 48, "packed_q": True, "packed_k": True},
    "image to text": {"len_q": 197, "len_k": 32, "packed_k": True},
    "image to text, masked patches": {"len_q": 116, "len_k": 32, "packed_k": True},
    "image to text, pairs": {"readers": 768, "len_q": 197, "len_k": 32, "packed_k": True},
    "image to text, first rows of pairs": {"readers": 768, "len_q": 1, "len_k": 32, "packed_k": True},
    "text to image": {"len_q": 32, "len_k": 197, "packed_q": True},
    "long text to image": {"len_q": 48, "len_k": 197, "packed_q": True},
    "text to image, pairs": {"readers": 768, "len_q": 32, "len_k": 197, "packed_q": True},
    "long text to image, pairs": {"readers": 768, "len_q": 48, "len_k": 197, "packed_q": True},
    "text to image, first rows of pairs": {"readers": 768, "len_q": 1, "len_k": 197},
    "one image to text": {"batch": 1, "len_q": 197, "len_k": 32, "packed_k": True},
    "one text to image": {"batch": 1, "len_q": 32, "len_k": 197, "packed_q": True},
    "unaligned, image to text": {"len_q": 197, "len_k": 32, "packed_k": True, "layout": "unaligned"},
    "unaligned, text to image": {"len_q": 32, "len_k": 197, "packed_q": True, "layout": "unaligned"},
}


def compiled() -> Iterator[Case]:
    """Cases to compile ahead of time. Two cases may have one label: 197 patches to text, and text to 197 patches.

    Labels ``dtype/width/short length/lengths`` have every dtype, width and short length, with key_lengths. The other
    labels of that form have bfloat16, width 64 and short length 32 only. Labels ``step/...`` are the calls of a
    training step in bfloat16 with 12 heads of 64.
    """
    from mvlm_kernels.cross_attention.tiles import has_tiles  # imports Triton

    def compiled_case(label: str, **options: Any) -> Case:
        values = {"batch": 256, "heads": 12, "width": 64, "dtype": BF16, "hostile": False, "captions": True}
        shape = Shape(index_ids=torch.int64, **values | options)
        return replace(shape.case(label), runs_on=lambda arch: True)

    def both(short: int, label: str, **options: Any) -> Iterator[Case]:
        for len_q, len_k in ((197, short), (short, 197)):
            yield compiled_case(label, len_q=len_q, len_k=len_k, **options)

    for dtype in (BF16, torch.float16, torch.float32):
        for width in (16, 32, 40, 64, 72, 80, 96, 128):  # of each tile width, also such that are no multiple of 16
            for short in (16, 32, 64, 128):
                if has_tiles(dtype, width, short, 80):
                    label = f"{name_of(dtype)}/{width}/{short}/lengths"
                    yield from both(short, label, dtype=dtype, width=width, lengths=True)
    variants: dict[str, dict[str, Any]] = {
        "mask": {"mask": True}, "index": {"readers": 256}, "splits": {"batch": 2}, "grouped": {"key_heads": 4},
        "dropout": {"dropout": True},
    }  # fmt: skip
    for name, options in variants.items():
        yield from both(32, f"bfloat16/64/32/{name}", **options)
    # The widest tiles, which would spill first.
    for dtype, width, short in ((BF16, 64, 64), (BF16, 128, 64), (torch.float32, 64, 32)):
        yield from both(short, f"{name_of(dtype)}/{width}/{short}/dropout", dtype=dtype, width=width, dropout=True)
    for name, options in _STEP.items():
        yield compiled_case(f"step/{name}", **options)
    image_to_image = compiled_case("bfloat16/64/256/image to image", batch=512, len_q=197, len_k=197)
    yield replace(
        image_to_image, runs_on=lambda arch: has_tiles(BF16, 64, 197, arch), context=lambda: short_sides_up_to(256)
    )


def emulated() -> Iterator[Case]:
    for name, dtype in TYPES.items():
        for processors in (0, 40):
            ending = f"{name}/{'splits' if processors else 'whole'}"
            for label, shape in PAPER.items():
                yield replace(shape, dtype=dtype).case(f"paper/{label}/{ending}", processors)
            ids = torch.int64 if processors else torch.int32
            for label, shape in SIDES.items():
                shape = replace(shape, dtype=dtype, width=64, heads=2, ids=ids, seed=processors)
                yield shape.case(f"sides/{label}/{ending}", processors)
        lengths = ((65, 31), (31, 131), (130, 100), (100, 150), (197, 16), (9, 197))
        for width, (len_q, len_k) in itertools.product((32, 64, 80, 96, 128), lengths):
            shape = Shape(len_q=len_q, len_k=len_k, width=width, dtype=dtype, lengths=True)
            yield shape.case(f"widths/{width}/{len_q}x{len_k}/{name}")
        # No multiple of 16: vectors by what tile_io says of strides.
        for width, (len_q, len_k) in itertools.product((8, 40, 104), lengths[:2]):
            shape = Shape(len_q=len_q, len_k=len_k, width=width, dtype=dtype, heads=3, layout="strided")
            yield shape.case(f"widths/{width}/{len_q}x{len_k}/{name}")
    for label in ("lengths", "index", "packed-both", "long-lengths", "long-index", "long-packed-q"):
        shape = replace(SIDES[label], heads=4, width=64, dtype=BF16)
        yield replace(shape, key_heads=2).case(f"grouped/{label}")
        yield replace(shape, dropout=True).case(f"dropout/{label}")
    layouts: tuple[Literal["strided", "expanded"], ...] = ("strided", "expanded")
    for layout in layouts:
        for label in ("lengths", "packed-k", "long-index", "index", "long-packed-k"):
            shape = replace(SIDES[label], layout=layout, heads=2, dtype=BF16)
            yield shape.case(f"layouts/{layout}/{label}")
    for label in ("packed-k", "packed-both", "packed-q", "long-packed-q", "long-packed-k"):
        yield replace(SIDES[label], bounded=False, dtype=BF16).case(f"unbounded/{label}")


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of few narrow heads, whose sizes depend on `number`; see :func:`mvlm_kernels.cases.properties`."""
    batch, options = 2 + number, {"dtype": dtype, "hostile": False, "ids": torch.int64}
    yield Shape(len_q=4, len_k=5, batch=batch, heads=2, lengths=True, **options).case("attention")
    yield Shape(
        len_q=5, len_k=130 + number, batch=batch, readers=batch + 1, heads=4, key_heads=2, width=8, mask=True, **options
    ).case("attention, long keys")
    yield Shape(len_q=8, len_k=16, batch=batch, heads=2, width=16, packed_q=True, packed_k=True, **options).case(
        "attention, packed"
    )
