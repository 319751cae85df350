"""The losses against loops in float64."""

import math

import pytest
import torch

from mvlm.objectives.losses import (
    contrastive_logits,
    contrastive_loss,
    correct_top1,
    masked_image_loss,
    masked_language_loss,
    matching_loss,
    shared_contrastive_sums,
)
from support.models import normal


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def test_masked_language_loss_against_loops():
    logits, targets = 3 * normal(7, 11), torch.tensor([0, 10, 4, 4, 7, 2, 9])
    wanted = sum(-log_softmax(row)[t] for row, t in zip(logits.tolist(), targets.tolist(), strict=True)) / 7
    assert masked_language_loss(logits, targets).item() == pytest.approx(wanted, abs=1e-12)


def test_masked_image_loss_against_loops():
    pred, target = normal(3, 4, 12), normal(3, 4, 12, seed=1)
    total = sum(
        abs(pred[b, k, i].item() - target[b, k, i].item()) for b in range(3) for k in range(4) for i in range(12)
    )
    assert masked_image_loss(pred, target).item() == pytest.approx(total / 144, abs=1e-12)


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


def test_contrastive_logits_against_loops():
    image, text, log_scale = normal(3, 5), normal(4, 5, seed=1), torch.tensor(1.7, dtype=torch.float64)
    logits = contrastive_logits(image, text, log_scale)
    for i in range(3):
        for j in range(4):
            dot = sum(image[i, e].item() * text[j, e].item() for e in range(5))
            assert logits[i, j].item() == pytest.approx(math.exp(1.7) * dot, rel=1e-12)


def test_contrastive_loss_of_small_matrices_by_hand():
    symmetric = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert contrastive_loss(symmetric)[0].item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-12)

    # [[1, 2], [3, 4]]: by rows the diagonal trails by 1 and leads by 1; by columns it trails by 2 and leads by 2.
    skew = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    rows = (math.log(1 + math.e) + math.log(1 + 1 / math.e)) / 2
    columns = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 2
    assert contrastive_loss(skew)[0].item() == pytest.approx((rows + columns) / 2, abs=1e-12)

    assert contrastive_loss(torch.full((5, 5), 3.0, dtype=torch.float64))[0].item() == pytest.approx(math.log(5))
    assert contrastive_loss(torch.tensor([[7.0]]))[0].item() == 0


def test_matching_loss_against_loops():
    logits = normal(9, 2)
    labels, weights = [1, 1, 1, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 1, 0, 0, 1]
    total = sum(-w * log_softmax(row)[y] for row, y, w in zip(logits.tolist(), labels, weights, strict=True))
    found, _ = matching_loss(logits, torch.tensor(labels), torch.tensor(weights, dtype=torch.float64))
    assert found.item() == pytest.approx(total / 6, abs=1e-12)


def test_matching_loss_without_negatives_is_that_of_the_true_pairs():
    logits = normal(3, 2).requires_grad_()
    loss, _ = matching_loss(logits, torch.tensor([1, 0, 0]), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(-log_softmax(logits[0].tolist())[1], abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1:].abs().sum() == 0


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
