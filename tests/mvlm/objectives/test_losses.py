import math

import numpy as np
import pytest
import torch

from mvlm.objectives.losses import (
    admissible_negatives,
    contrastive_hits,
    contrastive_logits,
    contrastive_loss,
    draw_negatives,
    hits,
    masked_image_loss,
    masked_language_loss,
    matching_hits,
    matching_loss,
)


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(x - top) for x in row))
    return [x - total for x in row]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def test_masked_language_loss_against_loops():
    logits, targets = 3 * random(7, 11), torch.tensor([0, 10, 4, 4, 7, 2, 9])
    wanted = sum(-log_softmax(row)[t] for row, t in zip(logits.tolist(), targets.tolist(), strict=True)) / 7
    assert masked_language_loss(logits, targets).item() == pytest.approx(wanted, abs=1e-12)


def test_masked_image_loss_against_loops():
    pred, target = random(3, 4, 12), random(3, 4, 12, seed=1)
    total = sum(
        abs(pred[b, k, i].item() - target[b, k, i].item()) for b in range(3) for k in range(4) for i in range(12)
    )
    assert masked_image_loss(pred, target).item() == pytest.approx(total / 144, abs=1e-12)


@pytest.mark.parametrize("loss", ["mlm", "mim", "itm"])
def test_low_precision_is_raised_before_the_loss(loss):
    """Under autocast the logits come in bf16: the loss is that of the same numbers in fp32, to the bit."""
    x = (4 * random(6, 2)).bfloat16()
    other = {"mlm": torch.tensor([0, 1, 1, 0, 0, 1]), "mim": random(6, 2, seed=1).float()}
    found, wanted = (
        {
            "mlm": lambda x: masked_language_loss(x, other["mlm"]),
            "mim": lambda x: masked_image_loss(x, other["mim"]),
            "itm": lambda x: matching_loss(x, other["mlm"], torch.tensor([1.0, 1, 1, 0, 1, 1])),
        }[loss](value)
        for value in (x, x.float())
    )
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_contrastive_logits_against_loops():
    image, text, log_scale = random(3, 5), random(4, 5, seed=1), torch.tensor(1.7, dtype=torch.float64)
    logits = contrastive_logits(image, text, log_scale)
    for i in range(3):
        for j in range(4):
            dot = sum(image[i, e].item() * text[j, e].item() for e in range(5))
            assert logits[i, j].item() == pytest.approx(math.exp(1.7) * dot, rel=1e-12)


def test_contrastive_loss_of_matrices_made_by_hand():
    symmetric = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert contrastive_loss(symmetric).item() == pytest.approx(math.log(1 + math.exp(-2)), abs=1e-12)

    # [[1, 2], [3, 4]]: by rows the right answers trail by 1 and lead by 1; by columns they trail by 2 and lead by 2.
    skew = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    rows = (math.log(1 + math.e) + math.log(1 + 1 / math.e)) / 2
    columns = (math.log(1 + math.exp(2)) + math.log(1 + math.exp(-2))) / 2
    assert contrastive_loss(skew).item() == pytest.approx((rows + columns) / 2, abs=1e-12)

    assert contrastive_loss(torch.full((5, 5), 3.0, dtype=torch.float64)).item() == pytest.approx(math.log(5))
    assert contrastive_loss(torch.tensor([[7.0]])).item() == 0


def test_admissible_negatives_against_loops():
    image_id, text_id = torch.tensor([1, 2, 1, 3, 4]), torch.tensor([7, 8, 9, 8, 5])
    found = admissible_negatives(image_id, text_id)
    for i in range(5):
        for j in range(5):
            match = image_id[i] == image_id[j] or text_id[i] == text_id[j]
            assert bool(found[i, j]) == (not match)
    assert found.any(1).all()


# Six pairs of which 0 and 1 show one picture, 2 and 3 have equal captions, and 3 and 4 show one picture.
IMAGE_ID, TEXT_ID = torch.tensor([10, 10, 11, 12, 12, 13]), torch.tensor([20, 21, 22, 22, 23, 24])
TRUE_MATCHES = {(0, 1), (1, 0), (2, 3), (3, 2), (3, 4), (4, 3)} | {(i, i) for i in range(6)}


@pytest.fixture(scope="module")
def thousand_draws():
    """Columns (stream, step, row) of 1,000 steps in both directions, and the logits they were drawn with."""
    logits = 1.5 * random(6, 6, seed=2)
    logits += 3 * torch.eye(6)  # as in training, the true match is the likeliest
    admissible = admissible_negatives(IMAGE_ID, TEXT_ID)
    columns = np.zeros((2, 1000, 6), int)
    for step in range(1000):
        columns[0, step] = draw_negatives(logits, admissible, 5, step, 0)[0].numpy()
        columns[1, step] = draw_negatives(logits.T, admissible.T, 5, step, 1)[0].numpy()
    return logits, columns


def test_a_negative_is_never_a_true_match(thousand_draws):
    _, columns = thousand_draws
    drawn = {(row, int(column)) for stream in columns for step in stream for row, column in enumerate(step)}
    assert not drawn & TRUE_MATCHES
    assert drawn == {(i, j) for i in range(6) for j in range(6)} - TRUE_MATCHES  # and every other pair comes up


@pytest.mark.parametrize("stream", [0, 1])
def test_negatives_follow_the_softmax_over_admissible_columns(thousand_draws, stream):
    logits, columns = thousand_draws
    table = (logits if stream == 0 else logits.T).tolist()
    for row in range(6):
        allowed = [j for j in range(6) if (row, j) not in TRUE_MATCHES]
        total = sum(math.exp(table[row][j]) for j in allowed)
        for j in allowed:
            p = math.exp(table[row][j]) / total
            seen = int((columns[stream, :, row] == j).sum())
            assert abs(seen - 1000 * p) < 4 * math.sqrt(1000 * p * (1 - p)), (row, j, p, seen)


def test_the_two_directions_are_drawn_independently():
    """With one table for both, the directions agree as often as two independent draws do."""
    logits = random(5, 5, seed=3)
    table = (logits + logits.T).tolist()
    logits, admissible = logits + logits.T, ~torch.eye(5, dtype=torch.bool)
    agree = np.zeros(5)
    for step in range(1000):
        a, b = (draw_negatives(logits, admissible, 5, step, stream)[0] for stream in (0, 1))
        agree += (a == b).numpy()
    for row in range(5):
        weights = [math.exp(table[row][j]) for j in range(5) if j != row]
        p = sum((w / sum(weights)) ** 2 for w in weights)
        assert abs(agree[row] - 1000 * p) < 4 * math.sqrt(1000 * p * (1 - p))


def test_a_draw_is_a_function_of_seed_step_row_and_column():
    logits, admissible = random(6, 6, seed=4), admissible_negatives(IMAGE_ID, TEXT_ID)
    first = draw_negatives(logits, admissible, 1, 2, 0)[0]
    torch.manual_seed(99)
    torch.rand(5)
    assert torch.equal(draw_negatives(logits, admissible, 1, 2, 0)[0], first)
    # What other rows hold changes nothing.
    others = logits.clone()
    others[1:] = random(5, 6, seed=5)
    assert draw_negatives(others, admissible, 1, 2, 0)[0][0] == first[0]
    for change in ({"seed": 2}, {"step": 3}, {"stream": 1}):
        settings = {"seed": 1, "step": 2, "stream": 0} | change
        wide, free = random(64, 64, seed=6), ~torch.eye(64, dtype=torch.bool)
        assert not torch.equal(draw_negatives(wide, free, **settings)[0], draw_negatives(wide, free, 1, 2, 0)[0])


def test_draws_against_gumbel_argmax_in_python(toys):
    logits, admissible = random(6, 6, seed=7), admissible_negatives(IMAGE_ID, TEXT_ID)
    for step in range(5):
        columns, weights = draw_negatives(logits, admissible, 3, step, 1)
        assert weights.tolist() == [1.0] * 6
        for row in range(6):
            scores = {
                j: logits[row, j].item() - math.log(-math.log(toys.uniform(3, step, 1, row, j)))
                for j in range(6)
                if (row, j) not in TRUE_MATCHES
            }
            assert columns[row].item() == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("number", [1, 4])
def test_without_an_admissible_negative_the_weight_is_zero(number):
    """A batch of one pair, and a batch of equal captions."""
    logits = random(number, number).requires_grad_()
    admissible = admissible_negatives(torch.arange(number), torch.zeros(number, dtype=torch.int64))
    columns, weights = draw_negatives(logits, admissible, 0, 0, 0)
    assert weights.tolist() == [0.0] * number
    assert weights.dtype == logits.dtype
    assert not weights.requires_grad
    assert all(0 <= c < number for c in columns.tolist())


def test_only_the_rows_without_a_negative_lose_theirs():
    """Pair 0 shares its caption with pair 1 and its picture with pair 2: it has no negative, they have each other."""
    admissible = admissible_negatives(torch.tensor([1, 2, 1]), torch.tensor([5, 5, 6]))
    columns, weights = draw_negatives(random(3, 3), admissible, 0, 0, 0)
    assert weights.tolist() == [0.0, 1.0, 1.0]
    assert columns[1:].tolist() == [2, 1]


def test_matching_loss_against_loops():
    logits = random(9, 2)
    labels, weights = [1, 1, 1, 0, 0, 0, 0, 0, 0], [1.0, 1, 1, 1, 0, 1, 0, 0, 1]
    total = sum(-w * log_softmax(row)[y] for row, y, w in zip(logits.tolist(), labels, weights, strict=True))
    found = matching_loss(logits, torch.tensor(labels), torch.tensor(weights, dtype=torch.float64))
    assert found.item() == pytest.approx(total / 6, abs=1e-12)


def test_matching_loss_with_no_negative_at_all_is_that_of_the_positives():
    logits = random(3, 2).requires_grad_()
    loss = matching_loss(logits, torch.tensor([1, 0, 0]), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert loss.item() == pytest.approx(-log_softmax(logits[0].tolist())[1], abs=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[1:].abs().sum() == 0


def is_largest(row: list[float], place: int) -> bool:
    return all(row[place] >= x for x in row)


def test_hits_against_loops():
    logits = random(12, 4)
    targets = [0, 1, 2, 3] * 3
    wanted = [is_largest(row, t) for row, t in zip(logits.tolist(), targets, strict=True)]
    assert 0 < sum(wanted) < 12
    assert hits(logits.requires_grad_(), torch.tensor(targets)).tolist() == wanted
    assert not hits(logits, torch.tensor(targets)).requires_grad
    assert hits(torch.zeros(1, 3, dtype=torch.bfloat16), torch.tensor([2])).tolist() == [1]  # an equal one is right


def test_contrastive_hits_are_the_mean_of_both_directions():
    logits = random(9, 9) + 1.5 * torch.eye(9)
    rows = [is_largest(row, i) for i, row in enumerate(logits.tolist())]
    columns = [is_largest(column, i) for i, column in enumerate(logits.T.tolist())]
    assert sum(rows) != sum(columns)
    assert contrastive_hits(logits).item() == pytest.approx((sum(rows) + sum(columns)) / 18, rel=1e-12)


def test_matching_hits_leave_out_what_has_no_weight():
    logits = torch.tensor([[0.0, 1], [1, 0], [0, 1], [1, 0]])
    labels, weights = torch.tensor([1, 1, 0, 0]), torch.tensor([1.0, 1, 0, 1])
    assert matching_hits(logits, labels, weights).item() == pytest.approx(2 / 3)
