"""Cases of ``contrastive_terms``, and its oracle. It has no kernels. Legend: n rows, G columns, E width."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.case import Case, Draw, Inputs
from mvlm_kernels.contrastive_loss import contrastive_terms

FAST: set[str] = set()
"""Cases that are emulated in every suite."""


def oracle(
    image: Tensor, text: Tensor, log_scale: Tensor, rows: Tensor, image_id: Tensor, text_id: Tensor,
    bias: Tensor | None = None, shared_positives: bool = False, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The differentiable terms (n,) and (G,), from all logits at once."""
    logits = torch.einsum("ne,ge->ng", image, text) * log_scale.exp()
    matches = (image_id[:, None] == image_id) | (text_id[:, None] == text_id)
    right = matches if shared_positives else torch.eye(len(text), dtype=torch.bool, device=text.device)
    if bias is not None:
        signs = torch.where(right[rows], 1.0, -1.0).to(logits.dtype)
        return F.softplus(-signs * (logits + bias), threshold=500).sum(1), torch.zeros_like(text[:, 0])
    share = right / right.sum(1, keepdim=True) + right / right.sum(0)
    return logits.logsumexp(1) - (logits * share[rows]).sum(1), logits.logsumexp(0)


def ours(**arguments: Any) -> tuple[Tensor, ...]:
    terms = contrastive_terms(**arguments)
    return terms.rows, terms.columns


def case(label: str, rows: int, columns: int, dtype: torch.dtype, parameters: torch.dtype, **options: bool) -> Case:
    """Rows of width 5 with columns of which some share an image or a text. options: bias, shared_positives."""

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"image": draw.normal(rows, 5, dtype=dtype), "text": draw.normal(columns, 5, dtype=dtype)}
        leaves["log_scale"] = draw.normal(1, dtype=parameters, scale=0.1)
        if options.get("bias"):
            leaves["bias"] = draw.normal(1, dtype=parameters)
        own = torch.arange(columns, device=leaves["image"].device).flip(0)[:rows]
        ids = {name: draw.integers(columns, columns) for name in ("image_id", "text_id")}
        keys = torch.arange(2, device=own.device)
        shared = options.get("shared_positives", False)
        return Inputs(leaves, {"rows": own, **ids, "noise_keys": keys, "shared_positives": shared})

    return Case("contrastive_terms", label, dtype, make, ours, oracle, has_kernels=False)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return []


def small(dtype: torch.dtype) -> list[Case]:
    return []


def compiled() -> Iterator[Case]:
    yield from ()


def emulated() -> Iterator[Case]:
    yield from ()


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    rows, columns = 3 + number, 7 + number
    yield case("contrast", rows, columns, dtype, parameters)
    yield case("contrast, sigmoid", rows, columns, dtype, parameters, bias=True, shared_positives=True)
    yield case("contrast, shared", rows, columns, dtype, parameters, shared_positives=True)
