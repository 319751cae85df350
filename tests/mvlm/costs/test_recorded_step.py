"""Collectives of the real step among many ranks, recorded in a process group that moves nothing."""

import pytest
import torch

from mvlm.costs.recorded_step import RecordedStep, logit_work, record_step, rescaled
from mvlm.costs.step_cost import StepShape
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_config

pytestmark = pytest.mark.slow
PAIRS, TOKENS, WIDTH = 64, 12, 16
MODEL = micro_config(image_layers=1, text_layers=1, cross_layers=1, decoder_layers=1)
RANKS = (8, 64, 4096)
IMAGE, CAPTION = 17 * WIDTH, TOKENS * WIDTH
"""Elements of an image's features, and of a caption's."""


@pytest.fixture(scope="module")
def records() -> dict[int, RecordedStep]:
    return {ranks: record_step(MODEL, StepShape(pairs=PAIRS, ranks=ranks), nodes=ranks // 8) for ranks in RANKS}


def test_bytes_of_features_do_not_grow_with_the_ranks(records):
    """What a rank asks for is constant from 8 to 4,096 ranks. 1 / W of it are its own rows, which do not travel."""
    for ranks, record in records.items():
        features = [x for x in record.collectives if x.label == "features"]
        assert sum(x.size for x in features) == pytest.approx(2 * 2 * PAIRS * (IMAGE + CAPTION), rel=0.05)
        assert record.received("features") <= sum(x.size for x in features)
        if ranks > 8:
            assert record.received("features") == pytest.approx(records[4096].received("features"), rel=0.05)


def test_embeddings_and_draws_grow_with_the_ranks(records):
    """Gathered in bf16, two embeddings of width 8 a pair; their gradients come back in fp32. Ids are 3 int64 a pair."""
    for ranks, record in records.items():
        others = (ranks - 1) * PAIRS
        assert record.received("embeddings") == others * 2 * 8 * (2 + 4)
        ids = [x for x in record.collectives if x.label == "ids and draws" and x.kind == "all-gather"]
        assert [x.received for x in ids] == [others * 3 * 8, others * 2 * 4]


def test_gradients_are_reduced_once(records):
    for record in records.values():
        parts = [x for x in record.collectives if x.label == "gradients"]
        assert {x.kind for x in parts} == {"all-reduce"}
        with torch.device("meta"):
            parameters = sum(p.numel() for p in MaskVLM(MODEL).parameters())
        assert sum(x.size for x in parts) == 4 * parameters


def test_features_travel_while_other_work_runs(records):
    """From the start of an all-to-all to the wait of the main stream there is work, in forward and in backward."""
    record = records[64]
    starts = {e.collective: e for e in record.events if e.what == "start"}
    features = [i for i, x in enumerate(record.collectives) if x.label == "features"]
    assert [starts[i].in_lane for i in features] == [True] * 4
    joins = [e.position for e in record.events if e.what == "join"]
    for number in features:
        assert min(at for at in joins if at >= starts[number].position) > starts[number].position
    waits = {e.collective: e.position for e in record.events if e.what == "wait"}
    (gather,) = [i for i, x in enumerate(record.collectives) if x.label == "embeddings" and x.kind == "all-gather"]
    (scatter,) = [i for i, x in enumerate(record.collectives) if x.kind == "reduce-scatter"]
    for number in (gather, scatter):
        assert waits[number] > starts[number].position


@pytest.mark.parametrize("other", [8, 4096])
def test_rescaled_record_is_that_of_the_other_number_of_ranks(records, other):
    found, wanted = rescaled(records[64], other, 8, PAIRS), records[other]
    assert [(x.kind, x.label, x.ranks) for x in found.collectives] == [
        (x.kind, x.label, x.ranks) for x in wanted.collectives
    ]
    logits = [logit_work(MODEL, PAIRS, ranks).flops for ranks in (64, other)]
    assert found.flops - logits[0] == pytest.approx(wanted.flops - logits[1], rel=0.01)
    for ours, theirs in zip(found.collectives, wanted.collectives, strict=True):
        assert ours.received == pytest.approx(theirs.received, rel=0.1 if ours.label == "features" else 0), ours.label
        assert ours.senders == pytest.approx(theirs.senders, rel=0.2)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_record_with_gradient_caching(kind):
    """Each of two microbatches is exchanged in turn; with FSDP2 blocks are gathered in each of the passes."""
    record = record_step(MODEL, StepShape(pairs=8, ranks=16, microbatches=2), kind, nodes=2)
    assert sum(x.kind == "all-to-all" for x in record.collectives) == 2 * 4
    gathered = [x for x in record.collectives if x.label == "parameters"]
    assert bool(gathered) == (kind == "fsdp")
    if kind == "fsdp":
        assert {(x.ranks, x.stride) for x in gathered} == {(8, 1)}
        reduced = [x for x in record.collectives if x.kind == "all-reduce" and x.label == "gradients"]
        assert {(x.ranks, x.stride) for x in reduced} == {(2, 8)}


def test_no_process_group_is_left(records):
    assert not torch.distributed.is_initialized()


def test_work_of_logits_grows_with_the_ranks():
    """Products of own embeddings with all others, width 8: one forward and two backward, in both directions."""
    small, large = logit_work(MODEL, 16, 8), logit_work(MODEL, 16, 64)
    assert small.flops == 2 * 3 * 2 * 16 * (16 * 8) * 8
    assert large.flops == 8 * small.flops
    assert large.moved == pytest.approx(8 * small.moved, rel=0.1)
    assert large.moved > 4 * 16 * 16 * 64 * 2  # at the least, both matrices are written
