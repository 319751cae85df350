"""Collections: items of data sets and folders, in order."""

import numpy as np
import pytest

from mvlm.errors import RunError
from mvlm.search.collection import open_collection
from mvlm_dataloading import DataError
from support.scenes import scene


def test_items_of_a_data_set_follow_its_splits(scenes, model):
    found = open_collection(scenes, ["train", "validation", "test"])
    assert sorted(open_collection(scenes).source["splits"]) == ["test", "train", "validation"]
    assert len(found) == 48
    assert [(found.item(i).split, found.item(i).row) for i in (0, 31, 32, 40, 47)] == [
        ("train", 0), ("train", 31), ("validation", 0), ("test", 0), ("test", 7),
    ]  # fmt: skip
    item = found.item(41)
    assert (item.id, item.captions[0], item.metadata) == ("test001", scene(4)[1], {"base": scene(4)[1].split()[0]})
    batches = list(found.batches(30, 42, model))
    assert [item for items, _ in batches for item in items] == [found.item(i) for i in range(30, 42)]
    assert np.array_equal(batches[-1][1][1].permute(1, 2, 0).numpy(), scene(4)[0])
    with pytest.raises(IndexError):
        found.item(48)


def test_a_split_is_read_once(scenes):
    assert len(open_collection(scenes, ["test", "test"])) == 8


def test_captions_of_a_folder_are_lines_as_in_a_data_set(pictures):
    (pictures / "3.txt").write_text("a cat\u2028on  a mat\x0cx\r\n\u200e\nsecond\n")
    found = open_collection(pictures)
    captions = [found.item(i).captions for i in range(len(found)) if found.item(i).id == "3.png"]
    assert captions == [["a cat on a mat x", "second"]]


def test_a_collection_opens_again_from_its_source(scenes, pictures):
    for collection in (open_collection(scenes, ["test", "train"]), open_collection(pictures)):
        source = collection.source
        again = open_collection(source["path"], source.get("splits"))
        assert again.fingerprint == collection.fingerprint
        item = collection.item(3)
        assert again.image_bytes(item.id, item.split, item.row).startswith(b"\x89PNG")
    assert (
        open_collection(scenes, ["train", "test"]).fingerprint != open_collection(scenes, ["test", "train"]).fingerprint
    )


def test_the_fingerprint_of_a_folder_changes_with_its_files(pictures):
    before = open_collection(pictures).fingerprint
    (pictures / "deep" / "2.png").rename(pictures / "deep" / "2b.png")
    renamed = open_collection(pictures).fingerprint
    assert renamed != before
    image = pictures / "0.png"
    image.write_bytes(image.read_bytes()[::-1])  # edited, of the same size
    assert open_collection(pictures).fingerprint != renamed


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("3.json", b"[1]", "3.json: wanted a JSON object, found something else"),
        ("3.json", b"{", "3.json: wanted a JSON object, found something else"),
        ("3.txt", b"\xff\xfe", "3.txt: wanted UTF-8, found other bytes"),
        ("3.txt", b"a" * (1 << 21), "3.txt: wanted at most 1048576 bytes beside an image, found more"),
    ],
)
def test_broken_files_beside_an_image_are_refused(pictures, name, content, message):
    (pictures / name).write_bytes(content)
    with pytest.raises(RunError, match=message):
        open_collection(pictures).item(1)


def test_other_captions_are_another_folder_and_a_byte_order_mark_is_none(pictures):
    before = open_collection(pictures).fingerprint
    text = pictures / "3.txt"
    text.write_text("a red squarf\n")
    changed = open_collection(pictures).fingerprint
    assert changed != before
    text.write_bytes("\ufeffa red squarf\n".encode())
    (pictures / "3.json").write_bytes(b'\xef\xbb\xbf{"number": 3}')
    found = open_collection(pictures)
    (item,) = [item for item in map(found.item, range(10)) if item.id == "3.png"]
    assert (item.captions, item.metadata) == (["a red squarf"], {"number": 3})
    (pictures / "0.png").unlink()
    (pictures / "0.png").symlink_to("nowhere.png")
    assert open_collection(pictures).fingerprint != changed


def test_an_image_of_a_data_set_that_was_built_anew_is_refused(scenes):
    found = open_collection(scenes, ["test"])
    item = found.item(2)
    assert found.image_bytes(item.id, "test", 2)
    for wrong in ((item.id, "test", 3), ("another", "test", 2), (item.id, "validation", 2), (item.id, "test", 9999)):
        with pytest.raises(RunError, match=r"wanted the image .* that was embedded, found other data; embed and index"):
            found.image_bytes(*wrong)


def test_places_without_images_are_refused(tmp_path, scenes, pictures):
    with pytest.raises(RunError, match="nowhere: wanted a data set or a folder of images, found no such folder"):
        open_collection(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="empty: wanted a data set or a folder of images, found no image in it"):
        open_collection(tmp_path / "empty")
    with pytest.raises(RunError, match="wanted a data set, which has splits, found a folder of images"):
        open_collection(pictures, ["train"])
    with pytest.raises(DataError, match="wanted the split none"):
        open_collection(scenes, ["none"])
