"""`dataset.json` of a data folder."""

import json
from pathlib import Path

import pytest

from mvlm_dataloading import DataError, ShardWriter, open_dataset
from mvlm_dataloading.dataset.description import already_written, read_description
from support.data import make_image, write_dataset


@pytest.fixture
def folder(tmp_path):
    """Two splits of 8 images in a few shards, for tests that damage them."""
    return write_dataset(tmp_path / "data", 8, max_shard_bytes=50_000, splits=("train", "validation"))


def refuse(folder, *words: str, split: str = "train") -> None:
    """Check that opening fails with a one-line message that contains all `words`."""
    with pytest.raises(DataError) as caught:
        open_dataset(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_folder_or_description_is_refused(tmp_path, folder):
    refuse(tmp_path / "nowhere", "nowhere: wanted a data folder, found none; `mvlm data` writes one")
    (folder / "dataset.json").unlink()
    refuse(folder, "dataset.json: wanted the data set's description, found no such file")


def one_shard(**changed) -> str:
    shard = {"tar": "train-000000.tar", "samples": 1, "bytes": 1, "sha256": ""} | changed
    return json.dumps({"format_version": 1, "splits": {"train": {"shards": [shard]}}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"format_version": 1, "splits": {"train": {"shards": [{}]}}}', "\xff", "[" * 100_000),
        *(one_shard(tar=5), one_shard(samples="1"), one_shard(bytes=None), one_shard(sha256=[]), one_shard(index=5)),
        '{"format_version": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:60],
)
def test_a_malformed_description_is_refused(folder, text):
    (folder / "dataset.json").write_text(text, encoding="latin-1")
    refuse(folder, "dataset.json: wanted the description of a data set, found")


@pytest.mark.parametrize("place", ["http:/host/data", "s3:/bucket/data", "file:/data"])
def test_a_url_is_said_to_be_one(place):
    """`Path` makes one slash of two."""
    with pytest.raises(DataError, match=f"{place}: wanted a folder on this machine, found a URL"):
        read_description(Path(place))


def test_a_description_of_another_version_is_refused(folder):
    description = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(description | {"format_version": 99}))
    refuse(folder, "wanted format_version 1, found 99")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_already_written_compares_name_and_recipe(tmp_path):
    out = tmp_path / "out"
    assert not already_written(out, name="waves", recipe={"count": 2})
    write_dataset(out, 2)
    before = contents(out)
    assert already_written(out, name="waves", recipe={"count": 2})
    for name, count, found in (("waves", 3, "count 2 in place of 3"), ("emoji", 2, "the same settings")):
        message = (
            f"wanted a new folder or the data set {name} as it is built now, found waves with {found}; choose another"
        )
        with pytest.raises(DataError, match=message):
            already_written(out, name=name, recipe={"count": count})
    with pytest.raises(DataError, match="found waves with limit not set in place of None; choose"):
        already_written(out, name="waves", recipe={"count": 2, "limit": None})
    assert contents(out) == before
    (out / "train-000000.tar").write_bytes(b"short")
    with pytest.raises(DataError, match=r"train-000000\.tar: wanted \d+ bytes and an index, found 5; remove"):
        already_written(out, name="waves", recipe={"count": 2})


def test_a_recipe_may_name_a_file_that_is_no_unicode(tmp_path):
    recipe = {"folder": "caf\udce9"}  # as Python has the byte E9 of a name
    with ShardWriter(tmp_path / "out", name="x", source="", licence="", attribution="", recipe=recipe) as writer:
        writer.add("0", make_image(0), ["a wave"], {})
    assert already_written(tmp_path / "out", name="x", recipe=recipe)
    assert len(open_dataset(tmp_path / "out", "train")) == 1


def test_settings_that_differ_beyond_what_a_message_shows_are_named(tmp_path):
    first, second = ([[f"{'a' * 40}{end}"]] for end in "bc")
    with ShardWriter(
        tmp_path / "out", name="x", source="", licence="", attribution="", recipe={"tars": first}
    ) as writer:
        writer.add("0", make_image(0), ["a wave"], {})
    with pytest.raises(DataError, match="found x with another tars; choose"):
        already_written(tmp_path / "out", name="x", recipe={"tars": second})
