"""The losses against loops in float64, and masked tokens of captions against lists."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch

from mvlm.objectives.losses import (
    contrastive_logits,
    contrastive_loss,
    correct_top1,
    masked_image_loss,
    masked_language_loss,
    masked_targets,
    matching_loss,
    number_of_masked_tokens,
    shared_contrastive_sums,
)
from support.models import micro_batch, normal


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def test_reconstruction_losses_against_loops():
    """Means over tokens and pixels."""
    logits, targets = 3 * normal(7, 11), torch.tensor([0, 10, 4, 4, 7, 2, 9])
    wanted = -sum(log_softmax(row)[t] for row, t in zip(logits.tolist(), targets.tolist(), strict=True)) / 7
    assert masked_language_loss(logits, targets).item() == pytest.approx(wanted, abs=1e-12)

    pred, target = normal(3, 4, 12), normal(3, 4, 12, seed=1)
    each = [pred[b, k, i].item() - target[b, k, i].item() for b, k, i in product(range(3), range(4), range(12))]
    assert masked_image_loss(pred, target).item() == pytest.approx(sum(map(abs, each)) / 144, abs=1e-12)
    assert masked_image_loss(pred, target, "mse").item() == pytest.approx(sum(x * x for x in each) / 144, abs=1e-12)


@pytest.mark.parametrize("loss", ["mlm", "mim", "itm"])
def test_losses_of_bf16_inputs_are_computed_in_fp32(loss):
    """Equal to the bit to the losses of the same numbers in fp32."""
    x = (4 * normal(6, 2)).bfloat16()
    other = {"mlm": torch.tensor([0, 1, 1, 0, 0, 1]), "mim": normal(6, 2, seed=1).float()}
    found, wanted = (
        {
            "mlm": lambda x: masked_language_loss(x, other["mlm"]),
            "mim": lambda x: masked_image_loss(x, other["mim"]),
            "itm": lambda x: matching_loss(x, other["mlm"], torch.tensor([1.0, 1, 1, 0, 1, 1]))[0],
        }[loss](value)
        for value in (x, x.float())
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_contrastive_logits_are_the_same_under_autocast():
    """And their gradients: the product of embeddings is in fp32."""
    image, text, log_scale = normal(3, 5).float(), normal(4, 5, seed=1).float(), torch.tensor([1.7])
    found = []
    for enabled in (False, True):
        own, other = image.clone().requires_grad_(), text.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = contrastive_logits(own, other, log_scale)
        logits.square().sum().backward()
        found.append((logits, own.grad, other.grad))
    for plain, mixed in zip(*found, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(plain, mixed)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_sigmoid_loss_against_loops(scale):
    """Logits of up to 150: log(1 + e^x) is exact on both sides."""
    logits, bias = scale * normal(5, 5), torch.tensor([-1.5], dtype=torch.float64)
    total = 0.0
    for i in range(5):
        for j in range(5):
            x = (logits[i, j].item() - 1.5) * (1 if i == j else -1)
            total += math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x
    loss, accuracy = contrastive_loss(logits, bias)
    assert loss.item() == pytest.approx(total / 5, rel=1e-12)
    assert accuracy == contrastive_loss(logits)[1]


def is_largest(row: list[float], place: int) -> bool:
    return all(row[place] >= x for x in row)


def test_correct_top1_against_loops():
    logits = normal(12, 4)
    targets = [0, 1, 2, 3] * 3
    wanted = [is_largest(row, t) for row, t in zip(logits.tolist(), targets, strict=True)]
    assert 0 < sum(wanted) < 12
    assert correct_top1(logits.requires_grad_(), torch.tensor(targets)).tolist() == wanted
    assert not correct_top1(logits, torch.tensor(targets)).requires_grad
    assert correct_top1(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([2])).tolist() == [1]  # a tie is correct


def test_contrastive_accuracy_is_the_mean_of_both_directions():
    logits = normal(9, 9) + 1.5 * torch.eye(9)
    rows = [is_largest(row, i) for i, row in enumerate(logits.tolist())]
    columns = [is_largest(column, i) for i, column in enumerate(logits.T.tolist())]
    assert sum(rows) != sum(columns)
    assert contrastive_loss(logits)[1].item() == pytest.approx((sum(rows) + sum(columns)) / 18, rel=1e-12)


def test_right_answers_of_a_row_share_its_target():
    logits = 3 * normal(6, 8) + 3 * torch.eye(6, 8)
    positives = torch.zeros(6, 8, dtype=torch.bool)
    for row, columns in enumerate(([0], [1, 4], [2], [3, 5, 7], list(range(8)), [5, 0])):
        positives[row, columns] = True
    wanted, correct = 0.0, 0
    for row, right in zip(logits.tolist(), positives.tolist(), strict=True):
        columns = [j for j in range(8) if right[j]]
        wanted -= sum(log_softmax(row)[j] for j in columns) / len(columns)
        correct += max(range(8), key=row.__getitem__) in columns
    loss, accuracy = shared_contrastive_sums(logits, positives)
    assert loss.item() == pytest.approx(wanted, abs=1e-12)
    assert accuracy.item() == correct
    assert 1 < correct < 6


def test_matching_accuracy_leaves_out_pairs_without_weight():
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    labels, weights = torch.tensor([1, 1, 0, 0]), torch.tensor([1.0, 1, 0, 1])
    assert matching_loss(logits, labels, weights)[1].item() == pytest.approx(2 / 3)


def test_padding_positions_count_nothing():
    batch, masks = micro_batch((5, 4))
    batch.tokens[2] = 100  # a token like any other
    masks = replace(masks, token_ids=torch.tensor([2, 6]))
    padded = replace(masks, token_ids=torch.tensor([2, 6, 15, 15]))
    longer = replace(batch, tokens=torch.cat([batch.tokens, torch.zeros(7, dtype=torch.int64)]))
    assert masked_targets(longer, padded).tolist() == [*batch.tokens[[2, 6]].tolist(), -100, -100]
    for given in (masks, padded):
        assert number_of_masked_tokens(longer, given).item() == 2
