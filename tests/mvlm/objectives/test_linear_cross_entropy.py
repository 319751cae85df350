"""Fused linear layer and cross-entropy against numpy in float64, one row at a time."""

from importlib import import_module

import numpy as np
import pytest
import torch

from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from support.models import Largest

module = import_module("mvlm.objectives.linear_cross_entropy")  # the room's face has a function of this name


def random_inputs(rows: int, width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((rows, width), (vocabulary, width), (vocabulary,))
    )
    return x, weight, bias, torch.randint(0, vocabulary, (rows,), generator=generator)


def in_numpy(x, weight, bias, targets, weights=None):
    """Loss, accuracy and the gradients of x, weight and bias, from the definition: a mean, or a sum by weights."""
    x, weight, bias = (t.detach().double().numpy() for t in (x, weight, bias))
    known = [i for i, t in enumerate(targets.tolist()) if t != -100]
    loss, right, dx, dw, db = 0.0, 0, np.zeros_like(x), np.zeros_like(weight), np.zeros_like(bias)
    for i in known:
        share = 1 / len(known) if weights is None else weights[i].item()
        logits = weight @ x[i] + bias
        right += int(logits.argmax()) == int(targets[i])
        p = np.exp(logits - logits.max())
        p /= p.sum()
        loss -= np.log(p[targets[i]]) * share
        p[targets[i]] -= 1
        dx[i] = p @ weight * share
        dw += np.outer(p, x[i]) * share
        db += p * share
    return loss, right / len(known), dx, dw, db


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("unknown", [[], [0, 4, 6]])
@pytest.mark.parametrize("weighted", [False, True])
def test_linear_cross_entropy_against_numpy(monkeypatch, chunk, unknown, weighted):
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", {"cpu": chunk * 11})
    x, weight, bias, targets = random_inputs(7)
    targets[3:6] = (x @ weight.T + bias).argmax(1)[3:6]  # so that some rows are correct
    targets[unknown] = -100
    weights = torch.tensor([0.5, 2.0, 3.0, 0.0, 1.0, 0.25, 1.5], dtype=torch.float64) if weighted else None
    loss, accuracy = linear_cross_entropy(x, weight, bias, targets, weights)
    fixed = linear_cross_entropy(x.detach(), weight.detach(), bias.detach(), targets, weights)
    assert torch.equal(fixed[0], loss)  # computes no gradients
    (2.5 * loss).backward()
    wanted, share, *gradients = in_numpy(x, weight, bias, targets, weights)
    assert 0 < share < 1
    assert accuracy.item() == pytest.approx(share, rel=1e-15)
    assert not accuracy.requires_grad
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-13)
    for parameter, gradient in zip((x, weight, bias), gradients, strict=True):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), 2.5 * gradient, atol=1e-13)


def test_linear_cross_entropy_in_bf16_is_as_exact_as_torch():
    """Under autocast, loss and weight gradient are no further from float64 than those of torch."""
    x, weight, bias, targets = random_inputs(40, 32, 64, torch.float32)
    wanted, _, _, wanted_dw, _ = in_numpy(x, weight, bias, targets)
    errors = []
    for fused in (True, False):
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            if fused:
                loss, _ = linear_cross_entropy(x, weight, bias, targets)
            else:
                logits = torch.nn.functional.linear(x, weight, bias)
                loss = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss.backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        errors.append((abs(loss.item() - wanted), np.abs(weight.grad.numpy() - wanted_dw).max()))
    assert errors[0][0] <= 2 * errors[1][0] + 1e-3
    assert errors[0][1] <= 2 * errors[1][1]


def test_the_full_logits_never_exist(monkeypatch):
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", {"cpu": 4 * 50})
    x, weight, bias, targets = random_inputs(100, 3, 50)
    with Largest() as largest:
        linear_cross_entropy(x, weight, bias, targets)[0].backward()
    assert largest.elements <= max(4 * 50, x.numel(), weight.numel())
