"""Collections: items of data sets and folders, in order."""

import time

import numpy as np
import pytest

from mvlm.errors import RunError
from mvlm.search.collection import FolderCollection, open_collection
from mvlm_dataloading import DataError
from mvlm_dataloading.sources.folder import folder
from support import published
from support.data import build_source
from support.scenes import scene


def test_items_of_a_data_set_follow_its_splits(scenes, model):
    found = open_collection(scenes, ["train", "validation", "test", "test"])  # a split is read once
    assert sorted(open_collection(scenes).source["splits"]) == ["test", "train", "validation"]
    assert len(found) == 48
    batches = list(found.batches(30, 43, model))
    items = [item for batch, _ in batches for item in batch]
    rows = [("train", 30), ("train", 31), *(("validation", i) for i in range(8)), *(("test", i) for i in range(3))]
    assert [(item.split, item.row) for item in items] == rows
    item = items[11]
    assert (item.id, item.captions[0], item.metadata) == ("test001", scene(4)[1], {"base": scene(4)[1].split()[0]})
    assert np.array_equal(batches[-1][1][1].permute(1, 2, 0).numpy(), scene(4)[0])
    assert list(found.batches(48, 50, model)) == []


def test_captions_of_a_folder_are_lines_as_in_a_data_set(pictures):
    for content, captions in (
        ("a cat\u2028on  a mat\x0cx\r\n\u200e\nsecond\n", ["a cat on a mat x", "second"]),
        ("\ufeffa red squarf\n", ["a red squarf"]),  # a byte order mark
    ):
        (pictures / "3.txt").write_text(content, encoding="utf-8")
        (pictures / "3.json").write_bytes(b'\xef\xbb\xbf{"number": 3}')
        found = open_collection(pictures)
        assert isinstance(found, FolderCollection)
        (item,) = [item for item in (found.item(i, b"") for i in range(10)) if item.id == "3.png"]
        assert (item.captions, item.metadata) == (captions, {"number": 3})


def test_a_folder_has_the_images_that_a_data_set_of_it_has(tmp_path):
    """Formats follow from the contents, and what is left out has a reason."""
    kinds = {"a.jpg": "JPEG", "b.GIF": "GIF", "c.bmp": "BMP", "d.tiff": "TIFF", "e.png": "GIF", "f.jfif": "JPEG"}
    for i, (name, kind) in enumerate(kinds.items()):
        published.make_image(i).save(tmp_path / name, kind)
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    found = open_collection(tmp_path)
    assert isinstance(found, FolderCollection)
    reasons = {found.id(i): found.why_left_out(i) for i in range(len(found))}
    left_out = {name for name, reason in reasons.items() if f"found {kinds[name]}; convert" in reason}
    assert left_out == {name for name, kind in kinds.items() if kind != "JPEG"}
    taken = reasons.keys() - left_out
    assert {name[0] for name in taken} == {key[0] for key in build_source(folder(tmp_path), tmp_path / "out")["train"]}


def test_a_collection_opens_again_from_its_source(scenes, pictures):
    for collection in (open_collection(scenes, ["test", "train"]), open_collection(pictures)):
        source = collection.source
        assert open_collection(source["path"], source.get("splits")).fingerprint == collection.fingerprint
    other = open_collection(scenes, ["train", "test"]), open_collection(scenes, ["test", "train"])
    assert other[0].fingerprint != other[1].fingerprint


def test_the_fingerprint_of_a_folder_changes_with_its_files(pictures):
    image, text = pictures / "0.png", pictures / "3.txt"
    seen = {open_collection(pictures).fingerprint}
    for change in (
        lambda: (pictures / "deep" / "2.png").rename(pictures / "deep" / "2b.png"),
        lambda: image.write_bytes(image.read_bytes()[::-1]),  # edited, of the same size
        lambda: text.write_text("another caption"),
        lambda: (image.unlink(), image.symlink_to("nowhere.png")),
    ):
        change()
        found = open_collection(pictures).fingerprint
        assert found not in seen
        seen.add(found)


def test_the_fingerprint_of_a_folder_reads_no_text_beyond_its_limit(pictures):
    for suffix in (".txt", ".json"):
        with (pictures / f"0{suffix}").open("wb") as file:
            file.truncate(40 << 30)  # no bytes on the disk, and half a minute of hashing
    start = time.process_time()
    assert open_collection(pictures).fingerprint
    assert time.process_time() - start < 5


def test_an_image_of_a_data_set_that_was_built_anew_is_refused(scenes):
    found, id = open_collection(scenes, ["test"]), "test002"
    assert found.image_bytes(id, "test", 2).startswith(b"\x89PNG")
    for wrong in ((id, "test", 3), ("another", "test", 2), (id, "validation", 2), (id, "test", 9999)):
        with pytest.raises(RunError, match="found other data"):
            found.image_bytes(*wrong)


def test_places_without_images_are_refused(tmp_path, scenes, pictures):
    (tmp_path / "empty").mkdir()
    for path, splits in ((tmp_path / "nowhere", None), (tmp_path / "empty", None), (pictures, ["train"])):
        with pytest.raises(RunError, match=f"{path.name}: wanted a data set"):
            open_collection(path, splits)
    with pytest.raises(DataError, match="none"):
        open_collection(scenes, ["none"])
