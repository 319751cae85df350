"""Edges of ``gather_patches``: ids outside the image, pixels far apart."""

from functools import partial

import torch

from emulator.edges import Calls
from mvlm_kernels import gather_patches
from mvlm_kernels.case import Draw
from mvlm_kernels.gather_patches.cases import oracle
from triton_proof.allocations import guarded
from triton_proof.driver import changed

FAST = {"bad-ids"}


def bad_ids() -> None:
    """An id outside the image reads nothing, gives NaN, and gets no gradient."""
    images = guarded(torch.rand(1, 2, 4, 4)).requires_grad_()
    out = gather_patches(images, torch.tensor([[1, -1, 4, 2**31 - 1, 3]]), 2)
    assert out[0, 1:4].isnan().all()
    torch.testing.assert_close(out[:, [0, 4]], gather_patches(images, torch.tensor([[1, 3]]), 2))
    (grad,) = torch.autograd.grad(out, images, torch.ones_like(out))
    assert grad[0, :, :2, :2].eq(0).all()
    assert grad[0, :, 2:, 2:].eq(1).all()


def far_apart(stride: tuple[int, ...]) -> None:
    """Pixels more than 2^31 elements apart."""
    size = (2, 3, 2, 2)
    # Pages that nobody touches cost address space and no memory. Race checks would double it.
    with changed(checks=False):
        storage = torch.empty(1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)), dtype=torch.uint8)
        images = storage.as_strided(size, stride)
        images.copy_(Draw("cpu").images(*size, torch.uint8))
        out = gather_patches(images, None, 1)
    torch.testing.assert_close(out.double(), oracle(images, None, 1), rtol=1e-6, atol=0)


def calls() -> Calls:
    yield "bad-ids", bad_ids
    for stride in ((2**31 + 64, 4, 2, 1), (16, 2**30 + 8, 2, 1), (16, 8, 2**31 + 8, 1)):
        yield f"far-apart/{stride}", partial(far_apart, stride)
