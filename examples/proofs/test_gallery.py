# pyright: reportMissingImports=false
"""Kernels that other people wrote, proved: `python -m triton_proof test_gallery.py` with the packages installed.

`pip install --no-deps liger-kernel==0.8.5 fla-core==0.6.0 einops` brings them. gallery.py plants a bug in each as well.
"""

import pytest
import torch
from fla.ops.utils.cumsum import chunk_local_cumsum_scalar
from fla.ops.utils.softmax import softmax_bwd, softmax_fwd
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction
from torch import Tensor

from triton_proof.plugin import Proof

NARROW, ROWS = (3, 128), [(5, 257), (2, 1000)]
FUSED = pytest.mark.finding("reduction-bits")
IN_PLACE = pytest.mark.finding("race")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same inputs in every run, and so the same table."""
    torch.manual_seed(0)


def skip_interpreted(proof: Proof) -> None:
    if proof.name == "interpreted":
        pytest.skip("the kernel calls .to of a scalar argument, which is a Python float in Triton's interpreter")


def with_gradients(call, *inputs: Tensor) -> list[Tensor]:
    """The output of a call and the gradients of its inputs, for a gradient of sines."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    grad = torch.arange(1, 1 + out.numel(), dtype=torch.float64).sin().view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_close(got: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [*ROWS, pytest.param(NARROW, marks=FUSED)], ids=str)
def test_liger_rms_norm(shape: tuple[int, int], proof: Proof) -> None:
    """At 128 columns products are fused into the sum over a warp, so its lanes store sums of different bits."""
    skip_interpreted(proof)
    x, w = torch.randn(shape), torch.randn(shape[1])

    def call(x: Tensor, w: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)

    wanted = with_gradients(lambda x, w: torch.nn.functional.rms_norm(x, (shape[1],), w, 1e-6), x.double(), w.double())
    assert_close(with_gradients(call, x, w), wanted)
    proof.repeats(lambda: with_gradients(call, x, w))


@pytest.mark.parametrize("shape", [NARROW, *ROWS], ids=str)
def test_liger_swiglu(shape: tuple[int, int], proof: Proof) -> None:
    skip_interpreted(proof)
    a, b = torch.randn(shape), torch.randn(shape)
    wanted = with_gradients(lambda a, b: torch.nn.functional.silu(a) * b, a.double(), b.double())
    assert_close(with_gradients(LigerSiLUMulFunction.apply, a, b), wanted)


@pytest.mark.parametrize(
    "shape", [pytest.param(NARROW, marks=IN_PLACE), pytest.param(ROWS[0], marks=IN_PLACE), ROWS[1]], ids=str
)
def test_liger_cross_entropy(shape: tuple[int, int], proof: Proof) -> None:
    """In place, with more threads than columns: copies of a thread read what it has stored, and nobody uses that."""
    x, target = torch.randn(shape), torch.randint(0, shape[1], (shape[0],))
    target[0] = -100

    def call(x: Tensor) -> Tensor:
        return LigerCrossEntropyFunction.apply(x, target, None, -100, 0.0, 0.0, "mean", None, False)[0]

    wanted = with_gradients(lambda x: torch.nn.functional.cross_entropy(x, target), x.double())
    assert_close(with_gradients(call, x), wanted)


@FUSED
@pytest.mark.parametrize("shape", [NARROW, ROWS[0]], ids=str)
def test_fla_softmax(shape: tuple[int, int], proof: Proof) -> None:
    """Forward and backward, in each of the six configurations of the autotuner. The backward pass is fused as above."""
    x, grad = proof.guarded(torch.randn(shape) * 3), proof.guarded(torch.randn(shape))
    leaf = x.double().requires_grad_()
    wanted = torch.softmax(leaf, -1)
    wanted.backward(grad.double())
    probabilities = softmax_fwd(x)
    assert leaf.grad is not None
    assert_close([probabilities, softmax_bwd(probabilities, grad)], [wanted.detach(), leaf.grad])


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_fla_cumulative_sum(reverse: bool, proof: Proof) -> None:
    """Sums within chunks of 32 of 100 steps, in each of the four configurations of the autotuner."""
    x = proof.guarded(torch.randn(2, 100, 3))
    chunks = [c.flip(1).cumsum(1).flip(1) if reverse else c.cumsum(1) for c in x.double().split(32, 1)]
    assert_close([chunk_local_cumsum_scalar(x, 32, reverse=reverse)], [torch.cat(chunks, 1)])
