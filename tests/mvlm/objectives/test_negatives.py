# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportArgumentType=false
"""Hard negatives and their noise, against loops and SplitMix64 on Python integers."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mvlm.objectives.negatives import NegativeSampling, drawn_weights, gumbel, limit_pairs_per_negative
from support.models import normal, uniform_of_pair

GOLDEN = 0x9E3779B97F4A7C15
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64
# Six pairs: 0 and 1 share an image, 2 and 3 a caption, 3 and 4 an image.
IMAGE_ID, TEXT_ID = torch.tensor([10, 10, 11, 12, 12, 13]), torch.tensor([20, 21, 22, 22, 23, 24])
TRUE_MATCHES = {(0, 1), (1, 0), (2, 3), (3, 2), (3, 4), (4, 3)} | {(i, i) for i in range(6)}


def draw(
    logits: Tensor, seed: int, step: int, direction: int, image_id: Tensor = IMAGE_ID, text_id: Tensor = TEXT_ID
) -> tuple[Tensor, Tensor]:
    """Drawn columns, and their weights."""
    rows = torch.arange(len(logits))
    columns = NegativeSampling(image_id, text_id, seed, step).draw(logits, rows, direction)
    return columns, drawn_weights(columns, rows)


def distinct(number: int) -> tuple[Tensor, Tensor]:
    """Ids of pairs that share neither image nor caption."""
    return torch.arange(number), torch.arange(number)


def test_draws_against_gumbel_argmax_in_python():
    logits = normal(6, 6, seed=7)
    for step in range(5):
        columns, weights = draw(logits, 3, step, 1)
        assert weights.tolist() == [1.0] * 6
        for row in range(6):
            scores = {
                j: logits[row, j].item() - math.log(-math.log(uniform_of_pair(3, step, 1, row, j)))
                for j in range(6)
                if (row, j) not in TRUE_MATCHES
            }
            assert columns[row].item() == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("number", [1, 4])
def test_without_an_admissible_negative_the_weight_is_zero(number):
    """A batch of one pair, and a batch of equal captions."""
    logits = normal(number, number).requires_grad_()
    columns, weights = draw(logits, 0, 0, 0, torch.arange(number), torch.zeros(number, dtype=torch.int64))
    assert weights.tolist() == [0.0] * number
    assert weights.dtype == torch.float32
    assert not weights.requires_grad
    assert columns.tolist() == list(range(number))  # a pair's own features cost no exchange


def test_only_rows_without_an_admissible_negative_have_weight_zero():
    """Pair 0 shares its caption with pair 1 and its image with pair 2: it has no negative, they have each other."""
    columns, weights = draw(normal(3, 3), 0, 0, 0, torch.tensor([1, 2, 1]), torch.tensor([5, 5, 6]))
    assert weights.tolist() == [0.0, 1.0, 1.0]
    assert columns[1:].tolist() == [2, 1]


@pytest.mark.parametrize("seed", [0, 1, 12345, -3, 2**63 + 5])
@pytest.mark.parametrize("step, direction", [(0, 0), (0, 1), (600, 0), (10**9, 1)])
def test_gumbel_against_splitmix_on_python_integers(seed, step, direction):
    rows, columns = [0, 1, 7, 4095, 2**40], [0, 2, 3, 511, 2**33]
    noise = gumbel(seed, step, direction, torch.tensor(rows), torch.tensor(columns))
    uniform = torch.tensor([[uniform_of_pair(seed, step, direction, r, c) for c in columns] for r in rows])
    assert noise.dtype == torch.float32
    assert torch.equal(noise, -torch.log(-torch.log(uniform)))  # bit for bit
    wanted = [[-math.log(-math.log(u)) for u in row] for row in uniform.double().tolist()]
    np.testing.assert_allclose(noise.numpy(), wanted, rtol=1e-6, atol=1e-6)


def unmix(x: int) -> int:
    """The inverse of SplitMix64's finaliser."""
    x ^= (x >> 31) ^ (x >> 62)
    x = x * pow(MIX2, -1, WORD) % WORD
    x ^= (x >> 27) ^ (x >> 54)
    x = x * pow(MIX1, -1, WORD) % WORD
    return x ^ (x >> 30) ^ (x >> 60)


@pytest.mark.parametrize("bits, extreme", [(0, "smallest"), (WORD - 1, "largest")])
def test_gumbel_is_finite_for_the_smallest_and_largest_hash(bits, extreme):
    """Columns are chosen so that the hash is all zeros or all ones, where the uniform number is nearest to 0 or 1."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * MIX1) % WORD
        x = ((x ^ (x >> 27)) * MIX2) % WORD
        return x ^ (x >> 31)

    assert mix(unmix(123456789)) == 123456789
    by_row = mix(mix(5 * GOLDEN % WORD))  # seed 5, step 0, direction 0, row 0
    column = (unmix(bits) - by_row) * pow(GOLDEN, -1, WORD) % WORD
    column -= WORD if column >> 63 else 0
    noise = gumbel(5, 0, 0, torch.tensor([0]), torch.tensor([column])).item()
    assert math.isfinite(noise)
    assert noise < -2.5 if extreme == "smallest" else noise > 16


@pytest.mark.parametrize("step", [0, 7, 2**40])
def test_gumbel_of_a_step_tensor_is_that_of_the_number(step):
    index = torch.arange(6)
    assert torch.equal(gumbel(3, torch.tensor(step), 1, index, index), gumbel(3, step, 1, index, index))


# Inductor imports deprecated parts of torch.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.extended
@pytest.mark.slow
def test_compiled_draws_are_those_of_eager_ones():
    """Hashes overflow on purpose, which C++ leaves undefined for the indices of its loops."""

    def chosen(scores: Tensor, step: Tensor) -> Tensor:
        index = torch.arange(len(scores))
        return (scores + gumbel(3, step, 0, index, index)).argmax(1)

    arguments = torch.zeros(40, 40), torch.tensor(7)
    assert torch.equal(torch.compile(chosen, fullgraph=True, dynamic=False)(*arguments), chosen(*arguments))


@pytest.mark.parametrize("most", [1, 2, 5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_limited_pairs_against_a_loop(most, seed):
    """The first pairs that drew a negative keep it, the others get their own index, which counts as no negative."""
    columns = np.random.default_rng(seed).integers(0, 6, size=40).tolist()
    columns[7], columns[3] = 7, 3
    wanted, pairs = [], dict.fromkeys(range(40), 0)
    for row, column in enumerate(columns):
        kept = column != row and pairs[column] < most
        pairs[column] += kept
        wanted.append(column if kept else row)
    assert limit_pairs_per_negative(torch.tensor(columns), most).tolist() == wanted


def test_draws_of_a_batch_are_limited():
    """One image and one caption are far likelier than all others, so that all 80 pairs draw them."""
    logits = torch.zeros(80, 80).index_fill(1, torch.tensor([9]), 100.0)
    negatives = NegativeSampling(*distinct(80), 0, 0).draw_both(logits)
    assert int((negatives.texts == 9).sum()) == 32
    assert int(negatives.text_weights.sum()) == 32 + 1  # pair 9 itself has another
    assert (
        negatives.texts[negatives.text_weights == 0].tolist() == torch.arange(80)[negatives.text_weights == 0].tolist()
    )


def test_draws_from_equal_logits_do_not_reach_the_limit():
    """A step of 1,024 ranks of 128 pairs makes as many draws: docs/guides/many_gpus.md says at most 9 pairs."""
    for seed in range(20):
        columns = np.random.default_rng(seed).integers(0, 131072, size=131072)
        assert np.bincount(columns).max() <= 9
