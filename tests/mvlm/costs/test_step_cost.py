"""Counts on fake tensors against the allocator's report of real steps, and by hand."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from mvlm.config.groups import PartSettings
from mvlm.config.model import MaskVLMConfig
from mvlm.costs.step_cost import StepShape, fake_step, step_cost
from mvlm.distributed.collectives import HostNumbers
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import checkpoint_activations, parallelize
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.shadow_weights import shadow_weights, using
from mvlm.weights.text_tower import read_text_tower
from support.models import ALONE, micro_batch
from support.text_towers import text_model, write_text_tower

pytestmark = pytest.mark.slow
CONFIG = MaskVLMConfig.preset("tiny", image_layers=2, text_layers=2, cross_layers=1, decoder_layers=1)


def allocated(shape: StepShape, path) -> int:
    """Peak bytes of one real step, beyond those allocated before it, by torch's report of its CPU allocator."""
    torch.manual_seed(0)
    model = MaskVLM(CONFIG)
    if shape.checkpointed:
        checkpoint_activations(model)
    model.set_attention("sdpa", "sdpa")
    lengths = (shape.tokens,) * shape.pairs
    micro = [micro_batch(lengths, seed=a, config=CONFIG) for a in range(shape.microbatches)]
    copies = shadow_weights(model) if shape.bf16 and not shape.checkpointed else None

    def step() -> None:
        with using(copies):
            backward_global(
                parallelize(model, ALONE),
                micro,
                ALONE,
                seed=0,
                step=0,
                plan="fast",
                autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=shape.bf16),
            )

    step()
    model.zero_grad(set_to_none=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        step()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


@pytest.mark.extended
@pytest.mark.parametrize(
    "changes",
    [{}, {"bf16": False}, {"checkpointed": True}, {"microbatches": 2, "bf16": False}],
    ids=["bf16", "fp32", "checkpointed", "two microbatches"],
)
def test_counted_memory_is_within_a_tenth_of_the_allocators(tmp_path, changes):
    shape = StepShape(pairs=16, tokens=12, longest=12, gpu=False, **changes)
    assert step_cost(CONFIG, shape).peak == pytest.approx(allocated(shape, tmp_path / "trace.json"), rel=0.1)


def test_copies_of_weights_add_at_most_two_per_cent_of_memory():
    """They are in the place of casts that a step saves. Checkpointed steps and sharded weights have no copies."""
    shape = StepShape(pairs=16)
    copied, sharded, checkpointed = (
        step_cost(CONFIG, x) for x in (shape, replace(shape, sharded=True), replace(shape, checkpointed=True))
    )
    assert copied.copies > sharded.copies == checkpointed.copies == 0
    weights = 16 * copied.parameters  # with gradients and moments
    assert copied.copies + copied.peak + weights < 1.02 * (sharded.peak + weights)


def test_step_cost_saves_no_attention_scores_for_backward():
    """A GPU's attention saves none. Images have 37 rows, captions 16 with padding; the default dtype is bf16."""
    saved: list[tuple[int, ...]] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        step_cost(CONFIG, StepShape(pairs=4, tokens=12, longest=12))
    rows = {1 + CONFIG.num_patches, 16}
    assert any(shape[-2:] == (37, CONFIG.width) for shape in saved)
    assert not [shape for shape in saved if len(shape) > 2 and rows.issuperset(shape[-2:])]


def test_flops_of_an_image_block_by_hand():
    """Two steps that differ by one image block: products with 12 C^2 weights for 2 x 37 rows, and attention's two."""
    shape = StepShape(pairs=4)
    more = MaskVLMConfig.preset("tiny", image_layers=3, text_layers=2, cross_layers=1, decoder_layers=1)
    one, two = step_cost(CONFIG, shape), step_cost(more, shape)
    wide, rows = 192, 37
    by_hand = 4 * 2 * (2 * rows * 12 * wide**2 + 2 * 2 * rows**2 * wide)
    assert two.forward - one.forward == by_hand
    assert two.backward - one.backward == 2 * by_hand
    assert two.parameters - one.parameters == 12 * wide**2 + 13 * wide
    lora = replace(shape, parts=PartSettings(train_image="lora", lora_rank=2))
    one, two = step_cost(CONFIG, lora), step_cost(more, lora)
    added = 2 * (4 * 2 * wide + 2 * 5 * wide)  # A and B of four projections and of two layers
    assert two.trained - one.trained == added
    products = 2 * 12 * wide**2 * 2  # B A of each weight, once for masked and whole images
    assert two.forward - one.forward == by_hand + products
    assert two.backward - one.backward == 2 * (
        by_hand + products
    )  # weights have gradients, which A and B get theirs of
    assert two.parts["image_encoder"] > 1.3 * one.parts["image_encoder"]


def test_flops_of_masked_rows_alone_by_hand():
    """One layer of `image_cross` and one of the decoder, 37 rows of which 20 are masked, and two captions of 12 tokens.

    `image_cross` leaves out 17 rows but for their keys and values. The decoder's last block computes masked rows alone
    in both; its keys and values are of 17 rows in place of 37. So are the blocks of the image encoder.
    """
    shape = StepShape(pairs=2, tokens=12, longest=12)
    every, masked = (step_cost(replace(CONFIG, mim_rows=rows), shape) for rows in ("all", "masked"))
    wide, rows, hidden, text = 192, 37, 20, 12
    seen = rows - hidden
    assert CONFIG.masked_patches == hidden
    # query, out, query and out of the cross-attention, and 8 C^2 of the feed-forward; scores and sums of both
    of_cross = seen * 12 * wide**2 + 2 * hidden * wide**2 + 2 * wide * (rows**2 - hidden * seen + seen * text)
    of_decoder = 2 * hidden * wide**2 + 2 * wide * hidden * (rows - seen)
    of_encoder = CONFIG.image_layers * (hidden * 12 * wide**2 + 2 * wide * (rows**2 - seen**2))
    saved = 2 * 2 * (of_cross + of_decoder + of_encoder)
    assert every.forward - masked.forward == pytest.approx(saved, rel=0.01)
    assert every.parameters == masked.parameters


def test_a_vit_of_timm_costs_what_ours_costs():
    vit = replace(CONFIG, image_tower="timm:vit_tiny_patch16_224")
    own, tower = (step_cost(config, StepShape(pairs=2)) for config in (CONFIG, vit))
    assert (tower.parameters, tower.forward, tower.backward) == (own.parameters, own.forward, own.backward)
    assert "image_encoder" in tower.parts


def test_a_bert_of_transformers_costs_what_our_text_encoder_costs(tmp_path, run_mvlm):
    sizes: dict[str, Any] = {
        "hidden_size": 192,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "max_position_embeddings": 24,
    }
    write_text_tower(tmp_path, "bert", text_model("bert", **sizes))
    bert = replace(CONFIG, text_tower=read_text_tower(tmp_path)["text_tower"])
    own, tower = (step_cost(config, StepShape(pairs=2)) for config in (CONFIG, bert))
    assert (tower.forward, tower.backward) == (own.forward, own.backward)
    words = ("plan", "--gpus", 8, "--data", "1M", "--preset", "tiny")
    whole = [run_mvlm(*words, *more) for more in ((), ("--text-tower", tmp_path))]
    assert [done.code for done in whole] == [0, 0]
    assert whole[0].out != whole[1].out


def test_a_count_changes_nothing_in_other_threads():
    """A row of metrics counts in the process that trains."""
    with fake_step(CONFIG, StepShape(pairs=4, microbatches=2)), ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: HostNumbers(torch.arange(3)).read()).result() == [0, 1, 2]


def test_fetched_features_of_other_ranks_add_memory_and_flops():
    """On 16 simulated ranks ITM has as many rows again. No process group is left."""
    alone, among = step_cost(CONFIG, StepShape(pairs=8)), step_cost(CONFIG, StepShape(pairs=8, ranks=16))
    assert not torch.distributed.is_initialized()
    assert among.peak > alone.peak
    assert among.forward > alone.forward
    assert among.parameters == alone.parameters
