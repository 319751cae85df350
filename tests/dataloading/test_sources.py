"""Each published format, written to shards: who is in which split, with which captions."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import published
import pyarrow
import pytest
from pyarrow import parquet

from mvlm_dataloading import DataError, Settings, build_shards, open_dataset
from mvlm_dataloading.sources.coco import coco
from mvlm_dataloading.sources.files import read_json_list, read_rows
from mvlm_dataloading.sources.flickr30k import flickr30k
from mvlm_dataloading.sources.folder import folder
from mvlm_dataloading.sources.record import Source, cut, safe_key, split_name
from mvlm_dataloading.sources.tables import huggingface
from mvlm_dataloading.sources.tars import cc3m, sbu, webdataset
from mvlm_dataloading.sources.visual_genome import visual_genome


def content(out: Path) -> dict[str, dict[str, list[str]]]:
    """Captions by key by split."""
    splits = json.loads((out / "dataset.json").read_text())["splits"]
    opened = {split: open_dataset(out, split) for split in splits}
    return {split: {str(d.keys[i]): d.captions(i) for i in range(len(d))} for split, d in opened.items()}


def written(source: Source, out: Path, **settings) -> dict[str, dict[str, list[str]]]:
    return content(build_shards(source, out, Settings(**settings), workers=0))


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def expected(numbers, name=lambda i: f"{100 + i:012d}") -> dict[str, list[str]]:
    return {name(i): published.captions(i) for i in numbers}


def test_coco(tmp_path):
    published.coco(tmp_path / "coco")
    assert written(coco(tmp_path / "coco"), tmp_path / "out") == {
        "train": expected(range(8)),
        "validation": expected(range(8, 12)),
    }
    dataset = open_dataset(tmp_path / "out", "train")
    facts = dataset.metadata(0)
    assert (facts["image_id"], facts["licence"]) == ("coco 100", "https://example.org/by/2.0/")
    assert (facts["width"], facts["height"]) == (72, 54)
    assert dataset.image_bytes(0) == (tmp_path / "coco/train2014/COCO_train2014_000000000100.jpg").read_bytes()


@pytest.mark.parametrize("year", [2014, 2017])
def test_coco_in_karpathys_splits(tmp_path, year):
    published.coco(tmp_path, year=year)
    assert written(coco(tmp_path, tmp_path / "dataset_coco.json"), tmp_path / "out") == {
        "train": expected(range(9)),  # restval is trained on
        "validation": expected([9]),
        "test": expected([10, 11]),
    }


def test_coco_of_two_years_needs_to_know_which(tmp_path):
    published.coco(tmp_path, train=2, val=1)
    published.coco(tmp_path, train=3, val=1, year=2017)
    with pytest.raises(DataError, match="wanted the captions of one year, found 2014, 2017; give --year"):
        coco(tmp_path)
    assert len(written(coco(tmp_path, year=2017), tmp_path / "out")["train"]) == 3


def test_coco_with_a_picture_missing_and_one_without_captions(tmp_path):
    published.coco(tmp_path)
    (tmp_path / "val2014/COCO_val2014_000000000109.jpg").unlink()
    file = tmp_path / "annotations/captions_train2014.json"
    annotations = json.loads(file.read_text())
    annotations["annotations"] = [a for a in annotations["annotations"] if a["image_id"] != 103]
    file.write_text(json.dumps(annotations))
    found = written(coco(tmp_path), tmp_path / "out")
    assert found["train"].keys() == expected([0, 1, 2, 4, 5, 6, 7]).keys()
    assert [(line["key"], line["split"], line["reason"]) for line in lines(tmp_path / "out/rejected.jsonl")] == [
        ("000000000103", "train", "no caption"),
        ("000000000109", "validation", "image file is missing"),
    ]
    description = json.loads((tmp_path / "out/dataset.json").read_text())
    assert description["rejected"] == {"image file is missing": 1, "no caption": 1}


def test_only_a_text_is_a_caption(tmp_path):
    """Nulls, numbers and objects, in every format that can hold them."""
    cells = [["words", None], [None], [{"raw": "words", "id": 1}], [float("nan")], 7, None, "None"]
    numbers = range(len(cells))
    for i in numbers:
        published.write_picture(tmp_path / "folder" / f"{i}.jpg", i)
    rows = "\n".join(json.dumps({"image": f"{i}.jpg", "caption": cells[i]}) for i in numbers)
    (tmp_path / "folder/captions.jsonl").write_text(rows)
    source = folder(tmp_path / "folder", tmp_path / "folder/captions.jsonl")
    assert written(source, tmp_path / "a")["train"] == {"0": ["words"], "6": ["None"]}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i in numbers:
            told = json.dumps({"caption": cells[i]}).encode()
            published.add_members(tar, [(f"{i}.jpg", published.encoded(published.picture(i))), (f"{i}.json", told)])
    assert written(webdataset([tmp_path / "0.tar"]), tmp_path / "b")["train"] == {"0": ["words"], "6": ["None"]}
    images = [published.encoded(published.picture(i)) for i in range(3)]
    parquet.write_table(
        pyarrow.table({"image": images, "caption": [["x", None], [None], ["y"]]}), tmp_path / "0.parquet"
    )
    assert [*written(huggingface([tmp_path / "0.parquet"]), tmp_path / "c")["train"].values()] == [["x"], ["y"]]
    published.coco(tmp_path / "coco")
    published.flickr30k(tmp_path / "flickr")
    published.visual_genome(tmp_path / "genome")
    for file, caption in (
        ("coco/annotations/captions_train2014.json", "caption"),
        ("coco/dataset_coco.json", "raw"),
        ("flickr/dataset_flickr30k.json", "raw"),
        ("genome/region_descriptions.json", "phrase"),
    ):
        text = (tmp_path / file).read_text()
        (tmp_path / file).write_text(text.replace(f'"{caption}": "', f'"{caption}": null, "was": "', 1))
    table = tmp_path / "flickr/flickr_annotations_30k.csv"
    table.write_text(table.read_text().replace('[""soft colours, number 0""]', "[null]"))
    for source in (
        coco(tmp_path / "coco"),
        coco(tmp_path / "coco", tmp_path / "coco/dataset_coco.json"),
        flickr30k(tmp_path / "flickr"),
        flickr30k(tmp_path / "flickr", table),
        visual_genome(tmp_path / "genome"),
    ):
        first = next(record for piece in source.pieces if piece.split == "train" for record in piece.records(1))
        assert list(first.captions) == [f"part {k} of picture 0" for k in (1, 2, 3, 0)][: len(first.captions)]
        assert len(first.captions) == (4 if source.name == "visual-genome" else 0)


@pytest.mark.parametrize("file", ["dataset_flickr30k.json", "flickr_annotations_30k.csv"])
def test_flickr30k_with_splits(tmp_path, file):
    published.flickr30k(tmp_path)
    assert written(flickr30k(tmp_path, tmp_path / file), tmp_path / "out") == {
        "train": expected(range(4), lambda i: str(1000 + i)),
        "validation": expected([4], lambda i: str(1000 + i)),
        "test": expected([5], lambda i: str(1000 + i)),
    }


@pytest.mark.parametrize("file", ["results_20130124.token", "results.csv"])
def test_flickr30k_without_splits(tmp_path, file):
    published.flickr30k(tmp_path)
    found = written(flickr30k(tmp_path, tmp_path / file), tmp_path / "out")
    assert found == {"train": expected(range(6), lambda i: str(1000 + i))}


def test_flickr30k_takes_the_file_that_is_there(tmp_path):
    published.flickr30k(tmp_path)
    assert {piece.split for piece in flickr30k(tmp_path).pieces} == {"train", "validation", "test"}
    (tmp_path / "dataset_flickr30k.json").unlink()
    (tmp_path / "flickr_annotations_30k.csv").unlink()
    assert {piece.split for piece in flickr30k(tmp_path).pieces} == {"train"}
    for name in ("results_20130124.token", "results.csv"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"dataset_flickr30k\.json: wanted a file, found none"):
        flickr30k(tmp_path)


def test_visual_genome(tmp_path):
    published.visual_genome(tmp_path)
    found = written(visual_genome(tmp_path), tmp_path / "out")
    assert found == {"train": {str(2407000 + i): [f"part {k} of picture {i}" for k in range(4)] for i in range(6)}}
    assert open_dataset(tmp_path / "out", "train").metadata(1)["coco_id"] == 101
    assert "coco_id" not in open_dataset(tmp_path / "out", "train").metadata(0)
    two = written(visual_genome(tmp_path, test=0.5), tmp_path / "two", max_captions=2)
    assert two["train"].keys() | two["test"].keys() == found["train"].keys()
    assert {len(captions) for part in two.values() for captions in part.values()} == {2}


def test_cc3m(tmp_path):
    published.img2dataset(tmp_path / "train")
    published.img2dataset(tmp_path / "validation", first=50, tars=1)
    found = written(cc3m([tmp_path / "train"], [tmp_path / "validation"]), tmp_path / "out")
    numbers = {"train": [0, 1, 2, 3, 5, 6, 7, 8], "validation": [50, 51, 52, 53]}
    assert {split: [*part.values()] for split, part in found.items()} == {
        split: [published.captions(i)[:1] for i in known] for split, known in numbers.items()
    }
    # Each download counts from 0.
    assert [*found["train"]][:2] == ["train-000000000", "train-000000001"]
    assert next(iter(found["validation"])) == "validation-000000000"
    assert open_dataset(tmp_path / "out", "train").metadata(4)["url"] == "https://example.org/5.jpg"
    assert [(line["key"], line["reason"]) for line in lines(tmp_path / "out/rejected.jsonl")] == [
        ("train-000000004", "image was not downloaded"),
        ("train-000010004", "image was not downloaded"),
        ("validation-000000004", "image was not downloaded"),
    ]


def test_several_downloads_of_a_split(tmp_path):
    """Each counts its samples from 0, and what could not be downloaded is another in each."""
    for number, first in (("one", 0), ("two", 50)):
        published.img2dataset(tmp_path / number, first=first)
    found = written(cc3m([tmp_path / "one", tmp_path / "two"]), tmp_path / "out")
    wanted = [i for first in (0, 5, 50, 55) for i in range(first, first + 4)]
    assert [*found["train"].values()] == [published.captions(i)[:1] for i in wanted]
    assert [*found["train"]][:: len(wanted) - 1] == ["0-000000000", "1-000010003"]
    rejected = lines(tmp_path / "out/rejected.jsonl")
    assert {line["reason"] for line in rejected} == {"image was not downloaded"}
    assert rejected[-1]["where"] == f"{tmp_path / 'two' / '00001.tar'}:000010004"
    # The tars one by one count on from another, in a folder each: another data set.
    tars = [tmp_path / number / f"0000{tar}.tar" for number in ("one", "two") for tar in (0, 1)]
    assert [*written(cc3m(tars), tmp_path / "tars")["train"]][-1] == "3-000010003"
    assert cc3m(tars).recipe != cc3m([tmp_path / "one", tmp_path / "two"]).recipe


def test_tars_that_each_count_from_0(tmp_path):
    for tar in range(3):
        with tarfile.open(tmp_path / f"part.{tar}.tar.gz", "w:gz") as file:
            for k in range(2 if tar else 20):
                image = published.encoded(published.picture(10 * tar + k))
                published.add_members(file, [(f"{k}.jpg", image), (f"{k}.txt", f"{tar} {k}".encode())])
    source = webdataset([tmp_path])
    found = written(source, tmp_path / "out")["train"]
    assert [*found.values()] == [[f"{tar} {k}"] for tar in range(3) for k in range(2 if tar else 20)]
    assert [*found][:2] == [safe_key("part.0-0"), safe_key("part.0-1")]
    # Where no key comes again all stay as they are.
    assert [*written(webdataset([tmp_path / "part.1.tar.gz"]), tmp_path / "alone")["train"]] == ["0", "1"]
    assert webdataset([tmp_path]).recipe == source.recipe
    with pytest.raises(DataError, match=r"part\.1\.tar\.gz: wanted each file once, found it twice"):
        webdataset([tmp_path], validation=[tmp_path / "part.1.tar.gz"])


def test_sbu(tmp_path):
    published.img2dataset(tmp_path / "sbu")
    (tmp_path / "sbu/00001.parquet").unlink()  # without its table a tar says nothing of what failed
    found = written(sbu([tmp_path / "sbu"]), tmp_path / "out")
    assert [*found["train"].values()] == [published.captions(i)[:1] for i in (0, 1, 2, 3, 5, 6, 7, 8)]
    assert [line["key"] for line in lines(tmp_path / "out/rejected.jsonl")] == ["000000004"]


def test_folder_with_text_files(tmp_path):
    published.folder(tmp_path / "pictures")
    names = {safe_key(f"{'ab'[i % 2]}/{i}"): published.captions(i) for i in range(6)}
    assert written(folder(tmp_path / "pictures"), tmp_path / "out") == {"train": names}
    assert open_dataset(tmp_path / "out", "train").metadata(0)["file"] == "a/0.jpg"


def test_folder_with_a_table(tmp_path):
    published.folder(tmp_path / "pictures", sidecars=False)
    names = {safe_key(f"{'ab'[i % 2]}/{i}"): published.captions(i) for i in range(6)}
    table = folder(tmp_path / "pictures", tmp_path / "pictures/captions.csv")
    assert written(table, tmp_path / "csv") == {"train": names}
    found = written(folder(tmp_path / "pictures", tmp_path / "pictures/captions.jsonl"), tmp_path / "jsonl")
    assert {split: len(part) for split, part in found.items()} == {"test": 2, "train": 2, "validation": 2}
    assert {**found["train"], **found["validation"], **found["test"]} == names
    with pytest.raises(DataError, match="wanted a column named text, found image, caption; name the columns"):
        folder(tmp_path / "pictures", tmp_path / "pictures/captions.csv", caption_column="text")


def test_splits_by_hash_depend_on_the_name_alone(tmp_path):
    published.folder(tmp_path / "pictures", 40)
    few = {record.key: piece.split for piece in folder(tmp_path / "pictures", validation=0.2, test=0.2).pieces
           for record in piece.records(1 << 20)}  # fmt: skip
    published.folder(tmp_path / "pictures", 60)
    many = {record.key: piece.split for piece in folder(tmp_path / "pictures", validation=0.2, test=0.2).pieces
            for record in piece.records(1 << 20)}  # fmt: skip
    assert few.items() <= many.items()
    counts = [list(many.values()).count(split) for split in ("train", "validation", "test")]
    assert min(counts) >= 4
    assert counts[0] > 24


def test_webdataset_of_others(tmp_path):
    jpegs = [published.encoded(published.picture(i)) for i in range(6)]
    with tarfile.open(tmp_path / "some.tar.gz", "w:gz") as tar:
        published.add_members(
            tar,
            [
                ("./a/one.JPG", jpegs[0]),
                ("./a/one.TXT", b"\xef\xbb\xbffirst\nsecond"),
                ("with.dots.in.it.jpeg", jpegs[1]),
                ("with.dots.in.it.json", json.dumps({"text": ["third", "fourth"]}).encode()),
                ("name with blanks.jpg", jpegs[2]),
                ("name with blanks.cls", b"7"),
                ("name with blanks.txt", b"fifth"),
            ],
        )
    found = written(webdataset(test=[tmp_path / "some.tar.gz"], caption_field="text"), tmp_path / "out")
    names = {"a/one": ["first", "second"], "with.dots.in.it": ["third", "fourth"], "name with blanks": ["fifth"]}
    assert found == {"test": {safe_key(name): captions for name, captions in names.items()}}


def test_folders_that_are_links(tmp_path):
    """Each folder once, by its own name where it has one in here; links that lead in a circle end."""
    published.folder(tmp_path / "pictures")
    published.folder(tmp_path / "elsewhere", 2)
    (tmp_path / "pictures/0").symlink_to(tmp_path / "pictures/a")
    (tmp_path / "pictures/a/circle").symlink_to(tmp_path / "pictures")
    (tmp_path / "pictures/a/more").symlink_to(tmp_path / "elsewhere")
    found = written(folder(tmp_path / "pictures"), tmp_path / "out")["train"]
    names = ["a/0", "a/2", "a/4", "a/more/a/0", "a/more/b/1", "b/1", "b/3", "b/5"]
    assert [*found] == [safe_key(name) for name in names]
    (tmp_path / "rows").mkdir()
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/part").symlink_to(tmp_path / "rows")
    parquet.write_table(pyarrow.Table.from_pylist(hub_rows(2)), tmp_path / "rows/train.parquet")
    assert len(written(huggingface([tmp_path / "linked"]), tmp_path / "rows-out")["train"]) == 2


def hub_rows(count: int) -> list[dict]:
    return [
        {"image": {"bytes": published.encoded(published.picture(i)), "path": f"{i}.jpg"},
         "caption": published.captions(i), "id": f"row {i}"}
        for i in range(count)
    ]  # fmt: skip


def test_parquet_of_the_hub(tmp_path):
    rows = hub_rows(5)
    (tmp_path / "data").mkdir()
    for name, part in (("train-00000-of-00002", rows[:2]), ("train-00001-of-00002", rows[2:4]), ("test", rows[4:])):
        parquet.write_table(pyarrow.Table.from_pylist(part), tmp_path / f"data/{name}.parquet")
    found = written(huggingface([tmp_path], key_column="id"), tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i) for i in range(4)],
        "test": [published.captions(4)],
    }
    assert safe_key("row 0") in found["train"]
    with pytest.raises(DataError, match="wanted a column named text, found image, caption, id"):
        huggingface([tmp_path], caption_column="text")
    with pytest.raises(DataError, match=r"test\.parquet: wanted each file once, found it twice"):
        huggingface([tmp_path, tmp_path / "data/test.parquet"])


def test_parquet_as_the_hub_converts_it(tmp_path):
    for place in ("partial-train", "partial-validation", "test"):
        (tmp_path / "default" / place).mkdir(parents=True)
        parquet.write_table(pyarrow.Table.from_pylist(hub_rows(1)), tmp_path / f"default/{place}/0000.parquet")
    assert [piece.split for piece in huggingface([tmp_path]).pieces] == ["train", "validation", "test"]


def test_what_save_to_disk_writes(tmp_path):
    import datasets

    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    parts = {}
    for split, numbers in (("train", range(7)), ("validation", range(7, 9))):
        columns = {
            "picture": [{"bytes": published.encoded(published.picture(i), "PNG"), "path": None} for i in numbers],
            "text": [published.captions(i)[0] for i in numbers],
        }
        parts[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "validation": 1})
    source = huggingface([tmp_path / "saved"], image_column="picture", caption_column="text")
    assert len(source.pieces) == 3
    found = written(source, tmp_path / "out")
    assert {split: [*part.values()] for split, part in found.items()} == {
        "train": [published.captions(i)[:1] for i in range(7)],
        "validation": [published.captions(i)[:1] for i in (7, 8)],
    }
    one = written(
        huggingface([tmp_path / "saved/train"], image_column="picture", caption_column="text", test=0.4),
        tmp_path / "one",
    )
    assert len(one["train"]) + len(one["test"]) == 7


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda at: coco(at), "annotations: wanted a folder, found none"),
        (lambda at: coco(at, at / "k.json"), "k.json: wanted a file, found none"),
        (lambda at: visual_genome(at), "VG_100K_2 .*wanted a folder, found none"),
        (lambda at: cc3m([at]), "wanted a tar or a folder of tars, found none"),
        (lambda at: huggingface([at]), "wanted parquet files or a folder of save_to_disk, found none"),
        (lambda at: folder(at / "no"), "no: wanted a folder, found none"),
        (lambda at: folder(at, test=1.5), "wanted shares that leave some for train, got 0.0 and 1.5"),
    ],
)
def test_what_is_missing_is_named(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as error:
        make(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "wanted JSON, found"),
        ("[]", "wanted Karpathy's dataset_coco.json, found TypeError"),
        ('{"images": [{"filepath": "train2014"}]}', "wanted Karpathy's dataset_coco.json, found KeyError"),
        ('{"images": [{"filepath": "train2014", "filename": "a.jpg", "split": "trial", "cocoid": 1, "sentences": []}]}',
         "wanted a split named .*, found 'trial'"),
    ],
)  # fmt: skip
def test_annotations_that_are_none(tmp_path, text, message):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "dataset_coco.json").write_text(text)
    with pytest.raises(DataError, match=message):
        coco(tmp_path, tmp_path / "dataset_coco.json")


@pytest.mark.parametrize("number", ["a", 1e999, None, [1], {}])
def test_numbers_of_pictures_that_are_none(tmp_path, number):
    published.coco(tmp_path / "coco")
    published.visual_genome(tmp_path / "genome")
    for name, make, field in (
        ("coco/annotations/captions_train2014.json", lambda: coco(tmp_path / "coco"), "id"),
        ("coco/dataset_coco.json", lambda: coco(tmp_path / "coco", tmp_path / "coco/dataset_coco.json"), "cocoid"),
        ("genome/region_descriptions.json", lambda: visual_genome(tmp_path / "genome"), "id"),
    ):
        content = json.loads((tmp_path / name).read_text())
        (content if isinstance(content, list) else content["images"])[1][field] = number
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(
            DataError, match=r"\.json: wanted .*, found (Value|Type|Overflow)Error.*; download it again"
        ):
            make()


def test_captions_nested_too_deeply(tmp_path):
    published.flickr30k(tmp_path)
    file = tmp_path / "flickr_annotations_30k.csv"
    file.write_text(f"raw,split,filename\n{'[' * 100_000},train,1000.jpg\n")
    with pytest.raises(DataError, match="wanted columns raw, split and filename, found RecursionError"):
        flickr30k(tmp_path, file)


def test_a_long_list_is_read_piece_by_piece(tmp_path, monkeypatch):
    elements = [1234567, "a] [,", {"b": [1, {"c": '\\"]'}]}, [], -0.5, None, "é" * 30]
    file = tmp_path / "list.json"
    for text in (json.dumps(elements), " \n" + json.dumps(elements, indent=3, ensure_ascii=False)):
        file.write_text(text, encoding="utf-8")
        for chunk in (1, 2, 3, 7, 64, 1 << 20):
            monkeypatch.setattr("mvlm_dataloading.sources.files._CHUNK", chunk)
            assert list(read_json_list(file)) == elements
        file.write_text(text[:-1].rstrip(), encoding="utf-8")
        with pytest.raises(DataError, match="wanted a JSON list, found no end after"):
            list(read_json_list(file))
    file.write_text('{"a": 1}')
    with pytest.raises(DataError, match="wanted a JSON list, found "):
        list(read_json_list(file))


def test_tables_with_what_downloads_have(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        '\ufeffimage,caption\n"a.jpg","two\nlines, ""quoted"""\nb.jpg,nul\0byte\n'.encode()
    )
    rows = list(read_rows(tmp_path / "a.csv"))
    assert [row["caption"].replace("\0", " ") for row in rows] == ['two\nlines, "quoted"', "nul byte"]
    (tmp_path / "a.jsonl").write_text('{"image": "a"}\n\n[1]\n')
    with pytest.raises(DataError, match=r"a\.jsonl line 3: wanted a JSON object, found list"):
        list(read_rows(tmp_path / "a.jsonl"))


def test_captions_in_another_encoding(tmp_path):
    """As cp1252, which spreadsheets write: rejected one by one, and what is plain stays."""
    names = ["0.jpg", "1.jpg", "é.jpg"]
    for i, name in enumerate(names):
        published.write_picture(tmp_path / os.fsdecode(name.encode("cp1252")), i)
    texts = ["un café à Paris", "a plain one", "a plain one too"]
    rows = list(zip(names, texts, strict=True))
    for file, text in (
        ("c.csv", "image,caption\n" + "\n".join(map(",".join, rows))),
        ("c.jsonl", "\n".join(f'{{"image": "{name}", "caption": "{text}"}}' for name, text in rows)),
        ("c.token", "\n".join(f"{name}#0\t{text}" for name, text in rows)),
        ("results.csv", "image_name| comment_number| comment\n" + "\n".join(map("| 0| ".join, rows))),
    ):
        (tmp_path / file).write_bytes(text.encode("cp1252"))
        source = (folder if file.startswith("c.") and "token" not in file else flickr30k)(tmp_path, tmp_path / file)
        out = tmp_path / f"out of {file}"
        assert [*written(source, out)["train"].values()] == [["a plain one"], ["a plain one too"]], file
        rejected = [(line["key"], line["reason"]) for line in lines(out / "rejected.jsonl")]
        assert rejected == [("0", "caption is not valid Unicode")], file
    (tmp_path / "list.json").write_bytes('["é", "e"]'.encode("cp1252"))
    assert list(read_json_list(tmp_path / "list.json")) == ["\udce9", "e"]


def test_names_of_splits_and_keys():
    assert [split_name(name, "") for name in ("train", "VAL", " dev", "restval", "test")] == [
        "train", "validation", "validation", "train", "test",
    ]  # fmt: skip
    assert safe_key("0001_a-b") == "0001_a-b"
    names = ["a/b", "a.b", "a b", "ä", "猫", "", "x" * 81, "a_b.", "\udcff"]
    assert len({safe_key(name) for name in names} | {"a_b"}) == len(names) + 1
    assert np.all([len(safe_key(name)) <= 80 for name in names])


def test_pieces_are_cut_in_order(tmp_path):
    published.folder(tmp_path, 5)
    records = [record for piece in folder(tmp_path).pieces for record in piece.records(1)]
    pieces = cut({"train": records, "test": records[:1]}, 2)
    assert [(piece.split, [r.key for r in piece.records(1)]) for piece in pieces] == [
        ("test", [records[0].key]),
        ("train", [records[0].key, records[1].key]),
        ("train", [records[2].key, records[3].key]),
        ("train", [records[4].key]),
    ]
