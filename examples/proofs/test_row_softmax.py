"""Proof of the tutorial's softmax: values, bytes, and equal bits."""

import pytest
import torch
from row_softmax import row_softmax

from triton_proof.plugin import Proof


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 781), (5, 64), (1, 1), (17, 1000)], ids=str)
def test_values(shape: tuple[int, int], dtype: torch.dtype, proof: Proof) -> None:
    x = proof.guarded((torch.randn(shape) * 5).to(dtype))
    wanted = torch.softmax(x.double(), dim=1)
    torch.testing.assert_close(
        row_softmax(x).double(), wanted, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-7
    )


def test_rows_of_a_wider_matrix(proof: Proof) -> None:
    x = proof.guarded(torch.randn(4, 300))[:, 100:250]
    torch.testing.assert_close(row_softmax(x), torch.softmax(x, dim=1))


def test_each_element_is_read_and_written_once(proof: Proof) -> None:
    x = torch.randn(17, 1000)
    row_softmax(x)
    assert proof.bytes_moved() in (None, 2 * x.numel() * x.element_size())


def test_equal_bits(proof: Proof) -> None:
    x = torch.randn(17, 1000)
    proof.repeats(lambda: row_softmax(x))
