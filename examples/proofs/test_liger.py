# pyright: reportMissingImports=false
"""Proof of Liger's layers (`pip install --no-deps liger-kernel`): RMSNorm, LayerNorm, SwiGLU, cross-entropy."""

import pytest
import torch
from torch import Tensor

from triton_proof.plugin import Proof

pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")

NARROW, ROWS = (3, 128), [(5, 257), (2, 1000)]
# Triton's interpreter hands Python floats to a kernel, which have no `.to`.
NOT_INTERPRETED = "the kernel calls .to of a scalar argument, which Triton's interpreter cannot"


def skip_interpreted(proof: Proof) -> None:
    if proof.name == "interpreted":
        pytest.skip(NOT_INTERPRETED)


def with_gradients(call, *inputs: Tensor) -> list[Tensor]:
    """The output of a call and the gradients of its inputs, for a gradient of sines."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    grad = torch.arange(out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*ROWS, pytest.param(NARROW, marks=pytest.mark.finding("race"))], ids=str)
def test_rms_norm(shape: tuple[int, int], proof: Proof) -> None:
    """At 128 columns products are fused into the sum over a warp, so its lanes store sums of different bits."""
    skip_interpreted(proof)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, w = torch.randn(shape), torch.randn(shape[1])

    def call(x: Tensor, w: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)

    wanted = with_gradients(lambda x, w: torch.nn.functional.rms_norm(x, (shape[1],), w, 1e-6), x.double(), w.double())
    assert_close(with_gradients(call, x, w), wanted)
    proof.repeats(lambda: with_gradients(call, x, w))


@pytest.mark.parametrize("shape", [*ROWS, pytest.param(NARROW, marks=pytest.mark.finding("race"))], ids=str)
def test_layer_norm(shape: tuple[int, int], proof: Proof) -> None:
    """At 128 columns products are fused into the sum over a warp, so its lanes store sums of different bits."""
    skip_interpreted(proof)
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, w, b = torch.randn(shape), torch.randn(shape[1]), torch.randn(shape[1])

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, w, b, 1e-6)

    wanted = with_gradients(
        lambda x, w, b: torch.nn.functional.layer_norm(x, (shape[1],), w, b, 1e-6), x.double(), w.double(), b.double()
    )
    assert_close(with_gradients(call, x, w, b), wanted)
    proof.repeats(lambda: with_gradients(call, x, w, b))


@pytest.mark.parametrize("shape", [NARROW, *ROWS], ids=str)
def test_swiglu(shape: tuple[int, int], proof: Proof) -> None:
    skip_interpreted(proof)
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    a, b = torch.randn(shape), torch.randn(shape)
    wanted = with_gradients(lambda a, b: torch.nn.functional.silu(a) * b, a.double(), b.double())
    assert_close(with_gradients(LigerSiLUMulFunction.apply, a, b), wanted)


IN_PLACE = pytest.mark.finding("global-race")


@pytest.mark.parametrize(
    "shape", [pytest.param(NARROW, marks=IN_PLACE), pytest.param(ROWS[0], marks=IN_PLACE), ROWS[1]], ids=str
)
def test_cross_entropy(shape: tuple[int, int], proof: Proof) -> None:
    """In place, with more threads than columns: copies of a thread read what it has stored, and nobody uses that."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    x, target = torch.randn(shape), torch.randint(0, shape[1], (shape[0],))
    target[0] = -100

    def call(x: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(x, target, None, -100, 0.0, 0.0, "mean", None, False)[0]

    wanted = with_gradients(lambda x: torch.nn.functional.cross_entropy(x, target), x.double())
    assert_close(with_gradients(call, x), wanted)
