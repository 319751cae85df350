"""Muon: its iterations against singular values in float64, its updates against torch's own Muon, and its guards."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mvlm.config.pretrain import PretrainConfig
from mvlm.training.muon import GuardedMuon, orthogonalize
from mvlm.training.optimizer import make_optimizer
from support.models import micro_model, pretrain_config

CPU = torch.device("cpu")


def muon_config(**changes: object) -> PretrainConfig:
    return pretrain_config(Path(), Path(), **({"optimizer": "muon", "lr_muon": 0.02, "precision": "fp32"} | changes))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5), (1, 1, 7)])
def test_orthogonalize_maps_singular_values_by_the_published_polynomial(shape):
    """The same polynomial, five times, of singular values that numpy finds. Singular vectors stay."""
    matrices = np.random.default_rng(0).normal(size=shape)
    found = orthogonalize(torch.from_numpy(matrices)).numpy()
    for matrix, got in zip(matrices, found, strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values = values / np.sqrt((matrix**2).sum())
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(got, left @ np.diag(values) @ right, atol=1e-12)


def test_orthogonalized_matrices_have_singular_values_near_one():
    matrices = torch.randn(4, 32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices))
    assert 0.6 < values.min() < values.max() < 1.3


def test_orthogonalize_leaves_a_matrix_of_zeros():
    assert not orthogonalize(torch.zeros(2, 4, 6)).any()


@pytest.mark.parametrize("shape", [(24, 24), (32, 16), (16, 32)])
def test_updates_are_those_of_torchs_muon(shape):
    """torch iterates in bf16 and so does this; sums in another order leave its rounding."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for _ in range(11)]  # more than one batched product has
    ours, theirs = ([nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizer = GuardedMuon(
        [{"params": ours, "peak": 0.05, "muon": True}], lr=0.05, betas=(0.9, 0.98), weight_decay=0.1, fused=True
    )
    optimizer.precision = torch.bfloat16
    oracle = torch.optim.Muon(theirs, lr=0.05, weight_decay=0.1, momentum=0.95, nesterov=True)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        oracle.step()
    for a, b, first in zip(ours, theirs, start, strict=True):
        moved = (b.detach() - first).norm()
        assert (a - b).detach().norm() < 0.02 * moved


def test_muon_has_the_matrices_of_all_blocks_and_adamw_the_rest():
    model = micro_model(dtype=torch.float32)
    optimizer = make_optimizer(model, muon_config(lr_muon=0.02, weight_decay=0.06), CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    blocks = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".blocks." in name]
    assert {id(p) for p in muon} == {id(m.weight) for m in blocks}
    for group in optimizer.param_groups:
        if group["muon"]:
            assert (group["peak"], group["weight_decay"]) == (0.02, 0.06)
    everything = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(names)


def set_gradients(model: nn.Module, value: float | None = None) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient if value is None else torch.full_like(gradient, value)


def everything_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [value for p in model.parameters() for value in optimizer.state[p].values()]
    return [value.detach().clone() for value in (*model.parameters(), *states)]


def test_a_skipped_update_leaves_weights_and_momentum_even_with_nan_gradients():
    model = micro_model(dtype=torch.float32)
    optimizer = make_optimizer(model, muon_config(), CPU)
    set_gradients(model)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    before = everything_of(model, optimizer)
    set_gradients(model, float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(map(torch.equal, before, everything_of(model, optimizer)))
    optimizer.found_inf = torch.tensor(0.0)
    set_gradients(model)
    optimizer.step()
    after = everything_of(model, optimizer)
    assert not any(map(torch.equal, before, after))
    assert all(value.isfinite().all() for value in after)


def test_clipping_scales_the_gradients_that_enter_the_momentum():
    states = []
    for clipped in (False, True):
        model = micro_model(dtype=torch.float32)
        optimizer = make_optimizer(model, muon_config(), CPU)
        set_gradients(model)
        if clipped:
            optimizer.clip(torch.tensor(8.0), 2.0)
        else:
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= 4
        optimizer.step()
        states.append(everything_of(model, optimizer))
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_parameters_without_a_gradient_are_left_alone():
    model = micro_model(dtype=torch.float32)
    optimizer = make_optimizer(model, muon_config(), CPU)
    set_gradients(model)
    alone = model.get_parameter("image_encoder.blocks.0.attention.query.weight")
    alone.grad = None
    before = alone.detach().clone()
    optimizer.step()
    assert torch.equal(before, alone)
    assert not optimizer.state[alone]
