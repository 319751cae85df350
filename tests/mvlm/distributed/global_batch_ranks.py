"""The ranks of test_global_batch.py: `python global_batch_ranks.py PORT FOLDER`.

Eight ranks are forked once. They run one combination as a world of eight. Then the first four run every combination
as a world of four, and the first two as a world of two. Each compares its losses and gradients with those of one rank
on the whole batch, and writes the largest differences to FOLDER/RANK.json.
"""

import functools
import itertools
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.global_batch import Embeddings, backward_global, sharded_contrastive_loss
from mvlm.distributed.parallel import checkpoint_activations, parallelize, unsharded_copy
from mvlm.distributed.world import World
from mvlm.objectives import negatives
from mvlm.objectives.losses import LossWeights
from mvlm.objectives.negatives import NegativeSampling
from mvlm.training.metrics import gradient_norms
from mvlm_dataloading import Batch, Masks

# Helpers, for a program that pytest does not run. Last in the path and after mvlm, which tests/mvlm would hide.
sys.path.append(str(Path(__file__).parents[2]))
from support.models import micro_batch, micro_model, with_weights

LENGTHS = (7, 4, 12, 3, 9, 5, 3, 11, 12, 12, 3, 3, 8, 6, 10, 4)
SEED, STEP = 3, 5
EVERY = (1.0, 1.0, 1.0, 1.0)
SOME = ((1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 1.0, 1.0), (0.0, 1.0, 1.0, 1.0), (0.5, 2.0, 0.25, 3.0))
"""Weights of mlm, mim, itc and itm."""
VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sigmoid": {"contrastive": "sigmoid"},
    "text pooling": {"contrastive": "sigmoid", "text_pooling": True},
    "text pooling with softmax": {"text_pooling": True},
    "weighted masks": {},
    "masked partners": {"mask_partner": True},
}
"""Changes of the model, by name. Masks are changed where the name says so."""
SHALLOW: dict[str, Any] = {"image_layers": 1, "text_layers": 1, "decoder_layers": 1}
WIDTH = 5
"""Width of the embeddings whose logits are counted."""


def whole_batch(variant: str = "paper") -> tuple[Batch, Masks]:
    """Sixteen pairs: one image three times, equal captions, and from 1 to 3 masked tokens a caption."""
    batch, masks = micro_batch(LENGTHS, seed=1)
    image_id, text_id = batch.image_id.clone(), batch.text_id.clone()
    image_id[[5, 13]] = 102
    text_id[[7, 8, 15]] = 200
    masks = with_weights(batch, masks) if "weighted" in variant else masks
    return replace(batch, image_id=image_id, text_id=text_id), masks


def piece(batch: Batch, masks: Masks, first: int, number: int) -> tuple[Batch, Masks]:
    """Pairs first to first + number - 1, as a batch."""
    starts = batch.cu_seqlens.tolist()
    rows, begin, end = slice(first, first + number), starts[first], starts[first + number]

    def own(name: str) -> dict[str, Tensor]:
        """Positions of one kind in these captions, and their weights."""
        ids = getattr(masks, f"{name}_ids")
        if ids is None:
            return {}
        inside, weights = (ids >= begin) & (ids < end), getattr(masks, f"{name}_weights", None)
        return {f"{name}_ids": ids[inside] - begin} | ({} if weights is None else {f"{name}_weights": weights[inside]})

    patches = {name: ids[rows] for name in ("patch_ids", "patch_weights") if (ids := getattr(masks, name)) is not None}
    part = Batch(
        images=batch.images[rows],
        tokens=batch.tokens[begin:end],
        cu_seqlens=batch.cu_seqlens[first : first + number + 1] - begin,
        max_length=max(b - a for a, b in itertools.pairwise(starts[first : first + number + 1])),
        image_id=batch.image_id[rows],
        text_id=batch.text_id[rows],
        sample_id=batch.sample_id[rows],
    )
    return part, Masks(**patches, **own("token"))


class Oracle:
    """Losses and gradients of one rank on the whole batch, by the model's own forward."""

    def __init__(self, weights: tuple[float, ...], variant: str = "paper") -> None:
        self.changes = SHALLOW | VARIANTS[variant]
        model = micro_model(**self.changes)
        losses = model(*whole_batch(variant), seed=SEED, step=STEP, weights=LossWeights(*weights))
        losses.total.backward()
        self.losses = [x.item() for x in losses]
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    @functools.cached_property
    def after_a_step(self) -> dict[str, Tensor]:
        """Weights after one update with clipped gradients and a clamped temperature."""
        model = micro_model(**self.changes)
        for name, parameter in model.named_parameters():
            gradient = self.gradients[name]
            parameter.grad = None if gradient is None else gradient.clone()
        update(model, torch.nn.utils.get_total_norm([g for g in self.gradients.values() if g is not None]))
        return {name: p.detach() for name, p in model.named_parameters()}


def update(model: Any, norm: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, eps=1e-3, fused=True)
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    torch.nn.utils.clip_grads_with_norm_(model.parameters(), 0.5, norm)
    optimizer.step()
    model.clamp_temperature()


def whole(x: Tensor | None) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def differences(found: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> float:
    """Largest difference; infinite if one side has a tensor where the other has None."""
    assert found.keys() == wanted.keys()
    largest = 0.0
    for name, tensor in found.items():
        other = wanted[name]
        if (tensor is None) != (other is None):
            return float("inf")
        if tensor is not None and other is not None:
            assert tensor.shape == other.shape
            largest = max(largest, float((tensor - other).abs().max()))
    return largest


class LargestOf(TorchDispatchMode):
    """Context that finds the most elements of a matrix with `columns` columns, except embeddings, of WIDTH rows."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.elements = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == self.columns and len(x) != WIDTH:
                self.elements = max(self.elements, x.numel())
        return out


def logit_elements(rank: int, ranks: int, elements: int) -> tuple[int, float]:
    """Elements of the largest block of logits with 6 pairs a rank, and the sum of ITC's gradient."""
    image, text = (x.requires_grad_() for x in embeddings_of(rank))
    layout = GlobalBatchLayout(rank, ranks, 1, 6)
    ids = torch.arange(layout.total)
    with LargestOf(layout.total) as mode:
        sampling = NegativeSampling(ids, ids, 0, 0)
        share, *_ = sharded_contrastive_loss(
            Embeddings(image, text, layout), torch.zeros(1), sampling, layout, elements
        )
        share.backward()
    assert image.grad is not None
    return mode.elements, float(image.grad.sum())


def embeddings_of(rank: int) -> tuple[Tensor, Tensor]:
    """Embeddings float64 (6, WIDTH) of the images and captions of a rank."""
    generator = torch.Generator().manual_seed(rank)
    image, text = (torch.randn(6, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    return image, text


def shared_ids(ranks: int) -> tuple[Tensor, Tensor]:
    """Ids of images, of which each has pairs on several ranks, and of captions, of which two are equal."""
    text_id = torch.arange(6 * ranks)
    text_id[-1] = 1
    return torch.arange(6 * ranks) % 5, text_id


def shared_positives(rank: int, ranks: int, elements: int) -> tuple[float, list[list[float]], list[list[float]]]:
    """A rank's share of ITC if all pairs of an image or a caption are right answers, and the gradients of its rows."""
    image, text = (x.requires_grad_() for x in embeddings_of(rank))
    layout, sampling = GlobalBatchLayout(rank, ranks, 1, 6), NegativeSampling(*shared_ids(ranks), 0, 0)
    share, *_ = sharded_contrastive_loss(
        Embeddings(image, text, layout), torch.zeros(1), sampling, layout, elements, shared_positives=True
    )
    share.backward()
    assert image.grad is not None
    assert text.grad is not None
    return share.item(), image.grad.tolist(), text.grad.tolist()


def limited_to(most: int) -> Any:
    """Context in which a step draws each image and each caption at most this often."""
    return patch.object(negatives, "limit_readers", functools.partial(negatives.limit_readers, most=most))


def combinations(ranks: int) -> list[dict[str, Any]]:
    if ranks == 8:
        return [
            {"kind": "ddp", "microbatches": 1, "again": False, "weights": EVERY, "plan": "fast", "variant": "paper"}
        ]
    kinds = ["ddp", "fsdp", "hsdp"] if ranks == 4 else ["ddp", "fsdp"]
    every = [
        {"kind": kind, "microbatches": microbatches, "again": again, "weights": EVERY, "variant": "paper"}
        for kind, microbatches, again in itertools.product(kinds, (1, 2), (False, True))
        if not again or ranks == 2 or kind == "hsdp"
    ]
    if ranks == 2:
        # Some of the losses, and the newer objectives: each with and without microbatches, and each sharding, in turn.
        others = [{"weights": weights, "variant": "paper"} for weights in SOME]
        others += [{"weights": EVERY, "variant": variant} for variant in VARIANTS if variant != "paper"]
        for i, other in enumerate(others):
            every += [
                {"kind": kind, "microbatches": 1 + (i + j) % 2, "again": False} | other
                for j, kind in enumerate(("ddp", "fsdp"))
            ]
    # Both implementations on two ranks. One in each of the other cases, to save time.
    return [
        case | {"plan": plan}
        for case in every
        for plan in ("plain", "fast")
        if (ranks == 2 and case["weights"] == EVERY and case["variant"] == "paper" and not case["again"])
        or (case["kind"] == "ddp" and case["weights"] != EVERY)
        or (plan == "fast") == (case["microbatches"] == 2)
    ]


def run(world: Any, oracles: dict[tuple[tuple[float, ...], str], Oracle], case: dict[str, Any]) -> dict[str, Any]:
    kind, number, weights = case["kind"], case["microbatches"], case["weights"]
    model = micro_model(**SHALLOW, **VARIANTS[case["variant"]])
    if case["again"]:
        checkpoint_activations(model)
    parallel = parallelize(model, world, "ddp" if kind == "ddp" else "fsdp", nodes=2 if kind == "hsdp" else 1)
    micro = pieces(world, number, case["variant"])
    oracle, found = oracles[weights, case["variant"]], dict(case)
    usual = not case["again"] and weights == EVERY and case["variant"] == "paper"
    # Two steps in turn: the first must not affect the second, at which DDP refuses parameters that the first left out.
    for _ in range(2 if world.size == 2 and (usual or kind == "ddp") else 1):
        model.zero_grad(set_to_none=True)
        chosen: dict[str, Any] = {"plan": case["plan"], "weights": LossWeights(*weights)}
        losses = backward_global(parallel, micro, world, seed=SEED, step=STEP, **chosen)
        gradients = {name: whole(p.grad) for name, p in model.named_parameters()}
        found["global losses"] = [abs(a.item() - b) for a, b in zip(losses, oracle.losses, strict=True)]
        found["global gradients"] = differences(gradients, oracle.gradients)
    if usual:  # an update knows no objective
        norm, _ = gradient_norms(model)
        update(model, norm)
        found["norm"] = float(norm) - float(torch.nn.utils.get_total_norm(list(oracle.gradients.values())))  # pyright: ignore[reportArgumentType]
        updated = {name: p.detach() for name, p in unsharded_copy(model).named_parameters()}
        found["updated"] = differences(updated, oracle.after_a_step)  # pyright: ignore[reportArgumentType]
    return found


def twice(world: Any, microbatches: int, most: int) -> dict[str, Any]:
    """Losses and gradients with a limit that binds, against one rank; and whether a second run has the same bits."""
    with limited_to(most):
        oracle, runs = Oracle(EVERY), []
        for _ in range(2):
            model = micro_model(**SHALLOW)
            micro = pieces(world, microbatches)
            losses = backward_global(parallelize(model, world), micro, world, seed=SEED, step=STEP)
            runs.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (losses, gradients), (again, same) = runs
    return {
        "losses": [abs(a.item() - b) for a, b in zip(losses, oracle.losses, strict=True)],
        "gradients": differences(gradients, oracle.gradients),
        "itm": oracle.losses[3],
        "repeats": differences(gradients, same) == 0 and all(map(torch.equal, losses, again)),
    }


def pieces(world: Any, number: int, variant: str = "paper") -> list[tuple[Batch, Masks]]:
    """This rank's microbatches of the whole batch."""
    size = len(LENGTHS) // (world.size * number)
    return [piece(*whole_batch(variant), (a * world.size + world.rank) * size, size) for a in range(number)]


def main() -> None:
    port, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # The oracles are computed once, before the fork.
    oracles = {(weights, "paper"): Oracle(weights) for weights in (EVERY, *SOME)}
    oracles |= {(EVERY, variant): Oracle(EVERY, variant) for variant in VARIANTS}
    for oracle in oracles.values():
        _ = oracle.after_a_step
    ranks = []
    for rank in range(8):
        if (pid := os.fork()) == 0:
            code = 1
            try:
                (folder / f"{rank}.json").write_text(json.dumps(results_of(rank, port, oracles)))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        ranks.append(pid)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in ranks))


def results_of(rank: int, port: int, oracles: dict[tuple[tuple[float, ...], str], Oracle]) -> dict[str, Any]:
    """A rank's results in each world that it belongs to."""
    found: dict[str, Any] = {}
    for ranks in (8, 4, 2):
        if rank < ranks:
            address = f"tcp://127.0.0.1:{port + ranks}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
            world = World(rank, ranks, rank, torch.device("cpu"))
            found[str(ranks)] = [run(world, oracles, case) for case in combinations(ranks)]
            found[f"{ranks} logits"] = [logit_elements(rank, ranks, elements) for elements in (36, 1 << 20)]
            found[f"{ranks} shared"] = [shared_positives(rank, ranks, elements) for elements in (36, 1 << 20)]
            if ranks == 4:
                found["limited"] = {str(number): twice(world, number, 1) for number in (1, 2)}
            dist.destroy_process_group()
    return found


if __name__ == "__main__":
    main()
