"""A step with objectives that somebody adds, against loops in float64, and the parts of it that they call."""

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.config.model import MaskVLMConfig
from mvlm.distributed.collectives import GlobalBatchLayout
from mvlm.distributed.world import join_ranks
from mvlm.model import plain
from mvlm.model.implementation import Streams
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives import step
from mvlm.objectives.losses import contrastive_sums
from mvlm.objectives.pretraining import ALL, ITM, MLM
from mvlm.objectives.step import BatchObjective, Embeddings, Features, MicrobatchObjective
from mvlm_dataloading import Batch, Masks
from support.faults.forks import ended_well, in_ranks
from support.models import Largest, micro_batch, micro_model, normal
from support.objectives import check_against_loops, shallow_model


@dataclass(frozen=True)
class Agreement(BatchObjective):
    """Predictions from masked captions are those from whole ones: KL divergence, mean of both directions.

    Accuracy: the share of rows whose nearest partner is the same.
    """

    name, accuracies, curve = "agreement", ("agreement_accuracy",), "agreement, nats"
    trains = (*BatchObjective.trains, "log_scale")

    def views(self, config: MaskVLMConfig) -> Sequence[tuple[str, str]]:
        return [("image", "text"), ("image", "masked_text")]

    def shares(self, features: Features) -> Sequence[Tensor]:
        def sums(_: int, __: Tensor, whole: Tensor, masked: Tensor) -> list[Tensor]:
            same = whole.argmax(1) == masked.argmax(1)
            return [F.kl_div(masked.log_softmax(1), whole.softmax(1), reduction="sum"), same.to(whole.dtype).sum()]

        views = [(features.gather(*view), features.model.log_scale) for view in self.views(features.model.config)]
        images, texts = features.sum_over_logits(sums, *views)
        return [(a + b) / (2 * features.step.layout.total) for a, b in zip(images, texts, strict=True)]


def agreement_by_loops(model: MaskVLM, streams: Streams) -> tuple[Tensor, float]:
    assert streams.masked_text is not None
    image, scale = model.embed_image(streams.image), model.log_scale.exp()
    text, masked = model.embed_text(streams.text.first()), model.embed_text(streams.masked_text.first())
    agreement, same, number = torch.zeros((), dtype=torch.float64), 0.0, len(image)
    for i in range(number):
        rows = ((text @ image[i], masked @ image[i]), (image @ text[i], image @ masked[i]))
        for p, q in (((scale * x).softmax(0), (scale * y).softmax(0)) for x, y in rows):
            agreement = agreement + (p * (p / q).log()).sum() / (2 * number)
            same += int(p.argmax() == q.argmax()) / (2 * number)
    return agreement, same


@dataclass(frozen=True)
class Spread(BatchObjective):
    """Embeddings are spread over the sphere: logarithm of the mean of exp(-2 d^2) over all pairs of different samples.

    The mean of images and of captions; d is the distance of two of them (Wang and Isola, ICML 2020).
    """

    name, curve = "spread", "spread, log of mean exp(-2 squared distance)"

    def shares(self, features: Features) -> Sequence[Tensor]:
        def sums(_: int, rows: Tensor, cosines: Tensor) -> list[Tensor]:
            return [(4 * cosines - 4).exp().scatter(1, rows[:, None], 0).sum()]  # but for each row with itself

        (images,), (texts,) = features.sum_over_logits(sums, (features.gather(), None), within=True)
        layout = features.step.layout
        means = features.global_sum(torch.stack([images, texts])) / (layout.total * (layout.total - 1))
        return [means.log().mean() / layout.ranks]


def spread_by_loops(model: MaskVLM, streams: Streams) -> list[Tensor]:
    loss = torch.zeros((), dtype=torch.float64)
    for x in (model.embed_image(streams.image), model.embed_text(streams.text.first())):
        terms = [(-2 * (a - b).square().sum()).exp() for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        loss = loss + (sum(terms[1:], terms[0]) / len(terms)).log() / 2
    return [loss]


@dataclass(frozen=True)
class Small(MicrobatchObjective):
    """Features of tokens are small: mean square of all tokens of a batch, whose number differs by microbatch."""

    name, curve = "small", "mean square of token features"
    encoders = ("text_encoder",)

    def count(self, batch: Batch, masks: Masks | None) -> Tensor:
        return batch.cu_seqlens[-1].double()

    def means(self, features: Features) -> Sequence[Tensor]:
        return [features.streams.text.rows.square().mean(1).mean()]


def small_by_loops(_: MaskVLM, streams: Streams) -> list[Tensor]:
    tokens = [row.square().mean() for row in streams.text.rows]
    return [sum(tokens[1:], tokens[0]) / len(tokens)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "loop"),
    [(Agreement(0.7), agreement_by_loops), (Spread(0.4), spread_by_loops), (Small(3.0), small_by_loops)],
    ids=["agreement", "spread", "small"],
)
def test_an_added_objective_is_that_of_loops_in_every_step(objective, loop):
    check_against_loops(objective, loop)


def test_losses_come_in_the_order_of_objectives_then_accuracies():
    names = ["mlm", "mim", "itc", "itm", "agreement", "small", "total"]
    names += ["mlm_accuracy", "itc_accuracy", "itm_accuracy", "agreement_accuracy"]
    assert list(shallow_model()(*micro_batch(), objectives=(*ALL, Agreement(), Small()))) == names


def features_of(layout: GlobalBatchLayout, microbatches: int = 0) -> Features:
    this = step.Step((), plain, layout, 0, 0, [])
    return Features(this, micro_model(), [micro_batch()] * microbatches, [])


def test_a_global_sum_has_the_gradients_of_all_ranks():
    """Of sum(x^2) / sum(x)^2, whose shares x^2 / sum(x)^2 have another gradient by the sum on each rank."""
    every = torch.tensor([1.0, 3.0], requires_grad=True)
    (every.square().sum() / every.sum().square()).backward()
    assert every.grad is not None
    wanted = every.grad.tolist()

    def work() -> None:
        world = join_ranks("cpu")
        x = torch.tensor(1.0 + 2 * world.rank, requires_grad=True)
        total = features_of(GlobalBatchLayout(world.rank, 2, 1, 1), microbatches=1).global_sum(x)
        (x.square() / total.square()).backward()
        assert total.item() == 4
        assert x.grad is not None
        assert x.grad.item() == pytest.approx(wanted[world.rank])
        world.close()

    assert [ended_well(pid) for pid in in_ranks(work, 2)] == [True] * 2


def test_a_global_sum_of_one_of_several_microbatches_is_refused():
    with pytest.raises(ValueError, match="BatchObjective"):
        features_of(GlobalBatchLayout(0, 1, 2, 5), microbatches=1).global_sum(torch.ones(()))


def test_logits_in_memory_are_bounded():
    """At most 60 of 30 x 30 logits are in memory at a time, less than all embeddings; gradients are the same."""
    gradients, layout = [], GlobalBatchLayout(0, 1, 2, 15)
    features = features_of(layout)
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
