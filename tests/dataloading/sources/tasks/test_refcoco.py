"""RefCOCO+, on files as published, and pickles that are programs."""

import json
import pickle

import pytest

from mvlm_dataloading import DataError, open_dataset
from mvlm_dataloading.sources.tasks.plain_pickle import read_plain_pickle
from mvlm_dataloading.sources.tasks.refcoco import refcoco
from support import published_tasks
from support.data import build_source, read_json_lines


@pytest.mark.parametrize("protocol", [0, 2])
def test_refcoco(tmp_path, protocol):
    published_tasks.refcoco(tmp_path, protocol=protocol)
    found = build_source(refcoco(tmp_path), tmp_path / "out", short_side=30)
    assert {split: list(known) for split, known in found.items()} == {
        "train": ["2000", "2001", "2010", "2011"],
        "validation": ["2020", "2021", "2030", "2031"],
        "testA": ["2040", "2041", "2050", "2051"],
        "testB": ["2060", "2061", "2070", "2071"],
    }
    dataset = open_dataset(tmp_path / "out", "testA")
    assert dataset.captions(1) == ["the café on the left"]
    facts = dataset.metadata(1)
    assert [facts[name] for name in ("id", "image_id", "ref_id", "category")] == ["2041", "coco 204", 274, "person"]
    assert (facts["box"], facts["size"]) == ([4.5, 6, 30.25, 20], [72, 54])  # of the published image
    assert (facts["width"], facts["height"]) == (40, 30)


def test_bad_rows_are_rejected(tmp_path):
    published_tasks.refcoco(tmp_path)
    folder = tmp_path / "refcoco+"
    (tmp_path / "train2014/COCO_train2014_000000000201.jpg").unlink()
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    refs[0]["sentences"][0]["sent"] = refs[0]["sentences"][0]["raw"] = ""
    refs[2]["sentences"].append(dict(refs[2]["sentences"][0]))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(refs, 0))
    content = json.loads((folder / "instances.json").read_text())
    content["annotations"][3]["bbox"] = [60, 6, 30, 20]
    del content["annotations"][4]
    (folder / "instances.json").write_text(json.dumps(content))
    found = build_source(refcoco(folder), tmp_path / "out")
    assert {split: list(known) for split, known in found.items()} == {
        "train": ["2001"],
        "validation": ["2020", "2021"],
        "testA": ["2050", "2051"],
        "testB": ["2060", "2061", "2070", "2071"],
    }
    assert sorted((line["key"], line["reason"]) for line in read_json_lines(tmp_path / "out/rejected.jsonl")) == [
        ("2000", "no caption"),
        ("2010", "image file is missing"),
        ("2011", "image file is missing"),
        ("2020", "key was used before"),
        ("2030", "box is empty or outside the image"),
        ("2031", "box is empty or outside the image"),
        ("2040", "object has no box"),
        ("2041", "object has no box"),
    ]


def test_boxes_of_a_detector_become_candidates(tmp_path):
    published_tasks.refcoco(tmp_path)
    (tmp_path / "dets.json").write_text(json.dumps({"200": [[1, 2, 30, 20], [0, 0, 9, 9, 0.8]]}))
    pieces = refcoco(tmp_path, candidates=tmp_path / "dets.json").pieces
    found = {record.key: record.metadata["candidates"] for piece in pieces for record in piece.records(1)}
    assert found["2001"] == [[1, 2, 30, 20], [0, 0, 9, 9]]
    assert found["2010"] == []
    (tmp_path / "dets.json").write_text("[1]")
    with pytest.raises(DataError, match=r"dets\.json: wanted an object of lists of boxes"):
        refcoco(tmp_path, candidates=tmp_path / "dets.json")


def test_byte_strings_of_python_2_are_read(tmp_path):
    """What Python 2 writes: S'...' for a byte string, V... for a Unicode one, I01 for True."""
    (tmp_path / "p").write_bytes(
        b"(lp0\n(dp1\nS'sent'\np2\nS'caf\\xc3\\xa9'\np3\nsS'raw'\nVna\\u00efve\np4\nsS'n'\nI01\nsa."
    )
    assert read_plain_pickle(tmp_path / "p") == [{"sent": "café", "raw": "naïve", "n": True}]


def test_code_in_a_pickle_is_not_run(tmp_path):
    published_tasks.refcoco(tmp_path)
    published_tasks.evil_pickle(tmp_path / "refcoco+/refs(unc).p", tmp_path / "touched")
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: wanted a pickle of lists, .* found the name "):
        refcoco(tmp_path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no pickle",
        b"cos\nsystem\n(S'true'\ntR.",  # protocol 0: the name os.system, called
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",  # STACK_GLOBAL
        b"\x80\x02U\x01xQ.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        pickle.dumps([{"a": 1}])[:-3],
    ],
)
def test_pickles_of_anything_but_plain_containers_are_refused(tmp_path, content):
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(DataError, match="wanted a pickle of lists, dictionaries, texts and numbers alone"):
        read_plain_pickle(tmp_path / "p")


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"refs\(unc\)\.p: wanted a file, found none"):
        refcoco(tmp_path)
    with pytest.raises(DataError, match="name: wanted refcoco\\+, refcoco, refcocog, got 'refclef'"):
        refcoco(tmp_path, name="refclef")
    published_tasks.refcoco(tmp_path)
    with pytest.raises(DataError, match=r"name: wanted refcoco\+, the name of .*, got refcocog; give it by --name"):
        refcoco(tmp_path / "refcoco+", images=tmp_path, name="refcocog")
    (tmp_path / "refcoco+/refs(unc).p").write_bytes(pickle.dumps([{"split": "train"}]))
    with pytest.raises(DataError, match=r"wanted refcoco\+'s expressions beside its instances.json"):
        refcoco(tmp_path)
