"""Cases of cross_attention: the calls of a training step, and shapes beyond them.

Shape legend: B images, R query sequences, B' key sequences, Lq and Lk their lengths, H heads, D head width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.kernels.inputs import Case, Inputs, RandomInputs
from mvlm_kernels.cross_attention.arguments import LONGEST_SHORT_SIDE
from mvlm_kernels.cross_attention.reference import cross_attention_reference

HEADS, HEAD_WIDTH = 12, 64
Index = Literal["none", "shared", "drawn"]


@dataclass(frozen=True)
class Shape:
    """Numbers, lengths and layout of the sequences of one call of cross_attention."""

    queries: int
    """Number of query sequences."""
    len_q: int
    """Length of a query sequence, or of the longest."""
    keys: int
    """Number of key sequences."""
    len_k: int
    layout_q: Literal["dense", "packed"] = "dense"
    layout_k: Literal["dense", "padded", "packed"] = "dense"
    index: Index = "none"
    """none: query sequence r reads key sequence r. shared: r % B'. drawn: see `drawn_index`."""


def attention_cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """Cases for `batch` images with a caption each, the most important first."""
    triple = 3 * batch
    return [
        attention_case(Shape(batch, 197, batch, 32), dtype, core=True),
        attention_case(Shape(batch, 32, batch, 197), dtype, core=True),
        attention_case(Shape(batch, 197, batch, 32, layout_k="packed"), dtype, core=True),
        attention_case(Shape(triple, 32, batch, 197, index="shared"), dtype, core=True),
        attention_case(Shape(2 * batch, 32, 2 * batch, 32, "packed", "packed"), dtype),
        attention_case(Shape(triple, 1, batch, 32, layout_k="packed", index="drawn"), dtype),
        attention_case(Shape(triple, 32, batch, 197, layout_q="packed", index="drawn"), dtype),
        attention_case(Shape(2 * batch, 197, 2 * batch, 197), dtype),
        attention_case(Shape(batch, 197, batch, 32, layout_k="padded"), dtype),
        attention_case(Shape(batch, 577, batch, 64), dtype),
    ]


def drawn_index(queries: int, keys: int) -> Tensor:
    """Key sequences as ITM reads them, int32 (queries,): all in order, but for the last third, which is drawn.

    Hard negatives have favourites: of the drawn ones, the most popular is read by about a twentieth of the batch.
    """
    random = torch.Generator().manual_seed(2)
    popularity = (2 * torch.randn(keys, generator=random)).softmax(0)
    drawn = torch.multinomial(popularity, queries - 2 * (queries // 3), replacement=True, generator=random)
    own = torch.arange(2 * (queries // 3)) % keys
    return torch.cat([own, drawn]).int()


def _lengths(layout: str, count: int, longest: int) -> Tensor:
    """Lengths of the sequences, int64 (count,): those of captions, or all equal to the longest."""
    if layout == "dense":
        return torch.full((count,), longest)
    return torch.from_numpy(caption_lengths(count, longest, longest / 3))


def attention_case(shape: Shape, dtype: torch.dtype, *, core: bool = False, heads: int = HEADS) -> Case:
    """Benchmark case of cross_attention with sequences of one `Shape`."""
    lengths_q = _lengths(shape.layout_q, shape.queries, shape.len_q)
    # Self-attention of packed sequences: equal lengths on both sides.
    same = shape.layout_q == shape.layout_k == "packed"
    lengths_k = lengths_q if same else _lengths(shape.layout_k, shape.keys, shape.len_k)
    index = None
    if shape.index == "shared":
        index = torch.arange(shape.queries, dtype=torch.int32) % shape.keys
    elif shape.index == "drawn":
        index = drawn_index(shape.queries, shape.keys)

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        fixed: dict[str, Any] = {}
        tensors = {}
        sides = (
            ("q", shape.layout_q, lengths_q, shape.queries, shape.len_q),
            ("k", shape.layout_k, lengths_k, shape.keys, shape.len_k),
        )
        for side, layout, lengths, count, longest in sides:
            rows = (count, longest)
            if layout == "packed":
                fixed[f"cu_seqlens_{side}"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
                fixed[f"max_len_{side}"] = longest
                rows = (int(lengths.sum()),)
            elif layout == "padded":
                fixed["key_lengths"] = lengths.int().to(device)
            for name in ("k", "v") if side == "k" else ("q",):
                tensors[name] = random.normal(*rows, heads, HEAD_WIDTH)
        if index is not None:
            fixed["key_index"] = index.to(device)
        return Inputs(tensors, fixed)

    def reference(
        q: Tensor, k: Tensor, v: Tensor, max_len_q: int | None = None, max_len_k: int | None = None, **options: Any
    ) -> Tensor:
        return cross_attention_reference(q, k, v, **options)

    minimum, flops = _costs(shape, dtype, lengths_q, lengths_k, index, heads)
    ours = mvlm_kernels.cross_attention
    return Case(
        "cross_attention", _name(shape, heads), dtype, make, ours, reference, minimum, flops, core,
        left_to_torch=min(shape.len_q, shape.len_k) > LONGEST_SHORT_SIDE,
    )  # fmt: skip


def _costs(
    shape: Shape, dtype: torch.dtype, lengths_q: Tensor, lengths_k: Tensor, index: Tensor | None, heads: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Fewest bytes, and operations, of (forward, backward)."""
    queries, existing = int(lengths_q.sum()), int(lengths_k.sum())
    # Padding of k and v is not read, but its zero gradients are written.
    stored = shape.keys * shape.len_k if shape.layout_k == "padded" else existing
    row, lse = heads * HEAD_WIDTH * dtype.itemsize, 4 * heads * queries
    integers = 4 * (
        (shape.layout_k == "padded") * shape.keys
        + (shape.layout_k == "packed") * (shape.keys + 1)
        + (shape.layout_q == "packed") * (shape.queries + 1)
        + (index is not None) * shape.queries
    )
    minimum = (
        row * (2 * queries + 2 * existing) + lse + integers,
        # With at most 128 keys, a kernel holds all keys of a query at once, and its backward does not read the output.
        row * ((3 if shape.len_k <= 128 else 4) * queries + 2 * existing + 2 * stored) + lse + integers,
    )
    read = lengths_k if index is None else lengths_k[index.long()]
    product = 2 * heads * HEAD_WIDTH * int((lengths_q * read).sum())
    return minimum, (2 * product, 5 * product)


def _name(shape: Shape, heads: int) -> str:
    """Shape as text. Captions name their longest length; their mean is a third of it."""
    text = f"B{shape.keys} H{heads} D{HEAD_WIDTH} {shape.len_q}x{shape.len_k}"
    if shape.layout_q == shape.layout_k == "packed":
        return f"{text}, packed self-attention of captions"
    if shape.layout_q == "packed":
        text += ", packed queries"
    if shape.layout_k != "dense":
        text += f", captions as keys, {shape.layout_k}"
    queries_per_key = shape.queries // shape.keys
    return (
        text
        + {
            "none": "",
            "shared": f", {queries_per_key} query sequences per key sequence (key_index)",
            "drawn": f", {queries_per_key} query sequences per key sequence on average, drawn (key_index)",
        }[shape.index]
    )
