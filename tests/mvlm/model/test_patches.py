# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportArgumentType=false
import math

import numpy as np
import pytest
import torch

from mvlm.model.patches import gumbel, mask_tokens, masked_patches, visible_patches

GOLDEN = 0x9E3779B97F4A7C15
MIX1, MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
WORD = 1 << 64


def test_masked_patches_against_a_loop():
    ids = torch.tensor([[0, 3, 5], [1, 2, 8], [6, 7, 8]])
    mask = masked_patches(ids, 9)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 9)
    for row in range(3):
        for patch in range(9):
            assert bool(mask[row, patch]) == (patch in ids[row].tolist())


def test_masked_tokens_are_replaced_in_a_copy():
    tokens = torch.tensor([2, 11, 12, 3, 2, 13, 3])
    hidden = mask_tokens(tokens, torch.tensor([1, 5]), 4)
    assert hidden.tolist() == [2, 4, 12, 3, 2, 4, 3]
    assert tokens.tolist() == [2, 11, 12, 3, 2, 13, 3]


@pytest.mark.parametrize("seed", [0, 1, 12345, -3, 2**63 + 5])
@pytest.mark.parametrize("step, stream", [(0, 0), (0, 1), (600, 0), (10**9, 1)])
def test_gumbel_against_splitmix_on_python_integers(toys, seed, step, stream):
    rows, columns = [0, 1, 7, 4095, 2**40], [0, 2, 3, 511, 2**33]
    noise = gumbel(seed, step, stream, torch.tensor(rows), torch.tensor(columns))
    uniform = torch.tensor([[toys.uniform(seed, step, stream, r, c) for c in columns] for r in rows])
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
def test_gumbel_is_finite_where_the_hash_is_at_its_ends(toys, bits, extreme):
    """Columns are chosen so that the hash is all zeros and all ones: there 0 and 1 lie nearest."""

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * MIX1) % WORD
        x = ((x ^ (x >> 27)) * MIX2) % WORD
        return x ^ (x >> 31)

    assert mix(unmix(123456789)) == 123456789
    by_row = mix(mix(5 * GOLDEN % WORD))  # seed 5, step 0, stream 0, row 0
    column = (unmix(bits) - by_row) * pow(GOLDEN, -1, WORD) % WORD
    column -= WORD if column >> 63 else 0
    noise = gumbel(5, 0, 0, torch.tensor([0]), torch.tensor([column])).item()
    assert math.isfinite(noise)
    assert noise < -2.5 if extreme == "smallest" else noise > 16


def test_gumbel_has_the_distribution_of_its_name():
    """262,144 draws: mean, variance and largest distance to the distribution function within four standard errors."""
    index = torch.arange(512)
    noise = gumbel(3, 5, 0, index, index).double().numpy()
    number, variance = noise.size, math.pi**2 / 6
    assert abs(noise.mean() - 0.5772156649) < 4 * math.sqrt(variance / number)
    assert abs(noise.var() - variance) < 4 * variance * math.sqrt(4.4 / number)  # the kurtosis is 5.4
    ordered = np.sort(noise.ravel())
    distance = np.abs(np.exp(-np.exp(-ordered)) - (np.arange(number) + 0.5) / number).max()
    assert distance < 1.95 / math.sqrt(number)  # Kolmogorov and Smirnov, one in a thousand


@pytest.mark.parametrize("other", ["row", "column", "seed", "step", "stream"])
def test_gumbel_neighbours_are_unrelated(other):
    index = torch.arange(300)
    settings = {"seed": 3, "step": 5, "stream": 0, "rows": index, "columns": index}
    moved = {"row": {"rows": index + 1}, "column": {"columns": index + 1}}.get(other) or {other: 7}
    a, b = (gumbel(**(settings | change)).double().numpy().ravel() for change in ({}, moved))
    assert not np.array_equal(a, b)
    correlation = np.corrcoef(a, b)[0, 1]
    if other in ("row", "column"):  # shifted by one: the same numbers, elsewhere
        axis = 0 if other == "row" else 1
        a, b = a.reshape(300, 300), b.reshape(300, 300)
        kept = slice(1, None), slice(None, -1)
        assert np.array_equal(a[kept[0]] if axis == 0 else a[:, kept[0]], b[kept[1]] if axis == 0 else b[:, kept[1]])
    assert abs(correlation) < 4 / 300


def test_gumbel_of_a_pair_does_not_depend_on_the_rest_of_the_batch():
    rows, columns = torch.tensor([4, 0, 9]), torch.tensor([8, 3])
    index = torch.arange(10)
    whole = gumbel(1, 2, 0, index, index)
    assert torch.equal(gumbel(1, 2, 0, rows, columns), whole[rows][:, columns])


@pytest.mark.parametrize("step", [0, 7, 2**40])
def test_gumbel_of_a_step_on_the_device_is_that_of_the_number(step):
    index = torch.arange(6)
    assert torch.equal(gumbel(3, torch.tensor(step), 1, index, index), gumbel(3, step, 1, index, index))


def test_visible_patches_are_the_others():
    patch_ids = torch.tensor([[0, 3, 4], [1, 2, 8]])
    assert visible_patches(patch_ids, 9).tolist() == [[1, 2, 5, 6, 7, 8], [0, 3, 4, 5, 6, 7]]
