"""Losses and gradients of several ranks and of accumulated microbatches against one rank on the whole batch.

The ranks are forked from this process. The oracle is the model's own forward on one rank, which
tests/mvlm/model/test_maskvlm.py compares with the method in numpy.
"""

import functools
import itertools
import os
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvlm.config.groups import PartSettings
from mvlm.distributed.collectives import GlobalBatchLayout, all_gather, reduce_scatter
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import checkpoint_activations, parallelize, unsharded_copy
from mvlm.distributed.world import World, join_ranks
from mvlm.model.adaptation import adapt
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import negatives, step
from mvlm.objectives.pretraining import KeepStart
from mvlm.objectives.step import Objective
from mvlm.training.metrics import gradient_norms
from mvlm_kernels.gelu_linear.room import saving_none
from support.faults.forks import ended_well, in_ranks
from support.kernels.rooms import every_room, room_for
from support.microbatches import piece, pieces, whole_batch
from support.models import ALONE, micro_batch, micro_model, normal, weighted

EXACT = 1e-10
SEED, STEP = 3, 5
EVERY = (1.0, 1.0, 1.0, 1.0)
SOME = ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), (0.5, 2.0, 0.25, 3.0))
"""Weights of mlm, mim, itc and itm."""
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sigmoid": {"contrastive": "sigmoid"},
    "masked partners": {"mask_partner": True},
    "dropped patches": {"drop_masked": True, "contrast_masked": True},
    "masked captions in ITC": {"contrast_masked": True},
    "squared errors": {"mim_loss": "mse", "mim_rows": "masked"},
    "frozen": {},
    "adapters": {},
    "kept start": {},
}
"""Changes of the model, by name."""
PARTS = {
    "frozen": PartSettings(train_image="frozen", train_cross="frozen"),
    "adapters": PartSettings(train_image="lora", train_text="frozen", train_cross="lora", lora_rank=2),
}
"""Learning parts of the model, by the name of a variant."""
SHALLOW: dict[str, Any] = {"image_layers": 1, "text_layers": 1, "decoder_layers": 1}


def model_of(variant: str) -> MaskVLM:
    model = micro_model(**SHALLOW, **VARIANTS[variant])
    adapt(model, PARTS.get(variant, PartSettings()))
    for name, parameter in model.named_parameters():
        if name.endswith((".weight.0.a", ".weight.0.b")):  # zeros in `b` would give `a` no gradient
            parameter.data = normal(*parameter.shape)
    return model


def objectives_of(weights: tuple[float, ...], variant: str) -> tuple[Objective, ...]:
    """The objectives, and the distance to a start with another temperature where the variant says so."""
    if variant != "kept start":
        return weighted(*weights)
    start = micro_model(seed=1, **SHALLOW).requires_grad_(False)
    start.log_scale.data += 0.3
    return *weighted(*weights), KeepStart(0.7, start=start)


class Oracle:
    """Losses and gradients of one rank on the whole batch, by the model's own forward; weights after an update."""

    def __init__(self, weights: tuple[float, ...], variant: str) -> None:
        model = model_of(variant)
        losses = model(*whole_batch(), seed=SEED, step=STEP, objectives=objectives_of(weights, variant))
        losses.total.backward()
        self.losses = {name: x.item() for name, x in losses.items()}
        self.gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        self.norm = torch.nn.utils.get_total_norm([g for g in self.gradients.values() if g is not None])
        update(model, self.norm)
        self.updated = {name: p.detach() for name, p in model.named_parameters()}


def update(model: Any, norm: Tensor) -> None:
    """Update the weights with clipped gradients, and clamp the temperature."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3, fused=True)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
    optimizer.step()
    model.clamp_temperature()


def assert_equal(found: dict[str, Any], wanted: dict[str, Any], case: Any) -> None:
    """Tensors are equal, and None on both sides or on neither: an unused parameter has no gradient on one rank."""
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert (tensor is None) == (wanted[name] is None), (name, case)
        if tensor is not None:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            torch.testing.assert_close(whole, wanted[name], rtol=0, atol=EXACT, msg=f"{name} of {case}")


def cases_of(ranks: int) -> list[dict[str, Any]]:
    """Shardings, microbatches, blocks computed again, both implementations, weights, and newer objectives."""
    usual: dict[str, Any] = {"again": False, "weights": EVERY, "variant": "paper"}
    if ranks == 8:
        return [usual | {"kind": "ddp", "microbatches": 1, "plan": "fast"}]
    kinds = ["ddp", "fsdp", "hsdp"] if ranks == 4 else ["ddp", "fsdp"]
    plans = ("plain", "fast")
    # Of both values of each of four, all three of any three; four ranks add what only they can have, nodes.
    every = [
        usual | {"kind": kinds[kind], "microbatches": 1 + more, "again": bool(again), "plan": plans[plan]}
        for kind, more, again, plan in itertools.product(range(len(kinds)), (0, 1), (0, 1), (0, 1))
        if (kind + more + again + plan) % 2 == 0 and (ranks == 2 or kind == 2 or more + again == 2)
    ]
    others = [{"weights": weights} for weights in SOME] + [{"variant": name} for name in VARIANTS if name != "paper"]
    if ranks == 2:  # each, in turn, with both implementations, with and without microbatches, and each sharding
        for i, other in enumerate(others):
            case = {"kind": kinds[i % 2], "microbatches": 1 + i // 2 % 2, "plan": plans[(i + i // 2) % 2]}
            every.append(usual | case | other)
    return every


FEW = [
    {"kind": "ddp", "microbatches": 1, "again": False, "weights": EVERY, "variant": "paper", "plan": "fast"},
    {"kind": "fsdp", "microbatches": 2, "again": True, "weights": SOME[-1], "variant": "sigmoid", "plan": "fast"},
    {"kind": "ddp", "microbatches": 2, "again": True, "weights": SOME[2], "variant": "frozen", "plan": "fast"},
    {"kind": "ddp", "microbatches": 2, "again": False, "weights": EVERY, "variant": "dropped patches", "plan": "fast"},
    {"kind": "fsdp", "microbatches": 1, "again": False, "weights": EVERY, "variant": "adapters", "plan": "fast"},
    {"kind": "ddp", "microbatches": 2, "again": False, "weights": SOME[2], "variant": "kept start", "plan": "plain"},
    {
        "kind": "fsdp",
        "microbatches": 2,
        "again": True,
        "weights": SOME[4],
        "variant": "squared errors",
        "plan": "fast",
    },
]
"""Cases of `make test`."""


def check(world: World, case: dict[str, Any], oracle: Oracle) -> None:
    """Compare losses, gradients, their norm and the weights after an update of two steps in turn with one rank's.

    DDP refuses parameters at its second step that the first one left out.
    """
    kind, weights = case["kind"], case["weights"]
    model = model_of(case["variant"])
    if case["again"]:
        checkpoint_activations(model)
    parallel = parallelize(model, world, "ddp" if kind == "ddp" else "fsdp", nodes=2 if kind == "hsdp" else 1)
    micro = pieces(world, case["microbatches"])
    chosen: dict[str, Any] = {"plan": case["plan"], "objectives": objectives_of(weights, case["variant"])}
    for _ in range(2 if kind == "ddp" else 1):
        model.zero_grad(set_to_none=True)
        losses = backward_global(parallel, micro, world, seed=SEED, step=STEP, **chosen)
        assert {name: x.item() for name, x in losses.items()} == pytest.approx(oracle.losses, abs=EXACT), case
        assert_equal({name: p.grad for name, p in model.named_parameters()}, oracle.gradients, case)
    norm, _ = gradient_norms(model)
    assert norm.item() == pytest.approx(oracle.norm.item(), abs=EXACT), case
    update(model, norm)
    copy = unsharded_copy(model, lambda: model_of(case["variant"]))
    assert_equal({name: p.detach() for name, p in copy.named_parameters()}, oracle.updated, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, cases",
    [(2, FEW), *(pytest.param(size, cases_of(size), marks=pytest.mark.extended) for size in (2, 4, 8))],
    ids=["few", "2", "4", "8"],
)
def test_every_combination_agrees_with_one_rank_on_the_whole_batch(size, cases):
    oracles = {(case["weights"], case["variant"]): Oracle(case["weights"], case["variant"]) for case in cases}

    def work() -> None:
        world = join_ranks("cpu")
        for number, case in enumerate(cases):
            # In every second case few of ITC's logits at a time.
            with patch.object(step, "MAX_LOGITS", 1 << 20 if number % 2 else 32):
                check(world, case, oracles[case["weights"], case["variant"]])
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, size)] == [True] * size


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [1, 2])
def test_ranks_agree_with_one_rank_if_too_many_pairs_draw_one_negative(microbatches):
    """At most one pair a negative: the loss is another one, and two runs have the same bits."""
    usual = Oracle(EVERY, "paper")

    def work() -> None:
        world, runs = join_ranks("cpu"), []
        for _ in range(2):
            model = micro_model(**SHALLOW)
            micro = pieces(world, microbatches)
            losses = backward_global(parallelize(model, world), micro, world, seed=SEED, step=STEP)
            assert {name: x.item() for name, x in losses.items()} == pytest.approx(oracle.losses, abs=EXACT)
            runs.append({name: p.grad for name, p in model.named_parameters()})
        assert_equal(runs[0], oracle.gradients, microbatches)
        assert all(torch.equal(gradient, runs[1][name]) for name, gradient in runs[0].items() if gradient is not None)
        world.close()

    limited = functools.partial(negatives.limit_pairs_per_negative, most=1)
    with patch.object(negatives, "limit_pairs_per_negative", limited):
        oracle = Oracle(EVERY, "paper")
        assert abs(oracle.losses["itm"] - usual.losses["itm"]) > 1e-3
        assert [ended_well(pid) for pid in in_ranks(work, 4)] == [True] * 4


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
    micro = [piece(batch, masks, first, 2) for first in (0, 2, 4, 6)]
    found = backward_global(parallelize(same, ALONE), micro, ALONE, seed=1, step=2, plan=plan)
    wanted = {name: x.item() for name, x in losses.items()}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(wanted, abs=EXACT)
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


@pytest.mark.slow
def test_checkpointed_blocks_recompute_what_they_saved_in_every_gelu_room():
    """Gradients are equal to the bit, however many GELUs a step saves: on a GPU as many as fit."""
    batch, masks = micro_batch()
    blocks = dict.fromkeys(("image_layers", "text_layers", "cross_layers", "decoder_layers"), 1)
    model = micro_model(dtype=torch.float32, **blocks)

    def step() -> list[Tensor]:
        model.zero_grad()
        model(batch, masks, plan="fast").total.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    rooms = every_room(step)
    assert len(rooms) > 10
    with saving_none():
        wanted = step()
    checkpoint_activations(model)
    for size in rooms:
        with room_for(size):
            assert all(map(torch.equal, step(), wanted)), size


def test_microbatches_of_different_sizes_are_refused():
    parallel = parallelize(micro_model(), ALONE)
    with pytest.raises(ValueError, match=r"wanted at least one, all with as many pairs, got \[2, 3\] pairs"):
        backward_global(parallel, [micro_batch((5, 6)), micro_batch((5, 6, 7))], ALONE, seed=0, step=0)
    with pytest.raises(ValueError, match=r"wanted at least one, all with as many pairs, got \[\] pairs"):
        backward_global(parallel, [], ALONE, seed=0, step=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "microbatches"), [(4, 1), *(pytest.param(8, m, marks=pytest.mark.extended) for m in (1, 2))]
)
def test_gathers_in_two_steps_agree_with_one_rank_on_the_whole_batch(size, microbatches):
    """Two ranks a node: rows come in the order of one ring, to the bit, and losses and gradients are one rank's."""
    usual = {"kind": "ddp", "again": False, "weights": EVERY, "variant": "paper", "microbatches": microbatches}
    oracle = Oracle(EVERY, "paper")

    def work() -> None:
        os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
        world = join_ranks("cpu")
        assert world.nodes is not None
        assert world.nodes.number == size // 2
        layout = GlobalBatchLayout(world.rank, world.size, 2, 3, world.nodes)
        own = normal(6, 5, seed=world.rank)
        every = all_gather(own, layout).wait()
        assert torch.equal(every, all_gather(own, replace(layout, nodes=None)).wait())
        found = reduce_scatter(every * (1 + world.rank), layout).wait()
        torch.testing.assert_close(found, own * sum(range(1, size + 1)))
        for number, plan in enumerate(("plain", "fast")):
            with patch.object(step, "MAX_LOGITS", 1 << 20 if number else 32):
                check(world, usual | {"plan": plan}, oracle)
        world.close()

    with patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):
        assert [ended_well(pid) for pid in in_ranks(work, size)] == [True] * size
