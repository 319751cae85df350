"""Losses and gradients of several ranks and of accumulated microbatches against one rank on the whole batch.

The ranks are processes of global_batch_ranks.py. The oracle there is the model's own forward on one rank, which
tests/mvlm/model/test_maskvlm.py compares with the method in numpy.
"""

import json
import os
import runpy
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.global_batch import Embeddings, backward_global, sharded_conditioned_loss
from mvlm.distributed.parallel import checkpoint_activations, parallelize
from mvlm.model import plain
from support.models import ALONE, micro_batch, micro_model

EXACT = 1e-10
PROGRAM = Path(__file__).with_name("global_batch_ranks.py")
RANKS: Any = SimpleNamespace(**runpy.run_path(str(PROGRAM), run_name="ranks"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Results of each of eight ranks in a world of eight, of four in a world of four, and of two in a world of two."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), str(port), str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(8)]


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_combination_agrees_with_one_rank_on_the_whole_batch(ranks, world):
    """Shardings, microbatches, blocks that are computed again, both implementations, weights and newer objectives.

    Unused parameters get no gradient, as on one rank: `differences` distinguishes None from 0.
    """
    for found in ranks[:world]:
        assert len(found[str(world)]) == len(RANKS.combinations(world))
        for case in found[str(world)]:
            assert max(case["global losses"]) < EXACT, case
            assert case["global gradients"] < EXACT, case


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("microbatches", ["1", "2"])
def test_ranks_agree_with_one_rank_if_rows_have_too_many_readers(ranks, microbatches):
    """At most one reader a row: the loss is another one, and two runs have the same bits."""
    for found in ranks[:4]:
        case = found["limited"][microbatches]
        assert max(case["losses"]) < EXACT
        assert case["gradients"] < EXACT
        assert abs(case["itm"] - RANKS.Oracle(RANKS.EVERY).losses[3]) > 1e-3
        assert case["repeats"]


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "hsdp"])
def test_update_with_clipping_and_clamping_agrees_with_one_rank(ranks, kind):
    every = [case for found in ranks for world in ("2", "4") for case in found.get(world, [])]
    chosen = [case for case in every if case["kind"] == kind and "updated" in case]
    assert chosen
    for case in chosen:
        assert abs(case["norm"]) < EXACT
        assert case["updated"] < EXACT


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_logits_in_memory_are_bounded(ranks, count):
    """Of 6 x 6 W logits of a rank, at most 36 are in memory at a time, and the gradient is the same."""
    for found in ranks[:count]:
        (blocks, gradient), (everything, wanted) = found[f"{count} logits"]
        assert blocks <= 36
        assert everything == 36 * count
        assert gradient == pytest.approx(wanted, abs=1e-12)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4, 8])
def test_right_answers_on_other_ranks_share_the_target(ranks, count):
    """ITC whose right answers are all pairs with the row's image or caption, row by row in float64."""
    images, texts = zip(*map(RANKS.embeddings_of, range(count)), strict=True)
    image, text = torch.cat(images).requires_grad_(), torch.cat(texts).requires_grad_()
    image_id, text_id = (ids.tolist() for ids in RANKS.shared_ids(count))
    number, loss = 6 * count, torch.zeros(1, dtype=torch.float64)
    for logits in (image @ text.T, text @ image.T):
        for i in range(number):
            right = [j for j in range(number) if image_id[i] == image_id[j] or text_id[i] == text_id[j]]
            assert len(right) > 1
            loss = loss - sum(logits[i].log_softmax(0)[j] for j in right) / len(right) / (2 * number)
    loss.backward()
    assert image.grad is not None
    assert text.grad is not None
    for size in (0, 1):  # in blocks of rows, and at once
        found = [each[f"{count} shared"][size] for each in ranks[:count]]
        assert sum(share for share, _, _ in found) == pytest.approx(loss.item(), abs=1e-12)
        for place, wanted in ((1, image.grad), (2, text.grad)):
            gradient = torch.cat([torch.tensor(x[place], dtype=torch.float64) for x in found])
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_pair_without_an_admissible_negative_has_no_weight(plan):
    """Pair 0 has no admissible negative in the batch, and the others have one: weights differ by microbatch."""
    batch, masks = micro_batch((7, 4, 12, 3, 9, 5, 3, 11))
    image_id, text_id = batch.image_id.clone(), torch.full((8,), 200)
    text_id[7] = 201
    image_id[0] = image_id[7].item()
    batch = replace(batch, image_id=image_id, text_id=text_id)
    model, same = micro_model(), micro_model()
    losses = model(batch, masks, seed=1, step=2)
    losses.total.backward()
    micro = [RANKS.piece(batch, masks, first, 2) for first in (0, 2, 4, 6)]
    found = backward_global(parallelize(same, ALONE), micro, ALONE, seed=1, step=2, plan=plan)
    assert [x.item() for x in found] == pytest.approx([x.item() for x in losses], abs=EXACT)
    for (name, ours), theirs in zip(same.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=EXACT, msg=name)


@pytest.mark.slow
def test_checkpointed_blocks_give_the_same_gradients_to_the_bit():
    batch, masks = micro_batch()
    gradients, kept = [], []
    for again in (False, True):
        model = micro_model(dtype=torch.float32)
        if again:
            checkpoint_activations(model)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            total = model(batch, masks).total
        total.backward()
        kept.append(sum(sizes))
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert kept[1] < kept[0] / 2
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_microbatches_of_different_sizes_are_refused():
    parallel = parallelize(micro_model(), ALONE)
    with pytest.raises(ValueError, match=r"wanted at least one, all with as many pairs, got \[2, 3\] pairs"):
        backward_global(parallel, [micro_batch((5, 6)), micro_batch((5, 6, 7))], ALONE, seed=0, step=0)
    with pytest.raises(ValueError, match=r"wanted at least one, all with as many pairs, got \[\] pairs"):
        backward_global(parallel, [], ALONE, seed=0, step=0)


@pytest.mark.slow
def test_text_pooling_in_blocks_has_the_loss_and_gradients_of_all_at_once():
    """Five images at once, and two at a time."""
    batch, _ = micro_batch()
    found = []
    for elements in (1 << 20, 2 * 5 * 16):
        model = micro_model(text_pooling=True, contrastive="sigmoid")
        assert model.text_pooling is not None
        v = model.encode_image(batch.images)
        w, _ = model.encode_text(batch.tokens, batch.cu_seqlens, batch.max_length)
        layout = GlobalBatchLayout(0, 1, 1, 5)
        embeddings = Embeddings(model.embed_image(v), model.embed_text(w), layout)
        similarity = partial(plain.conditioned_similarity, model.text_pooling)
        loss = sharded_conditioned_loss(
            similarity, v, embeddings, model.log_scale, layout, elements, bias=model.logit_bias
        )
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, gradients), (blocks, again) = found
    assert blocks == pytest.approx(loss, abs=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(again[name], gradient, rtol=0, atol=1e-12, msg=name)
