"""Arithmetic of the cluster plan by hand and against the collectives of the code, and its output in the guide."""

import math
import re
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm import cli
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.cluster_plan import (
    BUCKET,
    MESSAGE,
    SIMPLE,
    ClusterSetting,
    Collective,
    collectives,
    format_plan,
    gpu_memory,
    most_logits,
    parse_count,
    parse_gpus,
    planned_step,
)
from mvlm.costs.step_cost import MemoryTracker, StepCost, StepShape, drawn_tokens, fake_step, step_cost
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_config

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "many_gpus.md"
FOUND = StepCost(
    parameters=10**9,
    trained=10**9,
    forward=10**14,
    backward=2 * 10**14,
    peak=3 * 10**9,
    parts={"image_encoder": 3 * 10**9},
)


def setting(**changes) -> ClusterSetting:
    values = {"model": MaskVLMConfig.preset("base"), "gpu": "H100", "per_node": 8, "nodes": 16, "batch_size": 12800}
    return ClusterSetting(**(values | changes))  # pyright: ignore[reportArgumentType]


def test_gpu_memory_by_part():
    rows = gpu_memory(setting(), FOUND)
    assert list(rows.values()) == [4e9, 4e9, 8e9, 3e9]
    assert list(gpu_memory(setting(), replace(FOUND, trained=10**8)).values()) == [4e9, 0.4e9, 0.8e9, 3e9]
    assert sum(gpu_memory(setting(), replace(FOUND, copies=10**9)).values()) == sum(rows.values()) + 1e9
    graphs = gpu_memory(setting(per_node=1, nodes=1, graphs=True), FOUND)
    assert sum(graphs.values()) == sum(rows.values()) + 3e9 + 8 * 4e9  # a second set of activations, and 8 of gradients
    sharded = gpu_memory(setting(sharded=True), FOUND)
    assert [sharded[name] for name in rows] == [0.5e9, 0.5e9, 1e9, 3e9]


def test_one_gpu_without_microbatches_has_the_logits_of_all_pairs_at_once():
    one = setting(per_node=1, nodes=1, batch_size=8192)
    assert most_logits(one) == 8192 * 8192
    others = replace(one, accumulate=2), replace(one, per_node=2), replace(one, batch_size=64)
    assert {most_logits(other) for other in others} == {16 * 1024**2}  # the blocks of docs/guides/many_gpus.md


def test_seconds_of_collectives_by_hand():
    """Links of 450 GB/s in a node and 50 GB/s between nodes; rings and trees of NCCL's three protocols."""
    large = Collective("all-gather", "embeddings", 10**9 // 8, 128)  # 16 GB for each, through eight adapters of a node
    wanted = 16e9 * 127 / 128 / 400e9 + 8.4e-6 + 15 * 14e-6 + 112 * 3.4e-6
    assert setting().seconds(large) == pytest.approx(wanted)
    small = Collective("all-gather", "embeddings", 8, 128)
    assert setting().seconds(small) == pytest.approx(6.6e-6 + 15 * 2.7e-6 + 112 * 1.08e-6, rel=1e-3)
    tree = 6.6e-6 + 2 * (7 * 1.08e-6 + math.log2(16) * 5e-6)
    assert setting().seconds(Collective("all-reduce", "", 28, 128)) == pytest.approx(tree, rel=1e-3)
    twice = Collective("all-reduce", "gradients", 10**10, 8, calls=2)
    wanted = 2 * (2 * 1e10 * 7 / 8 / 450e9 + 8.4e-6 + 2 * 7 * 3.4e-6)
    assert setting(nodes=1).seconds(twice) == pytest.approx(wanted)
    across = Collective("all-reduce", "gradients", 10**9, 16, across=True)
    assert setting(inter_node=25e9).seconds(across) == pytest.approx(2 * 1e9 * 15 / 16 / 25e9, rel=0.02)
    # Of 127 others 7 are in the node. What comes from the others enters through the rank's own adapter.
    moved = Collective("all-to-all", "features", 128 * 10**6, 128, senders=80)
    wanted = SIMPLE.start + SIMPLE.ring[1] + 80 * MESSAGE + 127e6 * (120 / 127) / 50e9
    assert setting().seconds(moved) == pytest.approx(wanted)
    assert setting().seconds(Collective("all-reduce", "gradients", 10**9, 1, across=True)) == 0


class Moved(MemoryTracker):
    """Bytes of this rank in each collective: of what it gives to a gather, else of what it gets."""

    def __init__(self, drawn_tokens: int) -> None:
        super().__init__(drawn_tokens)
        self.found: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::").strip("_")
            of = args[name == "allgather_base"]
            self.found[name, sum(x.nbytes for x in (of if isinstance(of, list) else [of]))] += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "microbatches", "pairs"), [(8, 2, 64), (512, 1, 64), (512, 1, 192)])
def test_planned_collectives_are_those_of_the_step(ranks, microbatches, pairs):
    """All but the gradients, recorded while the real step runs among simulated ranks. Each feature is drawn once.

    Of 98,304 pairs ITC's logits come in blocks.
    """
    model = micro_config(image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
    shape = StepShape(pairs=pairs, ranks=ranks, nodes=ranks // 8, microbatches=microbatches)
    with fake_step(model, shape) as (_, step), Moved(drawn_tokens(model, shape)) as moved:
        step()
    plan = setting(model=model, nodes=ranks // 8, batch_size=pairs * ranks * microbatches, accumulate=microbatches)
    planned = Counter()
    for x in collectives(plan, 0):
        name = {"all-gather": "allgather_base", "reduce-scatter": "reduce_scatter_base", "all-reduce": "allreduce"}
        if x.label not in ("gradients", "features", "verdict and figures"):
            planned[name[x.kind], x.size] += x.calls
    exact = Counter({key: calls for key, calls in moved.found.items() if key[0] != "alltoall_base"})
    assert exact == planned
    features = [x for x in collectives(plan, 0) if x.label == "features"]
    real = {size: calls for (name, size), calls in moved.found.items() if name == "alltoall_base"}
    assert sum(real.values()) == sum(x.calls for x in features)
    assert sum(size * calls for size, calls in real.items()) == pytest.approx(
        sum(x.size * x.calls for x in features), rel=0.05
    )
    assert not torch.distributed.is_initialized()


def test_each_gradient_is_reduced_once_and_shards_are_gathered_in_a_node():
    model = micro_config()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MaskVLM(model).parameters())
    whole = [x for x in collectives(setting(model=model), parameters) if x.label == "gradients"]
    assert sum(x.size * x.calls for x in whole) == pytest.approx(4 * parameters)
    assert max(x.size for x in whole) <= BUCKET
    shards = collectives(setting(model=model, sharded=True), parameters)
    for kind, ranks in (("reduce-scatter", 8), ("all-reduce", 16)):
        parts = [x for x in shards if x.label == "gradients" and x.kind == kind]
        assert sum(x.size * x.calls for x in parts) == pytest.approx(4 * parameters / 8)
        assert {x.ranks for x in parts} == {ranks}
    gathered = [x for x in shards if x.label == "parameters"]
    assert {x.ranks for x in gathered} == {8}
    # By hand: of every encoder block 12 C^2 + 13 C values of two bytes, for forward and backward; others have more.
    blocks, wide = model.image_layers + model.text_layers, model.width
    encoders = 2 * 2 * blocks * (12 * wide**2 + 13 * wide) / 8
    assert any(x.size * x.calls == pytest.approx(encoders) for x in gathered)
    assert sum(x.size * x.calls for x in gathered) >= 2 * 2 * parameters / 8 * 0.5


def test_parse_gpus_and_parse_count():
    for words in (("8", "x", "16"), ("8 x 16",), ("8x16",), ("8 X 16",), ("8", "x16"), (" 8x ", "16")):
        assert parse_gpus(words) == (8, 16)
    assert parse_gpus(("8",)) == (8, 1)
    assert (parse_count("400M"), parse_count("3.2k"), parse_count("7")) == (400_000_000, 3200, 7)


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        *((("--gpus", *x), "gpus") for x in (("8", "16x"), ("8", "16"), ("1 6 x 2",), ("0", "x", "4"), ("9" * 20,))),
        *((("--data", data), "data") for data in ("400X", "0", "M")),
        (("--accumulate", "3"), "batch_size"),
        (("--gpu", "H1000"), "--gpu"),
        (("--capture", "cuda-graphs"), "--capture"),
        (("--epochs", "-1"), "--epochs"),
        (("--epochs", "nan"), "--epochs"),
        (("--loader-rate", "-5"), "--loader-rate"),
        (("--inter-node", "inf"), "--inter-node"),
        (("--evaluation", "5000", "0", "256"), "evaluation"),
    ],
)  # fmt: skip
def test_refusals(words, setting):
    with pytest.raises(ConfigError, match=setting):
        cli.find_command(["plan", "--gpus", "8", "--data", "1M", *words])()


@pytest.mark.extended
@pytest.mark.slow
def test_page_shows_the_output_of_mvlm_plan(capsys):
    """The page's blocks agree within 3 %: a better kernel changes them a little, an error changes them more."""
    command, shown = re.findall(r"^    (mvlm plan .*?)$.*?^```text\n(.*?)^```", PAGE.read_text(), re.M | re.S)[0]
    cli.find_command(shlex.split(command)[1:])()
    number = r"\d[\d,]*(?:\.\d+)?"

    def words(text: str) -> str:
        return re.sub(rf"\s*{number}", "#", text)

    printed = {words(block.split("\n")[0]): block for block in capsys.readouterr().out.strip().split("\n\n")}
    for block in shown.strip().split("\n\n"):
        own = printed[words(block.split("\n")[0])]
        assert words(own) == words(block)
        for ours, theirs in zip(re.findall(number, own), re.findall(number, block), strict=True):
            a, b = (float(x.replace(",", "")) for x in (ours, theirs))
            assert a == pytest.approx(b, rel=0.03, abs=1.01 if "." not in ours else 0.06), (ours, theirs)


@pytest.mark.slow
def test_a_plan_assumes_no_longer_captions_than_the_model_takes():
    found = format_plan(setting(model=micro_config(text_length=8), nodes=2, batch_size=256), 10**6, 1)
    assert "of 8 tokens (at most 8)" in found


@pytest.mark.slow
def test_stages_have_the_steps_and_costs_of_their_side():
    """Against plans of each side alone."""
    own = setting(model=micro_config(), nodes=2, batch_size=256)
    found = format_plan(own, 256_000, 1, stages=("0:16", "600:32:0.3"))
    rows = re.findall(r"^  (\d+) px, (\d+) of (\d+) masked +(\d+) +(\S+) +(\S+) +(\S+)", found, re.M)
    assert [tuple(map(int, row[:4])) for row in rows] == [(16, 4, 4, 600), (32, 4, 16, 400)]
    for row, changes in zip(rows, ({"image_size": 16}, {"image_mask_ratio": 0.3}), strict=True):
        at = setting(model=micro_config(**changes), nodes=2, batch_size=256)
        cost = step_cost(at.model, at.shape)
        assert float(row[4]) == pytest.approx((cost.forward + cost.backward) / 16 / 1e9, abs=0.06)
        assert float(row[6]) == pytest.approx(1e3 * planned_step(at, cost).step, abs=0.06)
    with pytest.raises(ConfigError, match="stages: wanted steps before the end"):
        format_plan(own, 256_000, 1, stages=("0:16", "1000:32"))
