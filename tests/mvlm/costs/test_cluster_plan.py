"""Arithmetic of the cluster plan by hand, and its output against docs/guides/many_gpus.md."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import (
    ClusterSetting,
    format_plan,
    gpu_memory,
    limits,
    most_logits,
    parse_count,
    parse_gpus,
    planned_step,
    rank_step_cost,
    scaling,
)
from mvlm.costs.recorded_step import RecordedStep, logit_work
from mvlm.costs.recording import Collective, Event
from mvlm.costs.step_cost import StepCost
from mvlm.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "many_gpus.md"
FOUND = StepCost(
    parameters=10**9, forward=10**14, backward=2 * 10**14, peak=3 * 10**9, parts={"image_encoder": 3 * 10**9}
)


def setting(**changes) -> ClusterSetting:
    values = {"model": MaskVLMConfig.preset("base"), "gpu": "H100", "per_node": 8, "nodes": 16, "batch_size": 12800}
    return ClusterSetting(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_gpu_memory_by_part():
    rows = gpu_memory(setting(), FOUND)
    assert list(rows.values()) == [4e9, 4e9, 8e9, 3e9]
    sharded = gpu_memory(setting(sharded=True), FOUND)
    assert [sharded[name] for name in rows] == [0.5e9, 0.5e9, 1e9, 3e9]


def test_one_gpu_without_microbatches_has_the_logits_of_all_pairs_at_once():
    one = setting(per_node=1, nodes=1, batch_size=8192)
    assert most_logits(one) == 8192 * 8192
    others = replace(one, accumulate=2), replace(one, per_node=2), replace(one, batch_size=64)
    assert {most_logits(other) for other in others} == {16 * 1024**2}  # the blocks of docs/explain/global_batch.md


def record(gradients: float = 4e9, gathered: float = 1e6) -> RecordedStep:
    """A gather that is waited for at once, in the middle of forward, and gradients that are reduced at the end."""
    moved = [
        Collective("all-gather", "embeddings", round(gathered), 128),
        Collective("all-reduce", "gradients", round(gradients), 128),
    ]
    events = [Event("start", 10, False, 0), Event("wait", 10, False, 0), Event("start", 90, False, 1)]
    return RecordedStep(moved, events, 100)


@pytest.mark.slow
def test_planned_step_by_hand():
    planned = planned_step(setting(mfu=0.5), FOUND, record())
    assert planned.forward == pytest.approx(1e14 / (0.5 * 989e12))
    assert planned.backward == pytest.approx(2e14 / (0.5 * 989e12))
    computing = planned.forward + planned.backward
    # The gather of 128 MB enters a node through eight adapters. The all-reduce of 4 GB begins with a tenth of the
    # computation left.
    links = setting().links
    gather, reduction = (links.seconds(x) for x in record().collectives)
    assert gather == pytest.approx(128e6 * 127 / 128 / (0.92 * 400e9) + 14e-6 + 15 * 4e-6 + 112 * 1.9e-6)
    assert planned.times.waiting == pytest.approx({"embeddings": gather} if reduction < 0.1 * computing else {})
    late = planned_step(setting(mfu=0.5), FOUND, record(gradients=4e10))
    (_, reduction) = (links.seconds(x) for x in record(gradients=4e10).collectives)
    assert late.times.waiting == pytest.approx({"embeddings": gather, "gradients": reduction - 0.1 * computing})
    work = logit_work(setting().model, 100, 128)
    assert planned.logits == pytest.approx(work.flops / 67e12 + work.moved / 3.35e12)
    assert planned.step == pytest.approx(computing + sum(planned.times.waiting.values()) + planned.logits)
    assert planned.computing == pytest.approx(computing / planned.step)


@pytest.mark.slow
def test_half_the_pairs_take_half_the_computation_and_as_long_for_gradients():
    slow = record(gradients=1e11)
    whole, half = (planned_step(setting(), FOUND, slow, batch) for batch in (1.0, 0.5))
    assert half.forward == pytest.approx(whole.forward / 2)
    assert half.times.network["gradients"] == pytest.approx(whole.times.network["gradients"])
    assert half.times.waiting["gradients"] > whole.times.waiting["gradients"]


@pytest.mark.slow
def test_scaling_keeps_the_pairs_of_a_gpu():
    rows = scaling(setting(), FOUND, record(), most=1024)
    assert [(row.ranks, row.batch_size) for row, _ in rows] == [(8 * 2**k, 800 * 2**k) for k in range(8)]
    shares = [step.computing for _, step in rows]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_limits_are_where_the_step_falls_below_nine_tenths():
    found = limits(setting(batch_size=16384), FOUND, record())
    assert found.inter_node is not None
    for rate, enough in ((found.inter_node, False), (found.inter_node / 0.9, True)):
        step = planned_step(setting(inter_node=rate, batch_size=16384), FOUND, record())
        assert (step.computing >= 0.9) == enough
    computing = planned_step(setting(batch_size=16384), FOUND, record()).computing
    assert found.straggler == pytest.approx(computing / 0.9 - 1)
    assert found.pairs is not None
    for pairs, enough in ((found.pairs, False), (2 * found.pairs, True)):
        assert (planned_step(setting(batch_size=16384), FOUND, record(), pairs / 128).computing >= 0.9) == enough
    wide = record(gathered=2e7)
    found = limits(setting(batch_size=16384), FOUND, wide)
    assert found.gpus is not None
    for gpus, enough in ((found.gpus, False), (found.gpus // 2, True)):
        step = planned_step(setting(nodes=gpus // 8, batch_size=128 * gpus), FOUND, wide)
        assert (step.computing >= 0.9) == enough
        named = step.logits if found.gpus_by == "logits of ITC and draws" else step.times.waiting[found.gpus_by[12:]]
        assert named == max(step.logits, *step.times.waiting.values())


@pytest.mark.slow
def test_a_step_that_is_below_already_names_only_the_number_of_gpus():
    found = limits(setting(inter_node=1e8), FOUND, record(gradients=1e11))
    assert (found.inter_node, found.straggler, found.pairs) == (None, None, None)
    assert found.gpus_by == "waiting for gradients"
    assert found.gpus == setting().ranks


def test_parse_gpus_and_parse_count_refuse_other_forms():
    assert (parse_gpus(("8", "x", "16")), parse_gpus(("4X2",)), parse_gpus(("8",))) == ((8, 16), (4, 2), (8, 1))
    assert (parse_count("400M"), parse_count("3.2k"), parse_count("7")) == (400_000_000, 3200, 7)
    for words in (("8 x 16",), ("8x16",), ("8 X 16",), ("8", "x16"), (" 8x ", "16")):
        assert parse_gpus(words) == (8, 16)
    for words in (("8", "16x"), ("8", "16"), ("8 16",), ("1 6 x 2",), ("",), ("0", "x", "4"), ("eight",), ("9" * 20,)):
        with pytest.raises(ConfigError, match="gpus: wanted GPUs per node x nodes"):
            parse_gpus(words)
    for text in ("400X", "0", "-3", "M"):
        with pytest.raises(ConfigError, match="data: wanted a number of pairs"):
            parse_count(text)
    with pytest.raises(ConfigError, match="wanted a multiple of 128 GPUs x 3 microbatches = 384, got 12800"):
        rank_step_cost(setting(accumulate=3))
    with pytest.raises(ConfigError, match="wanted --gpu one of A100, H100, H200, B200"):
        cli.run_command(["plan", "--gpus", "8", "--data", "1M", "--gpu", "H1000"])


@pytest.mark.slow
def test_page_shows_the_output_of_mvlm_plan(capsys):
    """Figures within 3 %: a better kernel may change them a little, an error changes them more."""
    command, shown = re.findall(r"^    (mvlm plan .*?)$.*?^```text\n(.*?)^```", PAGE.read_text(), re.M | re.S)[0]
    cli.run_command(shlex.split(command)[1:])
    printed = capsys.readouterr().out
    number = r"\d[\d,]*(?:\.\d+)?"
    assert re.sub(rf"\s*{number}", "#", printed) == re.sub(rf"\s*{number}", "#", shown)
    for ours, theirs in zip(re.findall(number, printed), re.findall(number, shown), strict=True):
        a, b = (float(x.replace(",", "")) for x in (ours, theirs))
        assert a == pytest.approx(b, rel=0.03, abs=1.01 if "." not in ours else 0.06), (ours, theirs)


@pytest.mark.parametrize(
    "words", [("--epochs", "-1"), ("--epochs", "nan"), ("--loader-rate", "-5"), ("--inter-node", "inf")]
)
def test_plan_refuses_epochs_and_rates_out_of_range(words):
    with pytest.raises(
        ConfigError, match="plan: wanted --epochs above 0, --loader-rate and --inter-node at least 0, got"
    ):
        cli.run_command(["plan", "--gpus", "8", "--data", "1M", *words])


@pytest.mark.slow
def test_a_plan_assumes_no_longer_captions_than_the_model_takes():
    model = replace(MaskVLMConfig.preset("tiny"), text_length=8)
    found = format_plan(setting(model=model, nodes=2, batch_size=256), 10**6, 1)
    assert "of 8 tokens (at most 8)" in found
