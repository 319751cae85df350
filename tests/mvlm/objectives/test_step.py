"""A step with objectives that somebody adds: on one rank, on two, and with microbatches, against loops in float64."""

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.global_batch import backward_global
from mvlm.distributed.parallel import parallelize
from mvlm.distributed.world import World, join_ranks
from mvlm.model import plain
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import step
from mvlm.objectives.losses import contrastive_sums
from mvlm.objectives.pretraining import ALL, ITM, MLM
from mvlm.objectives.step import BatchObjective, Embeddings, Features, MicrobatchObjective
from mvlm_dataloading import Batch, Masks
from support.faults.forks import ended_well, in_ranks
from support.microbatches import pieces, whole_batch
from support.models import ALONE, Largest, micro_batch, micro_model, normal


def shallow_model() -> MaskVLM:
    """A micro model with one layer in each encoder but the cross-modality ones."""
    return micro_model(image_layers=1, text_layers=1, decoder_layers=1)


@dataclass(frozen=True)
class Agreement(BatchObjective):
    """Predictions from masked captions are those from whole ones: KL divergence, mean of both directions.

    Accuracy: the share of rows whose nearest partner is the same.
    """

    name, accuracies, curve = "agreement", ("agreement_accuracy",), "agreement, nats"

    def views(self, config: MaskVLMConfig) -> Sequence[tuple[str, str]]:
        return [("image", "text"), ("image", "masked_text")]

    def shares(self, features: Features) -> Sequence[Tensor]:
        def sums(_: int, __: Tensor, whole: Tensor, masked: Tensor) -> list[Tensor]:
            same = whole.argmax(1) == masked.argmax(1)
            return [F.kl_div(masked.log_softmax(1), whole.softmax(1), reduction="sum"), same.to(whole.dtype).sum()]

        views = [(features.gather(*view), features.model.log_scale) for view in self.views(features.model.config)]
        images, texts = features.sum_over_logits(sums, *views)
        return [(a + b) / (2 * features.step.layout.total) for a, b in zip(images, texts, strict=True)]


@dataclass(frozen=True)
class Small(MicrobatchObjective):
    """Features of tokens are small: mean square of all tokens of a batch, whose number differs by microbatch."""

    name, curve = "small", "mean square of token features"

    def count(self, batch: Batch, masks: Masks | None) -> Tensor:
        return batch.cu_seqlens[-1].double()

    def means(self, features: Features) -> Sequence[Tensor]:
        return [features.streams.text.rows.square().mean(1).mean()]


OBJECTIVES = *ALL, Agreement(0.7), Small(3.0)


class Explicit:
    """Losses of one rank on the whole batch, the added ones by loops; gradients of their total."""

    def __init__(self, model: MaskVLM) -> None:
        batch, masks = whole_batch()
        usual = model(batch, masks, seed=3, step=5)
        streams, scale = plain.encode(model, batch, masks), model.log_scale.exp()
        assert streams.masked_text is not None
        image, text, masked = (
            model.embed_image(streams.image), model.embed_text(streams.text.first()),
            model.embed_text(streams.masked_text.first()),
        )  # fmt: skip
        agreement, same, number = torch.zeros(1, dtype=torch.float64), 0, len(image)
        for i in range(number):
            rows = ((text @ image[i], masked @ image[i]), (image @ text[i], image @ masked[i]))
            for p, q in (((scale * x).softmax(0), (scale * y).softmax(0)) for x, y in rows):
                agreement = agreement + (p * (p / q).log()).sum() / (2 * number)
                same += int(p.argmax() == q.argmax()) / (2 * number)
        tokens = [row.square().mean() for row in streams.text.rows]
        small = sum(tokens[1:], tokens[0]) / len(tokens)
        total = usual.total + 0.7 * agreement.squeeze() + 3 * small
        total.backward()
        self.losses = {name: x.item() for name, x in usual.items()} | {"total": total.item(), "small": small.item()}
        self.losses |= {"agreement": agreement.item(), "agreement_accuracy": same}
        self.gradients = {name: p.grad for name, p in model.named_parameters()}

    def check(self, found: dict[str, Tensor], model: MaskVLM) -> None:
        assert {name: x.item() for name, x in found.items()} == pytest.approx(self.losses, abs=1e-10)
        for name, parameter in model.named_parameters():
            grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
            torch.testing.assert_close(grad, self.gradients[name], rtol=0, atol=1e-10, msg=name)


def check(world: World, kind, microbatches: int, plan, wanted: Explicit) -> None:
    model = shallow_model()
    parallel, micro = parallelize(model, world, kind, nodes=1), pieces(world, microbatches)
    wanted.check(backward_global(parallel, micro, world, seed=3, step=5, plan=plan, objectives=OBJECTIVES), model)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["plain", "fast"])
def test_added_objectives_on_one_rank_are_those_of_loops(plan):
    wanted, model = Explicit(shallow_model()), shallow_model()
    losses = model(*whole_batch(), seed=3, step=5, plan=plan, objectives=OBJECTIVES)
    assert list(losses)[:7] == ["mlm", "mim", "itc", "itm", "agreement", "small", "total"]
    losses.total.backward()
    wanted.check(losses, model)
    with patch.object(step, "MAX_LOGITS", 32):
        check(ALONE, "ddp", 4, plan, wanted)


@pytest.mark.slow
def test_added_objectives_on_two_ranks_are_those_of_loops():
    """With and without microbatches and blocks of logits, and with both shardings."""
    wanted = Explicit(shallow_model())

    def work() -> None:
        world = join_ranks("cpu")
        check(world, "ddp", 1, "fast", wanted)
        with patch.object(step, "MAX_LOGITS", 32):
            check(world, "fsdp", 2, "plain", wanted)
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, 2)] == [True] * 2


def test_logits_in_memory_are_bounded():
    """At most 60 of 30 x 30 logits are in memory at a time, less than all embeddings; gradients are the same."""
    gradients, layout = [], GlobalBatchLayout(0, 1, 2, 15)
    features = Features(step.Step((), plain, layout, 0, 0, []), micro_model(), [], [])
    for most, largest in ((60, 30 * 10), (1 << 20, 30 * 30)):
        image, text = (normal(30, 5, seed=seed).requires_grad_() for seed in (0, 1))
        with Largest() as found, patch.object(step, "MAX_LOGITS", most):
            compared = Embeddings(image, text, layout), torch.zeros(1)
            both = features.sum_over_logits(lambda _, rows, logits: contrastive_sums(logits, rows), compared)
            (both[0][0] + both[1][0]).backward()
        assert found.elements == largest
        gradients.append((image.grad, text.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("objectives", [(MLM(), MLM(2.0)), (ITM(),)])
def test_objectives_that_do_not_go_together_are_refused(objectives):
    with pytest.raises(ValueError, match="objectives"):
        shallow_model()(*micro_batch(), objectives=objectives)
