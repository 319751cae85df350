"""The objectives of pretraining: their weights in a run, ITC in blocks of logits, and the distance of --keep-start."""

from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mvlm.config.groups import ObjectiveSettings
from mvlm.config.ranges import COMPARES
from mvlm.distributed.collectives import GlobalBatchLayout, all_reduce
from mvlm.distributed.world import join_ranks
from mvlm.errors import ConfigError
from mvlm.model import plain
from mvlm.objectives import step
from mvlm.objectives.pretraining import ALL, ITC, OBJECTIVES, KeepStart, objectives_of
from mvlm.objectives.step import Features, MicrobatchObjective, Step
from mvlm_kernels import registration
from support.faults.forks import ended_well, in_ranks
from support.microbatches import LENGTHS, piece, whole_batch
from support.models import micro_batch, micro_model, normal, pretrain_config, weighted


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


VARIANTS = {"infonce": {}, "sigmoid": {"contrastive": "sigmoid"}, "shared": {}}


def contrast(
    layout: GlobalBatchLayout, variant: str, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], Tensor]:
    """ITC of a rank's part of 16 pairs: loss, accuracy and gradients of all pairs, and this rank's draws."""
    model, size = micro_model(**VARIANTS[variant]), layout.pairs
    micro = [piece(*whole_batch(), (a * layout.ranks + layout.rank) * size, size) for a in range(layout.microbatches)]
    features = Features(Step(ALL, plain, layout, 3, 5, micro), model, micro, [])
    indices = layout.own_indices(torch.device("cpu"))
    every = [F.normalize(normal(len(LENGTHS), 6, seed=seed), dim=1).to(dtype).requires_grad_() for seed in (1, 2)]
    features._embeddings.update(image=every[0][indices], text=every[1][indices])
    parameters = [x for name, x in model.named_parameters() if name in ("log_scale", "logit_bias")]
    with patch.object(Features, "views", lambda *_: [("image", "text")]):
        loss, accuracy = ITC(shared_positives=variant == "shared").shares(features)
    grads = torch.autograd.grad(loss, every + parameters)
    return [all_reduce(x.detach().clone(), layout).wait() for x in (loss, accuracy, *grads)], features.draws


ALONE, MICROBATCHES = GlobalBatchLayout(0, 1, 1, 16), GlobalBatchLayout(0, 1, 2, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_itc_in_blocks_is_that_of_all_logits_at_once(variant):
    """On one rank and on two, with microbatches. The draws are equal to the bit, in float32 too."""

    def check(found: tuple[list[Tensor], Tensor], rows: Tensor) -> None:
        torch.testing.assert_close(found[0], wanted, rtol=0, atol=1e-13)
        assert torch.equal(found[1], draws[rows])

    def work() -> None:
        world = join_ranks("cpu")
        for microbatches in (1, 2):
            layout = GlobalBatchLayout(world.rank, 2, microbatches, 8 // microbatches)
            check(contrast(layout, variant), layout.own_indices(torch.device("cpu")))
        world.close()

    wanted, draws = contrast(ALONE, variant)
    assert torch.equal(contrast(ALONE, variant, torch.float32)[1], draws)
    with patch.object(step, "MAX_LOGITS", 16):
        check(contrast(MICROBATCHES, variant), torch.arange(16))
        assert torch.equal(contrast(MICROBATCHES, variant, torch.float32)[1], draws)
        assert [ended_well(pid) for pid in in_ranks(work, 2)] == [True] * 2


def test_itc_in_blocks_has_half_of_the_products(monkeypatch):
    """One forward and three backward, where both directions in blocks have eight, and six if the logits are kept."""
    monkeypatch.setattr(registration, "called_directly", lambda *_: True)  # so that the counter sees its products
    in_place: dict[Any, Any] = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
    found = []
    for most, in_blocks in ((16, True), (16, False), (1 << 20, False)):
        both = patch.object(step, "MAX_LOGITS", most), patch.object(Features, "in_blocks", in_blocks)
        with both[0], both[1], FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            contrast(MICROBATCHES, "infonce")
        found.append(counter.get_total_flops() / (2 * 16 * 16 * 6))
    assert found == [4, 8, 6]
