"""Backwards as ops: schema, fake tensors and tracing of those of images and patch tokens.

Their values are compared with oracles in the tests of each op. Attention's backward is in cross_attention/test_ops.py.
"""

from typing import Any

import pytest
import torch

from mvlm_kernels import use_backend
from support.kernels.patches import make_ids, make_images

pytestmark = [pytest.mark.slow, pytest.mark.plain_empty, pytest.mark.parametrize("backend", ["torch", "triton"])]
OPS = torch.ops.mvlm_kernels


def opcheck(backend: Any, op: Any, *args: Any) -> None:
    with use_backend(backend):
        torch.library.opcheck(op.default, args)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gather_patches_backward_is_an_op(backend: str, layout: str):
    images, ids = make_images((2, 3, 4, 6), torch.float32, layout), make_ids(2, 3, 6)
    opcheck(backend, OPS.gather_patches_backward, torch.rand(2, 3, 12), images, ids, 2, torch.rand(3))
    opcheck(backend, OPS.gather_patches_backward, torch.rand(2, 6, 12), images, None, 2, None)


@pytest.mark.parametrize("kind", ["l1", "mse"])
@pytest.mark.parametrize("grad", [torch.tensor(1.5), torch.rand(2, 3)], ids=["mean", "none"])
def test_pixel_loss_backwards_are_ops(backend: str, kind: str, grad: torch.Tensor):
    dtype = torch.bfloat16
    hidden, weight = torch.rand(2, 3, 5).to(dtype), torch.rand(12, 5)
    slope = torch.ones(2, 3, 12, dtype=torch.int8 if kind == "l1" else dtype)
    opcheck(backend, OPS.masked_pixel_loss_backward, grad, slope, dtype)
    for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
        opcheck(backend, OPS.linear_pixel_loss_backward, grad, slope, hidden, weight, *needs)


@pytest.mark.parametrize("mode", ["all", "masked", "both", "visible"])
def test_place_tokens_backward_is_an_op(backend: str, mode: str):
    masked = torch.tensor([[True, False, True], [False, False, True]]) if mode in ("masked", "both") else None
    visible, count = (make_ids(2, 2, 3), 2) if mode == "visible" else (None, 3)
    dtypes, both = (torch.bfloat16, *(torch.float32,) * 3), mode == "both"
    grad = torch.rand(4 if both else 2, 4, 5)
    for needs in ([True] * 4, [True, False, False, False], [False, True, True, False], [False, False, False, True]):
        opcheck(backend, OPS.place_tokens_backward, grad, masked, visible, both, count, *dtypes, needs)
