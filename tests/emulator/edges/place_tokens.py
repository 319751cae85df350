"""Edges of ``place_tokens``: ids outside the image, images far apart."""

from functools import partial
from typing import Any

import torch

from emulator.edges import Calls
from mvlm_kernels import place_tokens
from triton_proof.driver import changed

BF16 = torch.bfloat16


def bad_ids(ids_dtype: torch.dtype) -> None:
    """Ids outside the image, at the ends of their type, and repeated leave the other positions right."""
    low, high = torch.iinfo(ids_dtype).min, torch.iinfo(ids_dtype).max
    ids = torch.tensor([[0, 3, 5, 2], [-1, 6, high, low], [1, 1, 1, 4]], dtype=ids_dtype)
    x = torch.randn(3, 4, 130, dtype=BF16, requires_grad=True)
    row, positions = torch.randn(130, dtype=BF16), torch.randn(7, 130, dtype=BF16)
    out = place_tokens(x, row, positions, row, visible_ids=ids)
    out.backward(torch.ones_like(out))
    assert x.grad is not None
    assert (x.grad[0] == 1).all()
    assert torch.equal(out[1, 1:], (row + positions)[1:])
    assert torch.equal(out[0, 1 + 3], x.detach()[0, 1] + positions[4])
    assert torch.equal(out[2, 1 + 1], x.detach()[2, 0] + positions[2])


def far_apart() -> None:
    """Images more than 2^31 elements apart."""
    with changed(checks=False):  # race checks would double the untouched pages of the buffer
        far = 2**31 + 64
        x = torch.empty(far + 2**20, dtype=BF16).as_strided((2, 40, 128), (far, 128, 1), 16)
        x.copy_(torch.randn(x.shape))
        row, positions, masked = torch.randn(128), torch.randn(41, 128), torch.rand(2, 40) < 0.5
        every: list[dict[str, Any]] = [{}, {"masked": masked}]
        for sides in every:
            a, b = (place_tokens(y, row, positions, row, **sides) for y in (x, x.contiguous()))
            assert torch.equal(a, b)


def calls() -> Calls:
    for ids_dtype in (torch.int32, torch.int64):
        yield f"bad-ids/{ids_dtype}", partial(bad_ids, ids_dtype)
    yield "far-apart", far_apart
