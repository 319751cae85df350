"""Records, keys, splits and pieces."""

import numpy as np

from mvlm_dataloading.sources.record import canonical_split, safe_key


def test_split_names_and_keys_are_canonical():
    assert [canonical_split(name, "") for name in ("train", "VAL", " dev", "restval", "test")] == [
        "train", "validation", "validation", "train", "test",
    ]  # fmt: skip
    assert safe_key("0001_a-b") == "0001_a-b"
    names = ["a/b", "a.b", "a b", "ä", "猫", "", "x" * 81, "a_b.", "\udcff"]
    assert len({safe_key(name) for name in names} | {"a_b"}) == len(names) + 1
    assert np.all([len(safe_key(name)) <= 80 for name in names])
