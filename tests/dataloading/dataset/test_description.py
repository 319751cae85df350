"""`dataset.json` of a data folder, and every field of it made wrong in turn."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvlm_dataloading import DataError, build_shards, check_shards, open_dataset, rebuild_indices
from mvlm_dataloading.dataset.description import already_written, parse_description, read_description
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import ListedPiece, Source
from mvlm_dataloading.sources.webdataset import webdataset
from support.data import file_contents, make_image, make_record, shard_writer, write_dataset
from support.folders import folder_hash


@pytest.mark.parametrize("place", ["http://host/data", "s3://bucket/data", "gs://bucket/data"])
@pytest.mark.parametrize("read", [read_description, rebuild_indices, folder, lambda place: webdataset([place])])
def test_a_url_is_said_to_be_one(place, read):
    """`Path` makes one slash of two."""
    with pytest.raises(DataError, match=f"{place}: wanted a folder on this machine, found a URL"):
        read(Path(place))


def test_a_folder_of_images_is_said_to_be_one(tmp_path):
    (tmp_path / "no images").mkdir()
    with pytest.raises(DataError, match="`mvlm data` writes it"):
        read_description(tmp_path)
    (tmp_path / "no images/a.JPG").write_bytes(b"")
    with pytest.raises(DataError, match=re.escape(f"`mvlm data folder {tmp_path} OUT`")):
        read_description(tmp_path)


def test_already_written_compares_name_and_recipe(tmp_path):
    out = tmp_path / "out"
    assert not already_written(out, name="waves", recipe={"count": 2})
    write_dataset(out, 2)
    before = file_contents(out)
    assert already_written(out, name="waves", recipe={"count": 2})
    for name, count, found in (("waves", 3, "count 2 in place of 3"), ("emoji", 2, "the same settings")):
        message = (
            f"wanted a new folder or the data set {name} as it is built now, found waves with {found}; choose another"
        )
        with pytest.raises(DataError, match=message):
            already_written(out, name=name, recipe={"count": count})
    with pytest.raises(DataError, match="found waves with limit not set in place of None; choose"):
        already_written(out, name="waves", recipe={"count": 2, "limit": None})
    assert file_contents(out) == before
    (out / "train-000000.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-000000\.tar: wanted \d+ bytes and an index, found 5; remove"):
        already_written(out, name="waves", recipe={"count": 2})


@pytest.mark.parametrize(
    "recipe, other",
    [
        ({"folder": "caf\udce9"}, {"folder": "caf"}),  # as Python has the byte E9 of a name
        ({"tars": [["a" * 40 + "b"]]}, {"tars": [["a" * 40 + "c"]]}),  # which differ beyond what a message shows
    ],
)
def test_every_recipe_is_recognised_and_told_from_others(tmp_path, recipe, other):
    with shard_writer(tmp_path / "out", recipe=recipe) as writer:
        writer.add("0", make_image(0), ["a wave"], {})
    assert already_written(tmp_path / "out", name="set", recipe=recipe)
    assert len(open_dataset(tmp_path / "out", "train")) == 1
    with pytest.raises(DataError, match=f"found set with {next(iter(recipe))} "):
        already_written(tmp_path / "out", name="set", recipe=other)


SHA256 = "0123456789abcdef" * 4
SHARD = {"tar": "train-000000.tar", "samples": 3, "bytes": 5120, "sha256": SHA256}
VIEW = SHARD | {"tar": "../other/train-000000.tar", "index": "train-000000.idx", "index_sha256": SHA256}
GOOD: dict[str, Any] = {
    "format_version": 1,
    "name": "waves",
    "source": "tests",
    "licence": "CC0",
    "attribution": "",
    "recipe": {"view": {"depth": 1}},
    "splits": {
        "train": {"samples": 6, "captions": 9, "shards": [SHARD, VIEW]},
        "testA": {"samples": 0, "captions": 0, "shards": []},
    },
    "tokenizer": SHA256,
    "tokens": {"fingerprint": "f", "max_length": 8},
    "rejected": {"no caption": 2},
}
GONE = object()
INNARDS = re.compile(r"Error\(|object at 0x|indices must be|has no attribute|subscriptable|Traceback|unpack|literal")
NO_NUMBER = [-1, -5, True, "1", 1.5, None, [], {}, 10**20, GONE]
NO_TEXT = [7, None, [], {}]
NO_OBJECT = ["x", 7, None, []]
NO_HASH = ["/etc/passwd", SHA256[1:], SHA256.upper(), 7, [], {}, f"{SHA256}\n"]
WRONG: dict[tuple[Any, ...], list[Any]] = {
    ("format_version",): [None, "1", True, -1, 99, [], GONE],
    ("name",): NO_TEXT, ("source",): NO_TEXT, ("licence",): NO_TEXT, ("attribution",): NO_TEXT,
    ("recipe",): NO_OBJECT,
    ("recipe", "view", "depth"): NO_NUMBER[:-1],
    ("rejected",): NO_OBJECT,
    ("rejected", "no caption"): NO_NUMBER[:-1],
    ("tokenizer",): [*NO_HASH, "", GOOD],
    ("tokens",): [7, "x", [1]],
    ("tokens", "fingerprint"): [*NO_TEXT, GONE],
    ("tokens", "max_length"): NO_NUMBER,
    ("splits",): [*NO_OBJECT, {}, GONE],
    ("splits", "train"): NO_OBJECT,
    ("splits", "train", "samples"): [*NO_NUMBER, 5, 7],
    ("splits", "train", "captions"): NO_NUMBER,
    ("splits", "train", "shards"): ["x", 7, None, {}, [], [SHARD], [7], [[]], [None], GONE],
    ("splits", "train", "shards", 0, "samples"): [*NO_NUMBER, 0],
    ("splits", "train", "shards", 0, "bytes"): NO_NUMBER,
    ("splits", "train", "shards", 0, "sha256"): [*NO_HASH, None, GONE],
    ("splits", "train", "shards", 0, "tar"): ["", ".", "/", "/x.tar", "../x", "a/../../x.tar", "a\0", 7, None, GONE],
    ("splits", "train", "shards", 1, "tar"): ["", "/", 7, None, GONE],
    ("splits", "train", "shards", 1, "index"): ["", "/x.idx", "../x.idx", 7, None],
    ("splits", "train", "shards", 1, "index_sha256"): NO_HASH,
}  # fmt: skip
CASES = [(path, value) for path, values in WRONG.items() for value in values]


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    description = copy.deepcopy(GOOD)
    *above, last = path
    part = description
    for name in above:
        part = part[name]
    part.pop(last) if value is GONE else part.__setitem__(last, value)
    return description


def refusal(text: bytes) -> str:
    with pytest.raises(DataError) as caught:
        parse_description(text, "x/dataset.json")
    message = str(caught.value)
    assert message.startswith("x/dataset.json: wanted ")
    assert "\n" not in message
    assert len(message) < 300
    assert message.isprintable()
    assert not INNARDS.search(message)
    return message


def test_a_good_description_is_read_as_it_is():
    assert parse_description(json.dumps(GOOD).encode(), "x") == GOOD
    least = {"format_version": 1, "splits": {"train": {"samples": 0, "captions": 0, "shards": []}}}
    assert parse_description(json.dumps(least).encode(), "x") == least
    unknown = changed(("splits", "train", "shards", 0, "sha256"), "")
    assert parse_description(json.dumps(unknown).encode(), "x") == unknown


@pytest.mark.parametrize("path, value", CASES, ids=lambda one: "." if isinstance(one, tuple) else None)
def test_a_wrong_field_is_named(path, value):
    message = refusal(json.dumps(changed(path, value)).encode())
    named = [str(name) for name in path if name not in ("splits", "shards", "train", 0, 1)]
    assert all(name in message for name in named), message


@pytest.mark.parametrize("name", ["../x", "x/y", "/etc", "", ".", "..", ".x", "a\nb", "a\0b", "a" * 101, "\ud800"])
def test_splits_whose_names_lead_elsewhere_are_refused(tmp_path, name):
    description = copy.deepcopy(GOOD)
    description["splits"][name] = description["splits"].pop("train")
    assert "is not a name that files may have" in refusal(json.dumps(description).encode())
    folder = tmp_path / "in" / "out"
    with pytest.raises(DataError, match="split: wanted a name that files may have"), shard_writer(folder) as writer:
        writer.add("0", make_image(0), ["a wave"], {}, split=name)
    source = Source("x", "", "", {}, [ListedPiece(name, [make_record("0", make_image(0))])])
    with pytest.raises(DataError, match="split: wanted a name that files may have"):
        build_shards(source, folder, workers=0)
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".tar", ".idx", ".index")]


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"7", b'"x"', b"{}", b"\xff\xfe{\0}\0", b"[" * 100_000, b'{"a":' * 100_000,
        b'{"format_version": ' + b"9" * 5000 + b"}", b'{"format_version": NaN}', b"{'format_version': 1}",
    ],
    ids=lambda text: repr(text[:20]),
)  # fmt: skip
def test_what_is_no_description_is_refused(text):
    refusal(text)


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(st.data())
def test_nothing_in_the_place_of_a_field_gives_another_error(data):
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
    description = changed(data.draw(st.sampled_from(list(WRONG))), data.draw(anything))
    text = json.dumps(description).encode()
    try:
        parse_description(text, "x/dataset.json")
    except DataError:
        refusal(text)


def test_every_reader_checks_the_whole_description(tmp_path):
    folder = write_dataset(tmp_path / "data", 2)
    kept = json.loads((folder / "dataset.json").read_text())
    readers = (read_description, lambda at: open_dataset(at, "train"), lambda at: check_shards(at, workers=0))
    for name, value in (("rejected", "x"), ("tokenizer", "/etc/passwd"), ("splits", {})):
        message = rf"dataset\.json: wanted the description of a data set, found {name}: "
        (folder / "dataset.json").write_text(json.dumps(kept | {name: value}))
        for read in readers:
            with pytest.raises(DataError, match=message):
                read(folder)


def test_an_index_is_not_written_beside_a_tar_outside_the_folder(tmp_path):
    folder, other = write_dataset(tmp_path / "data", 2), write_dataset(tmp_path / "other", 2)
    before = folder_hash(other)
    description = json.loads((folder / "dataset.json").read_text())
    description["splits"]["train"]["shards"][0]["tar"] = "../other/train-000000.tar"
    (folder / "dataset.json").write_text(json.dumps(description))
    (folder / "train.index").unlink()
    with pytest.raises(DataError, match="not a file inside the folder"):
        rebuild_indices(folder)
    assert folder_hash(other) == before
