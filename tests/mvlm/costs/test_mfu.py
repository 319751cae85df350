"""MFU: the peak of a GPU by its name, FLOPs against those of a real step, and the field of a run's metrics."""

from dataclasses import replace

import pytest
import torch

from mvlm.costs import mfu
from mvlm.costs.flops import counter
from mvlm.costs.mfu import ModelFlopsUtilization, peak_flops
from mvlm.distributed.world import World
from mvlm.training.run import pretrain
from support.folders import rows_of
from support.models import micro_batch, micro_config, micro_model, pretrain_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
    ],
)
def test_peak_flops_of_a_gpu_by_its_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device("cuda", 0)) == peak
    assert peak_flops(CPU) is None


def test_mfu_is_a_fraction_of_the_peak_of_all_ranks(monkeypatch, scenes, tmp_path):
    """Two ranks of 1,000 FLOP/s each. Twice the rate is twice the MFU."""
    monkeypatch.setattr(mfu, "peak_flops", lambda _: 1e3)
    config = pretrain_config(scenes, tmp_path, max_steps=6)
    found = ModelFlopsUtilization(config, World(0, 2, 0, CPU))
    monkeypatch.setattr(
        mfu, "step_flops", lambda model, pairs, tokens, weights, parts: pairs * model.image_size * tokens
    )
    assert found.of_rate(8.0, 5.0, [1, 2]) == pytest.approx(8 * 160 / 2000)
    assert found.of_rate(16.0, 7.0, [3]) == pytest.approx(16 * 160 / 2000)  # counted once
    stages = ModelFlopsUtilization(replace(config, stages=("0:16", "3:32")), World(0, 2, 0, CPU))
    assert stages.of_rate(8.0, 5.0, [1, 2, 3]) == pytest.approx(8 * 80 / 2000)
    assert stages.of_rate(8.0, 5.0, [3, 4, 5]) == pytest.approx(8 * (80 + 160 + 160) / 3 / 2000)


@pytest.mark.slow
def test_flops_per_pair_equal_those_of_a_real_step(scenes, tmp_path):
    """Against a step on real tensors, with captions of 7 tokens."""
    config = pretrain_config(scenes, tmp_path, model=micro_config(), batch_size=4)
    counted = mfu.flops_per_pair(config, 7.0)
    model = micro_model()
    batch, masks = micro_batch((7, 7, 7, 7), config=model.config)
    with counter() as real:
        model(batch, masks, plan="fast").total.backward()
    assert counted == pytest.approx(real.get_total_flops() / 4, rel=0.05)


@pytest.mark.slow
def test_run_logs_mfu_if_the_peak_is_known(monkeypatch, scenes, tmp_path):
    monkeypatch.setattr(mfu, "peak_flops", lambda _: 1e12)
    config = pretrain_config(scenes, tmp_path / "run", max_steps=2)
    pretrain(config)
    rows = rows_of(config.out)
    operations = [row["mfu"] * 1e12 / row["pairs_per_s"] for row in rows]
    assert operations[0] == pytest.approx(operations[1], rel=1e-9)
    assert 1e5 < operations[0] < 1e9
