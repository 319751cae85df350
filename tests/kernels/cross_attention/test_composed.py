# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportCallIssue=false
import math

import pytest
import torch
import torch.nn.functional as F

from mvlm_kernels.cross_attention import attend_heads as attend
from support.models import normal


def prefix_mask(lengths: list[int], size: int) -> torch.Tensor:
    return torch.arange(size) < torch.tensor(lengths)[:, None]


SHAPES = [((4, 3, 37, 64), 37, None), ((4, 3, 37, 64), 20, [20, 11, 3, 1]), ((6, 2, 9, 32), 50, [50, 7, 1, 33, 2, 49])]


@pytest.mark.parametrize("dtype, mantissa", [(torch.bfloat16, 7), (torch.float32, 23)])
@pytest.mark.parametrize("shape, keys, lengths", SHAPES)
def test_attend_on_a_cpu_is_as_exact_as_sdpa(shape, keys, lengths, dtype, mantissa):
    """Output and gradients: at most twice the error of torch's own attention, and one unit in the last place."""
    batch, heads, queries, width = shape
    q, k, v, out = (
        normal(batch, heads, rows, width, seed=seed).to(dtype)
        for seed, rows in enumerate((queries, keys, keys, queries))
    )
    mask = None if lengths is None else prefix_mask(lengths, keys)
    wide = None if mask is None else mask[:, None, None, :]

    def outputs(function, precision):
        inputs = [x.to(precision).requires_grad_() for x in (q, k, v)]
        result = function(*inputs)
        result.backward(out.to(precision))
        return [result.detach(), *(x.grad for x in inputs)]

    def exact(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(width)
        scores = scores if wide is None else scores.masked_fill(~wide, float("-inf"))
        return scores.softmax(-1) @ v

    wanted = outputs(exact, torch.float64)
    ours = outputs(lambda q, k, v: attend(q, k, v, mask), dtype)
    peers = outputs(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=wide), dtype)
    for name, true, found, peer in zip(("out", "dq", "dk", "dv"), wanted, ours, peers, strict=True):
        assert found.dtype == dtype
        error, peer_error = ((x.double() - true).abs().max().item() for x in (found, peer))
        ulp = 2.0 ** (math.floor(math.log2(true.abs().max().item())) - mantissa)
        assert error <= 2 * peer_error + ulp, (name, error, peer_error, ulp)
