"""Arithmetic of the cluster plan by hand, and its output against docs/distributed.md."""

import re
import shlex
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import (
    ClusterSetting,
    exchange_bytes,
    gpu_memory,
    parse_count,
    parse_gpus,
    rank_step_cost,
    scaling,
    step_seconds,
)
from mvlm.costs.step_cost import StepCost
from mvlm.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "distributed.md"
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


def test_exchange_bytes_by_hand():
    """Other GPUs have 127 x 100 pairs, each with two embeddings (256,) and features (197 + 40, 768)."""
    assert exchange_bytes(setting()) == pytest.approx(
        {"embeddings": 12700 * 2 * 256 * 4, "features": 12700 * (197 + 40) * 768 * 4}
    )
    assert exchange_bytes(setting(local_negatives=True))["features"] == 0
    assert set(exchange_bytes(setting(per_node=1, nodes=1)).values()) == {0}


def test_step_seconds_by_hand():
    times = step_seconds(setting(mfu=0.5), FOUND)
    assert times["forward"] == pytest.approx(1e14 / (0.5 * 989e12))
    assert times["backward"] == pytest.approx(2e14 / (0.5 * 989e12))
    # All-reduce of 4 GB: 7/8 of it twice over NVLink, 15/16 twice over eight adapters; backward takes longer.
    assert times["backward"] > 2 * 4e9 * (7 / 8 / 450e9 + 15 / 16 / (8 * 50e9))
    assert times["gradients, not overlapped"] == 0
    assert times["embeddings and features"] == pytest.approx(2 * sum(exchange_bytes(setting()).values()) / 400e9)
    slow = step_seconds(setting(mfu=0.5), StepCost(10**11, FOUND.forward, FOUND.backward, 0, {}))
    wanted = 2 * 4e11 * (7 / 8 / 450e9 + 15 / 16 / (8 * 50e9)) - times["backward"]
    assert slow["gradients, not overlapped"] == pytest.approx(wanted)
    assert times["step"] == pytest.approx(sum(time for name, time in times.items() if name != "step"))


def test_scaling_keeps_the_pairs_of_a_gpu():
    rows = scaling(setting(), FOUND)
    assert [(gpus, batch) for gpus, batch, _, _ in rows] == [(8 * 2**k, 800 * 2**k) for k in range(8)]
    shares = [share for _, _, _, share in rows]
    assert shares == sorted(shares, reverse=True)


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


@pytest.mark.parametrize("words", [("--epochs", "-1"), ("--epochs", "nan"), ("--loader-rate", "-5")])
def test_plan_refuses_epochs_and_rates_out_of_range(words):
    with pytest.raises(ConfigError, match="plan: wanted --epochs above 0 and --loader-rate at least 0, got"):
        cli.run_command(["plan", "--gpus", "8", "--data", "1M", *words])
