"""What ITC and ITM read of pairs, gathered or fetched from wherever it is.

Shape legend: b pairs of a microbatch, N patches, L tokens a caption may have, C width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm.distributed.collectives import pack
from mvlm.model.encoders import PackedText


class Features(NamedTuple):
    """What ITC and ITM read of the pairs of one microbatch."""

    image: Tensor
    """v (b, 1+N, C)."""
    text: Tensor
    """w (b, L, C), zeros for padding."""
    lengths: Tensor
    """int64 (b,), tokens of each caption."""


class Shown(NamedTuple):
    """What ITM's pairs of one microbatch are made of."""

    image: Tensor
    """(b, 1+N, C), or (2b, 1+N, C) with the drawn ones after the own."""
    text: PackedText
    """b or 2b captions alike."""
    memories: Any = None
    """What the plan has made of both already, if anything."""


def features(image: Tensor, text: PackedText, length: int) -> Features:
    """Features from v (b, 1+N, C) and w, a PackedText; captions padded to `length`, what the model allows."""
    return Features(image, text._replace(max_length=length).padded()[0], text.cu_seqlens.diff().long())


def beside(own: Features, others: Features) -> Shown:
    """Own rows 0 to b - 1, and after them the ones drawn for them."""
    text = pack(torch.cat([own.text, others.text]), torch.cat([own.lengths, others.lengths]))
    return Shown(torch.cat([own.image, others.image]), text)
