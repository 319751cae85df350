"""Samples that share the bytes of one image: questions about an image, and strips of several images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    BuildOptions,
    DataError,
    Loader,
    Masking,
    build_shards,
    check_shards,
    open_dataset,
    rebuild_indices,
)
from mvlm_dataloading.images.limits import ImageLimits
from mvlm_dataloading.sources.record import ImageStrip, ListedPiece, Record, Source, with_images_together
from mvlm_dataloading.tools.reindex import lists_samples_of
from support import published
from support.data import file_contents, make_image, problems_of, read_json_lines, shard_writer


def questions(root: Path, each: int = 3, images: int = 4) -> list[Record]:
    """`each` questions about each image, in turn, and one about an image that cannot be decoded."""
    for i in range(images):
        published.write_image(root / f"{i}.jpg", i)
    (root / "bad.jpg").write_bytes(b"\xff\xd8\xff damaged")
    records = [
        Record(f"q{k}-{i}", root / f"{i}.jpg", [f"question {k} about {i}"], "here", {"question_id": f"{k}-{i}"})
        for k in range(each)
        for i in range(images)
    ]
    return with_images_together([*records, Record("bad", root / "bad.jpg", ["why"], "here")])


def build(out: Path, splits: dict[str, list[Record]], **options) -> Path:
    pieces = [
        ListedPiece(split, listed[k : k + 8]) for split, listed in splits.items() for k in range(0, len(listed), 8)
    ]
    source = Source("set", "tests", "CC0", {}, pieces, questions=True)
    return build_shards(source, out, BuildOptions(**options), workers=0)


@pytest.mark.slow
def test_questions_about_an_image_store_it_once(tmp_path, waves_tokenizer):
    records = questions(tmp_path / "images")
    assert [record.key for record in records[:4]] == ["q0-0", "q1-0", "q2-0", "q0-1"]
    out = build(tmp_path / "out", {"train": records})
    dataset = open_dataset(out, "train")
    assert dataset.keys.tolist() == [record.key for record in records[:-1]]
    offsets, _ = dataset.locate("image", np.arange(12))
    assert len(set(zip(dataset.shard_of(np.arange(12)).tolist(), offsets.tolist(), strict=True))) == 5
    for i, record in enumerate(records[:-1]):
        assert isinstance(record.image, Path)
        assert dataset.image_bytes(i) == record.image.read_bytes()
        assert dataset.captions(i) == record.captions
        assert dataset.metadata(i)["question_id"] == record.metadata["question_id"]
    assert [line["key"] for line in read_json_lines(out / "rejected.jsonl")] == ["bad"]
    assert (out / "duplicates.jsonl").read_text() == ""  # a question more is no duplicate
    loader = Loader(dataset, waves_tokenizer, batch_size=4, image_size=54, text_length=8, seed=0, train=False,
                    masking=Masking(patch_size=9, mask_block=18))  # fmt: skip
    for batch, _ in loader:
        for row, i in enumerate(batch.sample_id.tolist()):
            image = Image.open(io.BytesIO(dataset.image_bytes(i))).resize((54, 54), Image.Resampling.BILINEAR)
            assert np.abs(batch.images[row].numpy() - np.asarray(image, float).transpose(2, 0, 1)).mean() < 8


def test_tars_with_shared_images_are_checked_indexed_and_unpacked(tmp_path):
    out = build(tmp_path / "out", {"train": questions(tmp_path / "images")})
    before = file_contents(out)
    for path in out.glob("*.i*x"):
        path.unlink()
    rebuild_indices(out)
    assert file_contents(out) == before
    (found,) = check_shards(out, workers=0).values()
    assert found.problems == []
    assert lists_samples_of(out / "train-000000.tar", open_dataset(out, "train").index, 0)
    assert found.sizes == [(72, 54)] * 12
    assert found.image_bytes == [(tmp_path / f"images/{i}.jpg").stat().st_size for i in range(4) for _ in range(3)]
    with tarfile.open(out / "train-000000.tar") as tar:
        tar.extractall(tmp_path / "files", filter="data")
    assert (tmp_path / "files/q2-0.jpg").read_bytes() == (tmp_path / "images/0.jpg").read_bytes()
    lines = (out / "train-000000.idx").read_text().splitlines()
    words = lines[2].split(" ")
    words[1] = lines[4].split(" ")[1]  # the second question gets the image of the fourth
    (out / "train-000000.idx").write_text("\n".join([*lines[:2], " ".join(words), *lines[3:]]) + "\n")
    assert any("wanted the samples of train-000000.tar" in problem for problem in problems_of(out))


def test_an_index_with_the_image_of_another_sample_is_refused(tmp_path):
    with shard_writer(tmp_path / "out") as writer:
        for key, i in (("a", 0), ("b", 1), ("c", 1)):
            writer.add(key, make_image(i, size=(40, 40)), [key])
    assert len(open_dataset(tmp_path / "out", "train").image_bytes(2)) > 0
    idx = tmp_path / "out/train-000000.idx"
    lines = idx.read_text().splitlines()
    words = lines[3].split(" ")
    words[1:3] = lines[1].split(" ")[1:3]
    idx.write_text("\n".join([*lines[:3], " ".join(words)]) + "\n")
    (tmp_path / "out/train.index").unlink()
    with pytest.raises(DataError, match="the image of c is not where it says"):
        open_dataset(tmp_path / "out", "train").image_bytes(2)


def test_the_owner_of_a_shared_image_may_be_dropped(tmp_path):
    """Three questions about an image, of which the first repeats a key: the other two are written with the image."""
    records = questions(tmp_path / "images", images=2)
    repeated = Record("q0-1", records[0].image, ["again"], "here")
    out = build(tmp_path / "out", {"test": records[3:], "train": [repeated, *records[1:3]]})
    dataset = open_dataset(out, "train")
    assert dataset.keys.tolist() == ["q1-0", "q2-0"]
    assert dataset.image_bytes(0) == dataset.image_bytes(1) == (tmp_path / "images/0.jpg").read_bytes()
    assert len({int(dataset.locate("image", i)[0]) for i in (0, 1)}) == 1


def test_published_splits_of_questions_stay_as_they_are(tmp_path):
    """An image in train and test would be dropped from captions. The published training questions are all kept."""
    records = questions(tmp_path / "images", images=2)
    out = build(tmp_path / "out", {"test": records[:1], "train": records[1:6]})
    assert len(open_dataset(out, "train")) == 5
    more = [Record("own", records[0].image, ["a"], "here"), *questions(tmp_path / "more", 1, 3)[2:3]]
    source = Source("other", "", "", {}, [ListedPiece("train", more)], questions=True)
    other = build_shards(source, tmp_path / "other", evaluation_sets=[out], workers=0)
    assert [(x["key"], x["reason"]) for x in read_json_lines(other / "rejected.jsonl")] == [
        ("own", "image is in an evaluation split")
    ]
    with pytest.raises(DataError, match="drop-duplicates: wanted a data set with a sample per image"):
        build(tmp_path / "third", {"train": records}, drop_duplicates=True)


def test_evaluation_splits_of_any_name_are_kept_out_of_training(tmp_path):
    records = questions(tmp_path / "images", 1)
    against = build(tmp_path / "against", {"testA": records[:2]})
    pieces = [ListedPiece("train", records[:4])]
    out = build_shards(Source("o", "", "", {}, pieces), tmp_path / "out", evaluation_sets=[against], workers=0)
    assert open_dataset(out, "train").keys.tolist() == ["q0-2", "q0-3"]


def test_strips(tmp_path):
    """Strips of parts of images are in test_nlvr.py."""
    wide, tall = Image.new("RGB", (80, 40), (250, 0, 0)), Image.new("RGB", (30, 60), (0, 0, 250))
    for name, image in (("wide.png", wide), ("tall.png", tall)):
        image.save(tmp_path / name)
    turned = Image.new("RGB", (40, 40), (250, 0, 0))
    turned.paste((0, 0, 250), (0, 0, 40, 20))
    (tmp_path / "turned.png").write_bytes(published.with_exif(turned, "PNG", 6))  # its top is shown at the right
    (tmp_path / "bad.png").write_bytes(b"no image")
    pair = ImageStrip((tmp_path / "wide.png", tmp_path / "tall.png"), 32)
    blue = ImageStrip((tmp_path / "turned.png",), 40, kind="PNG")
    content = blue.compose([blue.files[0].read_bytes()], ImageLimits())
    assert Image.open(io.BytesIO(content)).getpixel((30, 30)) == (0, 0, 250)
    records = [
        Record("pair", pair, ["two"], ""),
        Record("again", pair, ["two again"], ""),
        Record("missing", ImageStrip((tmp_path / "wide.png", tmp_path / "no.png"), 32), ["gone"], ""),
        Record("bad", ImageStrip((tmp_path / "wide.png", tmp_path / "bad.png"), 32), ["bad"], ""),
    ]
    out = build(tmp_path / "out", {"train": records})
    assert {line["key"]: line["reason"] for line in read_json_lines(out / "rejected.jsonl")} == {
        "missing": "image file is missing",
        "bad": "image cannot be decoded",
    }
    dataset = open_dataset(out, "train")
    pixels = [np.asarray(Image.open(io.BytesIO(dataset.image_bytes(i)))) for i in range(2)]
    assert [p.shape for p in pixels] == [(32, 64, 3)] * 2
    assert dataset.locate("image", 0)[0] == dataset.locate("image", 1)[0]
    for columns, colour in ((slice(0, 32), (250, 0, 0)), (slice(32, 64), (0, 0, 250))):
        assert np.abs(pixels[0][:, columns].astype(int).mean((0, 1)) - colour).max() < 4
    records[0] = Record("pair", ImageStrip(pair.files, 48), ["two"], "")
    with pytest.raises(DataError, match="wanted a new folder or the data set set"):
        build(out, {"train": records})
