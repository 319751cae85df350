"""FLOPs and time of an update."""

import json
from dataclasses import replace

import pytest

from mvlm.costs.mfu import flops_per_pair
from mvlm.errors import ConfigError
from mvlm.objectives.pretraining import objectives_of
from mvlm.studies import update_costs
from mvlm.studies.update_costs import FILE, measure_steps, step_times, steps_and_flops, update_flops
from support.models import micro_batch, micro_config, micro_model, pretrain_config

ONE, EIGHT = {"batch_size": 16}, {"batch_size": 16, "accumulate": 8}


@pytest.mark.slow
@pytest.mark.parametrize("unused", [{}, {"mim_weight": 0.0}])
def test_an_update_has_the_products_of_muon(scenes, tmp_path, unused):
    """By hand, of block matrices that a real step gives a gradient: x x', (x x')^2 and a product with x, 5 times."""
    config = pretrain_config(scenes, tmp_path, model=micro_config(), batch_size=4, optimizer="muon", **unused)
    model = micro_model()
    batch, masks = micro_batch((7, 7, 7, 7), config=model.config)
    model(batch, masks, plan="fast", objectives=objectives_of(config)).total.backward()
    muon = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.ndim == 2 and ".blocks." in name:
            short, long = sorted(parameter.shape)
            muon += 5 * (2 * short * short * long + 2 * short**3 + 2 * short * short * long)
    assert muon > 0
    steps = 4 * flops_per_pair(config, 7.0)
    assert update_flops(config, 7.0) == pytest.approx(steps + muon, rel=1e-9)
    assert update_flops(replace(config, optimizer="adamw"), 7.0) == steps


def test_a_budget_pays_the_updates_of_stages_at_their_own_cost(scenes, tmp_path, monkeypatch):
    """Images of 16 px cost 16, of 32 px 32; of nine updates three are at 16 px."""
    monkeypatch.setattr(update_costs, "update_flops", lambda config, tokens, model: float(model.image_size))
    config = pretrain_config(scenes, tmp_path, max_steps=1000, stages=("0:16", "3:32"))
    assert steps_and_flops(config, 7.0, {"steps": 9}) == (9, 3 * 16 + 6 * 32)
    assert steps_and_flops(config, 7.0, {"flops": 3 * 16 + 6.9 * 32}) == (9, 3 * 16 + 6 * 32)
    for flops, paid in ((40.0, 2), (60.0, 3)):
        with pytest.raises(ConfigError, match=f"behind the {paid} before its stage"):
            steps_and_flops(config, 7.0, {"flops": flops})
    with pytest.raises(ConfigError, match="wanted enough for one step of 32 FLOPs, got 31"):
        steps_and_flops(replace(config, stages=()), 7.0, {"flops": 31.0})


@pytest.mark.slow
def test_a_step_of_more_microbatches_takes_longer(scenes, tmp_path):
    """Eight, each with two forward passes, against one: twice as long at least, whatever else the machine does."""
    found = measure_steps(
        {name: pretrain_config(scenes, tmp_path, **own) for name, own in (("one", ONE), ("eight", EIGHT))}
    )
    assert found["eight"] > 2 * found["one"] > 0
    assert not list(tmp_path.iterdir())


def test_times_are_measured_once_and_arms_are_added_in_proportion(scenes, tmp_path, monkeypatch):
    asked = []

    def measured(configs):
        """A machine that is twice as slow at the second measurement."""
        asked.append(list(configs))
        return {name: config.batch_size * float(len(asked)) for name, config in configs.items()}

    monkeypatch.setattr(update_costs, "measure_steps", measured)
    arms = {f"of {n}": pretrain_config(scenes, tmp_path / "run", batch_size=n) for n in (2, 4, 8)}
    two = {name: arms[name] for name in ("of 2", "of 4")}
    assert step_times(two, tmp_path) == step_times(two, tmp_path) == {"of 2": 2.0, "of 4": 4.0}
    assert step_times(arms, tmp_path) == {"of 2": 2.0, "of 4": 4.0, "of 8": 8.0}
    assert asked == [["of 2", "of 4"], ["of 2", "of 8"]]
    assert json.loads((tmp_path / FILE).read_text())["machine"]
