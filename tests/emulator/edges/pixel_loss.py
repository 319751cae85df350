"""Edges of ``masked_pixel_loss``: ids outside the image, NaN, no patches."""

import itertools
from functools import partial
from typing import Any

import torch

from emulator.edges import Calls
from mvlm_kernels import masked_pixel_loss
from mvlm_kernels.pixel_loss.cases import KINDS, TYPES

BF16 = torch.bfloat16


def bad_ids(dtype: torch.dtype, kind: str, normalize: bool) -> None:
    """A bad id gives NaN in its patch's loss and gradient and reads nothing. Other patches keep their bits."""
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    bad = torch.tensor([[0, -1, 5, 2], [2**31 - 1, 3, 6, -(2**31)]], dtype=torch.int32)
    is_bad = (bad < 0) | (bad > 5)
    options: Any = {"kind": kind, "normalize_target": normalize, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    pred = torch.randn(2, 4, 768).to(dtype).requires_grad_()
    results = []
    for ids in (bad, torch.where(is_bad, 1, bad)):
        loss = masked_pixel_loss(pred, images, ids, 16, reduction="none", **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), pred)))
    for a, b in zip(*results, strict=True):
        assert a[is_bad].isnan().all()
        assert torch.equal(a[~is_bad], b[~is_bad])
        assert b.isfinite().all()


def nan_predictions(dtype: torch.dtype, kind: str) -> None:
    """A NaN stays in its patch's loss and in its pixel's gradient. An infinity gives an infinite loss."""
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    ids = torch.tensor([[0, 4, 5, 2], [1, 3, 5, 0]], dtype=torch.int32)
    pred = torch.randn(2, 4, 768).to(dtype)
    pred[0, 1, 77], pred[1, 3, 767], pred[1, 0, 3] = torch.nan, torch.nan, torch.inf
    pred.requires_grad_()
    loss = masked_pixel_loss(pred, images, ids, 16, kind=kind, reduction="none")  # pyright: ignore[reportArgumentType]
    (grad,) = torch.autograd.grad(loss.sum(), pred)
    assert loss.isnan().nonzero().tolist() == [[0, 1], [1, 3]]
    assert grad.isnan().nonzero().tolist() == [[0, 1, 77], [1, 3, 767]]


def nothing(batch: int, count: int) -> None:
    """Without a patch the loss is 0."""
    pred, ids = (
        torch.randn(batch, count, 768, dtype=BF16, requires_grad=True),
        torch.zeros(batch, count, dtype=torch.int32),
    )
    loss = masked_pixel_loss(pred, torch.rand(batch, 3, 32, 48), ids, 16)
    assert loss.item() == 0
    loss.backward()
    assert pred.grad is not None


def calls() -> Calls:
    for (name, dtype), kind in itertools.product(TYPES.items(), KINDS):
        for normalize in (False, True):
            label = f"bad-ids/{name}/{kind}/{'normalized' if normalize else 'raw'}"
            yield label, partial(bad_ids, dtype, kind, normalize)
        yield f"nan/{name}/{kind}", partial(nan_predictions, dtype, kind)
    for batch, count in ((0, 4), (2, 0), (0, 0)):
        yield f"nothing/{batch}x{count}", partial(nothing, batch, count)
