"""Records, keys, splits and pieces."""

import numpy as np

from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import canonical_split, cut_into_pieces, safe_key, split_in_name
from support import published


def test_split_names_and_keys_are_canonical():
    assert [canonical_split(name, "") for name in ("train", "VAL", " dev", "restval", "test")] == [
        "train", "validation", "validation", "train", "test",
    ]  # fmt: skip
    assert safe_key("0001_a-b") == "0001_a-b"
    names = ["a/b", "a.b", "a b", "ä", "猫", "", "x" * 81, "a_b.", "\udcff"]
    assert len({safe_key(name) for name in names} | {"a_b"}) == len(names) + 1
    assert np.all([len(safe_key(name)) <= 80 for name in names])


def test_the_split_in_a_name_is_a_word_of_it():
    names = ["pets-train.parquet", "val2017", "Test_0", "partial-validation", "testA-000", "hidden-train", "attest"]
    assert [split_in_name(name) for name in names] == [
        "train", "val", "test", "validation", "testa", "train", None,
    ]  # fmt: skip


def test_pieces_are_cut_in_order(tmp_path):
    published.folder(tmp_path, 5)
    records = [record for piece in folder(tmp_path).pieces for record in piece.records(1)]
    pieces = cut_into_pieces({"train": records, "test": records[:1]}, 2)
    assert [(piece.split, [r.key for r in piece.records(1)]) for piece in pieces] == [
        ("test", [records[0].key]),
        ("train", [records[0].key, records[1].key]),
        ("train", [records[2].key, records[3].key]),
        ("train", [records[4].key]),
    ]
