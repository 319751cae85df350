"""Learning rates, parameter groups and averaged weights; Muon against singular values and torch's own Muon."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.optim.swa_utils import AveragedModel

from mvlm.config.pretrain import PretrainConfig
from mvlm.training.optimizer import (
    ExponentialMovingAverage,
    GuardedMuon,
    learning_rate_factor,
    make_optimizer,
    orthogonalize,
)
from support.models import micro_model, pretrain_config


@pytest.mark.parametrize("steps, warmup, end", [(110, 10, 0.2), (50, 2, 0.0), (30, 0, 0.01), (7, 5, 0.5)])
def test_learning_rate_is_that_of_torchs_linear_and_cosine_schedulers(steps, warmup, end):
    config = PretrainConfig.preset(
        "tiny", data=Path("data"), out=Path("run"), max_steps=steps, warmup_steps=warmup, lr_end=end
    )
    peak = 3.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1) if warmup else None
    fall = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=end * peak)
    schedule = SequentialLR(optimizer, [rise, fall], milestones=[warmup]) if rise else fall
    for step in range(steps + 1):
        assert peak * learning_rate_factor(step, config) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        schedule.step()


def move_weights(model: nn.Module) -> None:
    """Change the weights as an update does."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def assert_equal_averages(average: ExponentialMovingAverage, oracle: AveragedModel) -> None:
    wanted = dict(oracle.module.named_parameters())
    assert average.tensors.keys() == wanted.keys()
    for name, value in average.tensors.items():
        torch.testing.assert_close(value, wanted[name].detach(), rtol=0, atol=1e-12)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()


def test_weight_average_is_torchs_with_the_decay_of_each_update(network):
    """Torch's EMA has no warm-up of its decay. Its AveragedModel takes any formula, and counts the updates."""

    def formula(mean: Tensor, weight: Tensor, updates: Tensor | int) -> Tensor:
        decay = min(0.7, float(updates) / (9 + float(updates)))
        return decay * mean + (1 - decay) * weight

    average = ExponentialMovingAverage(network, 0.7)
    oracle = AveragedModel(network, avg_fn=formula)
    oracle.update_parameters(network)
    for step in range(1, 41):
        move_weights(network)
        average.update(step)
        oracle.update_parameters(network)
        assert_equal_averages(average, oracle)


@pytest.mark.parametrize("cross_norm, own", [("post", {}), ("pre", {}), ("pre", {"lr_image": 2e-6, "lr_text": 0.0})])
def test_optimizer_decays_only_matrices_and_has_a_rate_for_each_module(cross_norm, own):
    """Weights of linear layers decay, and nothing else. The test knows them by the kind of module, the code by name."""
    model = micro_model(dtype=torch.float32, cross_norm=cross_norm)
    config = pretrain_config(Path(), Path(), lr_encoder=1e-5, lr_cross=3e-4, lr_pixels=7e-5, weight_decay=0.06, **own)
    optimizer = make_optimizer(model, config, torch.device("cpu"))
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    rates = {}
    for name, module in model.named_children():
        pixels = name in ("image_cross", "image_decoder", "pixel_head")
        encoders = {"image_encoder": own.get("lr_image", 1e-5), "text_encoder": own.get("lr_text", 1e-5)}
        rate = encoders.get(name, 7e-5 if pixels else 3e-4)
        rates |= {id(parameter): rate for parameter in module.parameters()}
    rates[id(model.log_scale)] = 3e-4

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen = []
    for group in optimizer.param_groups:
        assert group["betas"] == (0.9, config.beta2)
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.06 if id(parameter) in matrices else 0.0), name
            assert group["peak"] == rates[id(parameter)], name
            seen.append(id(parameter))
    assert len(seen) == len(set(seen))
    assert set(seen) == set(names)


CPU = torch.device("cpu")


def muon_config(**changes: object) -> PretrainConfig:
    return pretrain_config(Path(), Path(), **({"optimizer": "muon", "lr_muon": 0.02, "precision": "fp32"} | changes))


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (2, 12, 5), (1, 1, 7)])
def test_orthogonalize_maps_singular_values_by_the_published_polynomial(shape):
    """The oracle applies the polynomial five times to singular values that numpy finds. Singular vectors stay."""
    matrices = np.random.default_rng(0).normal(size=shape)
    found = orthogonalize(torch.from_numpy(matrices)).numpy()
    for matrix, got in zip(matrices, found, strict=True):
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        values = values / np.sqrt((matrix**2).sum())
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        np.testing.assert_allclose(got, left @ np.diag(values) @ right, atol=1e-12)
    assert not orthogonalize(torch.zeros(shape)).any()


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


@pytest.mark.parametrize("share", [None, 0.1])
def test_muon_has_the_matrices_of_all_blocks_and_adamw_the_rest(share):
    model = micro_model(dtype=torch.float32)
    own = {} if share is None else {"lr_image": share * 3e-4, "lr_cross": 3e-4}
    optimizer = make_optimizer(model, muon_config(lr_muon=0.02, weight_decay=0.06, **own), CPU)
    names = {id(p): name for name, p in model.named_parameters()}
    muon = [p for group in optimizer.param_groups if group["muon"] for p in group["params"]]
    blocks = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".blocks." in name]
    assert {id(p) for p in muon} == {id(m.weight) for m in blocks}
    for group in optimizer.param_groups:
        if group["muon"]:
            assert group["weight_decay"] == 0.06
            of_image = {names[id(p)].startswith("image_encoder.") for p in group["params"]}
            assert share is None or len(of_image) == 1
            assert group["peak"] == pytest.approx(0.002 if share and of_image == {True} else 0.02)
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


def test_an_update_skipped_for_nan_gradients_leaves_weights_and_momentum():
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
