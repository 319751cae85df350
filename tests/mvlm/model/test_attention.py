# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportCallIssue=false
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvlm.model.attention import Attention, FeedForward, TextPooling
from mvlm_kernels.cross_attention import attend_heads as attend
from support.models import normal


def attend_in_loops(q, k, v, key_mask=None) -> np.ndarray:
    """float64 attention, one query of one head of one sample at a time, over the keys that exist."""
    q, k, v = (x.detach().double().numpy() for x in (q, k, v))
    batch, heads, queries, width = q.shape
    found = np.zeros((batch, heads, queries, v.shape[-1]))
    for b in range(batch):
        keys = [j for j in range(k.shape[2]) if key_mask is None or key_mask[b, j]]
        for h in range(heads):
            for i in range(queries):
                scores = np.array([q[b, h, i] @ k[b, h, j] / math.sqrt(width) for j in keys])
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                found[b, h, i] = sum(w * v[b, h, j] for w, j in zip(weights, keys, strict=True))
    return found


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
    np.testing.assert_allclose(wanted[0].numpy(), attend_in_loops(q, k, v, mask), atol=1e-12)
    ours = outputs(lambda q, k, v: attend(q, k, v, mask), dtype)
    peers = outputs(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=wide), dtype)
    for name, true, found, peer in zip(("out", "dq", "dk", "dv"), wanted, ours, peers, strict=True):
        assert found.dtype == dtype
        error, peer_error = ((x.double() - true).abs().max().item() for x in (found, peer))
        ulp = 2.0 ** (math.floor(math.log2(true.abs().max().item())) - mantissa)
        assert error <= 2 * peer_error + ulp, (name, error, peer_error, ulp)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_module_against_loops_over_heads(masked):
    module = Attention(12, 3).double()
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=10 + seed))
    x, memory = normal(2, 4, 12), normal(2, 5, 12, seed=1)
    mask = prefix_mask([5, 2], 5) if masked else None

    def project(layer, rows):
        return rows.numpy() @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()

    query, key, value = project(module.query, x), project(module.key, memory), project(module.value, memory)
    heads_joined = np.zeros((2, 4, 12))
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)  # head h owns features 4h to 4h+3
        heads = [torch.from_numpy(y[:, None, :, part]) for y in (query, key, value)]
        heads_joined[:, :, part] = attend_in_loops(*heads, mask)[:, 0]
    wanted = project(module.out, torch.from_numpy(heads_joined))
    np.testing.assert_allclose(module(x, memory, mask).rows.detach().numpy(), wanted, atol=1e-12)


def test_gradients_of_feed_forward_are_those_of_autograd_of_the_exact_gelu():
    layer = FeedForward(6).double()
    x = normal(5, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    weights = normal(5, 3, 6, seed=1)
    (layer(x) * weights).sum().backward()
    found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    (layer.down(F.gelu(layer.up(x))) * weights).sum().backward()
    for p, gradient in zip(layer.parameters(), found, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(gradient, p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_attend_first_row_is_attention_of_the_first_row(padded):
    """Output and gradients are the same. The key bias is left out: its gradient is zero, up to rounding."""
    torch.manual_seed(0)
    attention = Attention(12, 3).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    x = torch.randn(4, 6, 12, dtype=torch.float64, requires_grad=True)
    key_mask = torch.arange(6) < torch.tensor([6, 1, 3, 5])[:, None] if padded else None
    weights = torch.randn(4, 12, dtype=torch.float64)
    gradients = []
    for found in (
        attention(x[:, :1], x, key_mask).rows[:, 0],
        attention.attend_first_row(x[:, 0], x, key_mask).rows,
    ):
        attention.zero_grad()
        x.grad = None
        (found * weights).sum().backward()
        assert x.grad is not None
        gradients.append(
            [
                found.detach(),
                x.grad.clone(),
                *(p.grad.clone() for p in attention.parameters() if p.grad is not None and p is not attention.key.bias),
            ]
        )
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_text_pooling_against_loops():
    """One caption, one image and one head at a time, in numpy."""
    torch.manual_seed(0)
    pooling = TextPooling(8, 2, 6).double()
    v, texts = normal(3, 5, 8), torch.nn.functional.normalize(normal(4, 6, seed=1), dim=-1)
    found = pooling.similarity(v, texts).detach().numpy()
    weights = {name: p.detach().numpy() for name, p in pooling.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    for i in range(3):
        for j in range(4):
            q, pooled = linear("query", texts[j].numpy()), np.zeros(8)
            keys, values = ([linear(name, row) for row in v[i].numpy()] for name in ("key", "value"))
            for head in (slice(0, 4), slice(4, 8)):
                scores = np.array([q[head] @ key[head] / 2 for key in keys])
                p = np.exp(scores - scores.max())
                pooled[head] = sum(a * value[head] for a, value in zip(p / p.sum(), values, strict=True))
            u = linear("out", pooled)
            assert found[i, j] == pytest.approx(u @ texts[j].numpy() / np.linalg.norm(u), abs=1e-12)
