import numpy as np

from mvlm_dataloading.randomness import Purpose, hash64, text_hash, uniforms

MASK = (1 << 64) - 1


def splitmix_finaliser(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_hashes_of_scalars_and_vectors_follow_their_formula():
    """In Python's integers, and at one place in the output of splitmix64's reference implementation for seed 0."""
    wanted = []
    for i in range(50):
        state = 0
        for word in (3, 12345678901234567890, -1, i):
            state = splitmix_finaliser(((state ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK)
        assert int(hash64(3, 12345678901234567890, -1, i)) == state
        wanted.append(state)
    assert hash64(3, 12345678901234567890, -1, np.arange(50)).tolist() == wanted
    assert int(hash64(0)) == 0xE220A8397B1DCDAF


def test_uniforms_are_in_range_and_spread():
    u = uniforms(Purpose.CROP, 0, 0, np.arange(20_000), 4)
    assert u.shape == (20_000, 4)
    assert u.dtype == np.float64
    assert u.min() >= 0
    assert u.max() < 1
    # Standard errors are 0.002 and 0.007: five of each.
    assert np.abs(u.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.035


def test_uniforms_depend_on_each_of_seed_epoch_purpose_and_id():
    base = uniforms(Purpose.CROP, 1, 1, np.arange(8), 4)
    assert np.array_equal(base, uniforms(Purpose.CROP, 1, np.full(8, 1), np.arange(8), 4))
    for other in (
        uniforms(Purpose.CROP, 2, 1, np.arange(8), 4),
        uniforms(Purpose.CROP, 1, 2, np.arange(8), 4),
        uniforms(Purpose.PATCHES, 1, 1, np.arange(8), 4),
        uniforms(Purpose.CROP, 1, 1, np.arange(8) + 8, 4),
    ):
        assert not np.isin(base, other).any()


def test_text_hash_is_a_stable_int64():
    # From `printf café | b2sum -l 64`, read as a little-endian signed number.
    assert text_hash("café") == text_hash("café".encode()) == -2028992364774525097
    assert text_hash("a") != text_hash("b")
