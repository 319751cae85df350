"""The objectives of pretraining: their weights in a run, and the distance of --keep-start against numpy."""

from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from mvlm.config.groups import ObjectiveSettings
from mvlm.config.ranges import COMPARES
from mvlm.errors import ConfigError
from mvlm.objectives.pretraining import OBJECTIVES, KeepStart, objectives_of
from mvlm.objectives.step import MicrobatchObjective
from support.models import micro_batch, micro_model, pretrain_config, weighted


def test_every_objective_has_a_setting_a_curve_and_modules():
    """The setting of one that compares pairs says so."""
    config = pretrain_config(Path("data"), Path("out"), mlm_weight=0.5, itm_weight=0.0)
    assert [(x.name, x.weight) for x in objectives_of(config)] == [("mlm", 0.5), ("mim", 1), ("itc", 1), ("itm", 0)]
    model = micro_model()
    for kind in OBJECTIVES:
        setting = ObjectiveSettings.__annotations__[f"{kind.name}_weight"]
        assert (COMPARES in get_args(setting)) == (not issubclass(kind, MicrobatchObjective))
        assert kind.curve
        assert all(hasattr(model, name) for name in kind.trains)


def test_an_objective_that_is_off_by_default_takes_part_with_a_weight(monkeypatch):
    monkeypatch.setattr(ObjectiveSettings, "itm_weight", 0.0)
    found = (
        objectives_of(pretrain_config(Path("data"), Path("out"), itm_weight=x, mim_weight=0.0)) for x in (0.0, 0.5)
    )
    assert [[x.weight for x in objectives] for objectives in found] == [[1, 0, 1], [1, 0, 1, 0.5]]


def test_one_pair_is_refused_where_an_objective_compares_pairs():
    alone = {"batch_size": 1, "itm_weight": 0.0}
    pretrain_config(Path("data"), Path("out"), **alone, itc_weight=0.0)
    with pytest.raises(ConfigError, match=r"batch_size: .*itc_weight"):
        pretrain_config(Path("data"), Path("out"), **alone)


@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_keep_start_is_the_distance_of_numpy(plan):
    """KL divergences from the start's probabilities, and squared distances of embeddings: means of both directions."""
    model, start = micro_model(), micro_model(seed=1)
    start.log_scale.data += 0.3
    batch, masks = micro_batch()

    def embeddings(of) -> tuple[np.ndarray, np.ndarray]:
        images = of.embed_image(of.encode_image(batch.images))
        texts = of.embed_text(of.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)[0])
        return images.detach().numpy(), texts.detach().numpy()

    own, others = embeddings(model), embeddings(start)
    wanted = sum(((a - b) ** 2).sum(1).mean() for a, b in zip(own, others, strict=True))
    scores = [np.exp(of.log_scale.item()) * (x @ y.T) for of, (x, y) in ((model, own), (start, others))]
    for transposed in (False, True):
        q, p = (np.exp(x.T if transposed else x) for x in scores)
        q, p = q / q.sum(1, keepdims=True), p / p.sum(1, keepdims=True)
        wanted += (p * np.log(p / q)).sum() / len(p)
    alone = model(batch, masks, plan=plan, objectives=weighted(0, 0, 1, 0)).total
    objectives = *weighted(0, 0, 1, 0), KeepStart(3.0, start=start)
    found = model(batch, masks, plan=plan, objectives=objectives)
    assert (found.total - alone).item() == pytest.approx(3 * wanted / 2, rel=1e-9)
    assert "kept" not in found
    itself = model(batch, masks, plan=plan, objectives=(*weighted(0, 0, 1, 0), KeepStart(3.0, start=model)))
    assert itself.total.item() == pytest.approx(alone.item(), abs=1e-12)
