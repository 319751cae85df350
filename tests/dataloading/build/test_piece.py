"""Samples as they are written: sizes, encoding and token ids."""

import hashlib
import io
import json
import tarfile
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image, ImageDraw, ImageOps

from mvlm_dataloading import Loader, check_shards, open_dataset
from support import published
from support.data import build_records, make_record, read_json_lines

EXIF_ORIENTATION = 0x0112


def test_re_encoding_applies_the_exif_orientation(tmp_path):
    image = published.make_image(1, (90, 60))
    records = [
        make_record(f"{kind}{orientation}", published.with_exif(image, kind, orientation))
        for kind in ("JPEG", "PNG", "WEBP")
        for orientation in (1, 3, 6)
    ]
    dataset = open_dataset(build_records(tmp_path / "out", {"train": records}, short_side=30, quality=95), "train")
    for i, record in enumerate(records):
        with Image.open(io.BytesIO(dataset.image_bytes(i))) as stored:
            assert stored.getexif().get(EXIF_ORIENTATION, 1) == 1
            assert isinstance(record.image, bytes)
            shown = ImageOps.exif_transpose(Image.open(io.BytesIO(record.image))).convert("RGB")
            assert stored.size == ((30, 45) if shown.width < shown.height else (45, 30))
            wanted = np.asarray(shown.resize(stored.size, Image.Resampling.BICUBIC), np.float64)
            assert np.abs(np.asarray(stored) - wanted).mean() < 8  # turned wrongly: more than 50
        assert (dataset.metadata(i)["width"], dataset.metadata(i)["height"]) == stored.size


def test_images_are_downscaled_and_never_upscaled(tmp_path):
    records = [
        make_record("large", published.make_image(1, (200, 100))),
        make_record("small", published.make_image(2, (60, 40))),
    ]
    out = build_records(tmp_path / "out", {"train": records}, short_side=50)
    dataset = open_dataset(out, "train")
    with Image.open(io.BytesIO(dataset.image_bytes(0))) as image:
        assert (image.format, image.size) == ("JPEG", (100, 50))
    assert dataset.image_bytes(1) == records[1].image
    encoded = build_records(tmp_path / "encoded", {"train": records}, short_side=50, quality=40)
    dataset = open_dataset(encoded, "train")
    with Image.open(io.BytesIO(dataset.image_bytes(1))) as image:
        assert (image.format, image.size) == ("JPEG", (60, 40))


def drawing(i: int, size: tuple[int, int] = (72, 54)) -> Image.Image:
    """A black disc on transparent black, half transparent in its lower half."""
    image = Image.new("RGBA", size)
    pen = ImageDraw.Draw(image)
    pen.ellipse((i, 4, i + 40, 44), fill=(0, 0, 0, 255))
    pen.rectangle((i, 24, i + 40, 44), fill=(0, 0, 200, 128))
    return image


def on_white(image: Image.Image) -> np.ndarray:
    rgba = np.asarray(image.convert("RGBA"), np.float64)
    share = rgba[:, :, 3:] / 255
    return rgba[:, :, :3] * share + 255 * (1 - share)


def test_transparent_images_are_stored_on_white(tmp_path):
    opaque = published.encoded(published.make_image(1).convert("RGBA"), "PNG")
    palette = published.make_image(2).convert("P")
    clear, shown = palette.getpixel((30, 20)), palette.convert("RGBA")
    shown.putalpha(Image.fromarray(np.where(np.asarray(palette) == clear, 0, 255).astype(np.uint8)))
    images = {
        "png": (published.encoded(drawing(0), "PNG"), drawing(0)),
        "webp": (published.encoded(drawing(12), "WEBP", lossless=True), drawing(12)),
        "turned": (published.with_exif(drawing(24), "PNG", 6), drawing(24).transpose(Image.Transpose.ROTATE_270)),
        "palette": (published.encoded(palette, "PNG", transparency=clear), shown),
    }
    records = [make_record(key, content) for key, (content, _) in images.items()]
    out = build_records(tmp_path / "out", {"train": [*records, make_record("opaque", opaque)]})
    dataset = open_dataset(out, "train")
    assert dataset.keys.tolist() == [*images, "opaque"]  # discs on black would be duplicates
    assert read_json_lines(out / "duplicates.jsonl") == []
    for i, (content, wanted) in enumerate(images.values()):
        with Image.open(io.BytesIO(dataset.image_bytes(i))) as stored:
            assert (stored.format, stored.mode, stored.size) == ("PNG", "RGB", wanted.size)
            assert np.abs(np.asarray(stored, np.float64) - on_white(wanted)).max() <= 1
        facts = dataset.metadata(i)
        assert (facts["width"], facts["height"]) == wanted.size
        assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert dataset.image_bytes(4) == opaque


@pytest.mark.parametrize("settings", [{"short_side": 27}, {"quality": 95}])
def test_transparent_images_are_encoded_on_white(tmp_path, settings):
    out = build_records(
        tmp_path / "out", {"train": [make_record("a", published.encoded(drawing(0), "PNG"))]}, **settings
    )
    with Image.open(io.BytesIO(open_dataset(out, "train").image_bytes(0))) as stored:
        assert stored.format == "JPEG"
        wanted = Image.fromarray(on_white(drawing(0)).astype(np.uint8)).resize(stored.size, Image.Resampling.BICUBIC)
        assert np.abs(np.asarray(stored, np.float64) - np.asarray(wanted, np.float64)).mean() < 8  # on black: > 100


@pytest.mark.slow
def test_webp_files_with_exif_behind_an_odd_chunk_are_stored_and_loaded(tmp_path, waves_tokenizer):
    """The builds' decoder is DALI's, which refuses them as they are. Pixels are Pillow's, of the published files."""
    images, odd = [], 0
    for i in range(17):
        settings: dict[str, Any] = {"lossless": True} if i < 8 else {"icc_profile": b"a" * 457}
        image = drawing(0) if i == 16 else published.make_image(i, (72 + i, 54))
        images.append(published.with_exif(image, "WEBP", 1 + i % 8, **settings))
        odd += images[-1][34] % 2  # length of the second chunk
    assert odd > 9
    records = [make_record(f"{i:02d}", image) for i, image in enumerate(images)]
    dataset = open_dataset(build_records(tmp_path / "out", {"train": records}), "train")
    assert dataset.keys.tolist() == [record.key for record in records]
    loader = Loader(dataset, waves_tokenizer, batch_size=17, image_size=64, text_length=8, seed=0, train=False)
    ((batch, _),) = list(loader)
    for i, image in enumerate(images):
        with Image.open(io.BytesIO(image)) as given, Image.open(io.BytesIO(dataset.image_bytes(i))) as stored:
            assert stored.format == ("PNG" if i == 16 else "WEBP")
            assert i == 16 or dict(stored.getexif()) == dict(given.getexif())
            shown, found = ImageOps.exif_transpose(given), ImageOps.exif_transpose(stored)
        shown = Image.fromarray(on_white(shown).round().astype(np.uint8))
        assert np.abs(np.asarray(found, float) - np.asarray(shown)).max() <= (i == 16)
        facts = dataset.metadata(i)
        assert (facts["width"], facts["height"]) == shown.size
        assert facts["sha256"] == hashlib.sha256(image).hexdigest()
        wanted = np.asarray(shown.resize((64, 64), Image.Resampling.BILINEAR), np.float64).transpose(2, 0, 1)
        assert np.abs(batch.images[i].numpy() - wanted).mean() < 8  # turned wrongly: more than 50


def test_token_ids_are_stored_with_the_captions(tmp_path, waves_tokenizer):
    waves_tokenizer.save(tmp_path / "tokenizer.json")
    captions = [["picture number 1 of some waves", "the wave"], ["waves"]]
    records = [make_record(f"k{i}", published.make_image(i), known) for i, known in enumerate(captions)]
    out = build_records(tmp_path / "out", {"train": records}, tokenizer=tmp_path / "tokenizer.json", text_length=6)
    description = json.loads((out / "dataset.json").read_text())
    assert description["tokens"] == {"fingerprint": waves_tokenizer.fingerprint, "max_length": 6}
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    dataset = open_dataset(out, "train")
    assert dataset.tokenizer_sha256 is not None
    tar = (out / "train-000000.tar").read_bytes()
    index = [line.split(" ") for line in (out / "train-000000.idx").read_text().splitlines()[1:]]
    for row, known in zip(index, captions, strict=True):
        extension, offset, size, name = row[-4:]
        assert (extension, name.endswith(".tok")) == ("tok", True)
        numbers = np.frombuffer(tar[int(offset) : int(offset) + int(size)], "<i4").tolist()
        for caption in known:  # a count, then so many ids
            ids, _ = waves_tokenizer.encode([caption], 6)
            assert numbers[: 1 + len(ids)] == [len(ids), *ids.tolist()]
            numbers = numbers[1 + len(ids) :]
        assert numbers == []


def test_captions_without_a_token_cost_a_sample_only_if_no_other_is_left(tmp_path):
    """A tokenizer may drop characters that can be seen."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}, "[UNK]")
    )
    inner.normalizer = tokenizers.normalizers.Replace("!", "")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    captions = {"some": ["!!", "a a", "!", "a"], "none": ["!"]}
    records = [make_record(key, published.make_image(i), captions[key]) for i, key in enumerate(captions)]
    out = build_records(tmp_path / "out", {"train": records}, tokenizer=tmp_path / "tokenizer.json", text_length=6)
    dataset = open_dataset(out, "train")
    assert (dataset.keys.tolist(), dataset.captions(0)) == (["some"], ["a a", "a"])
    assert dataset.description["rejected"] == {"caption has no token": 1}
    assert dataset.description["splits"]["train"]["captions"] == 2
    assert check_shards(out, workers=0)["train"].problems == []
    with tarfile.open(out / "train-000000.tar") as tar:
        (name,) = [name for name in tar.getnames() if name.endswith(".tok")]
        file = tar.extractfile(name)
        assert file is not None
        assert np.frombuffer(file.read(), "<i4").tolist() == [4, 2, 5, 5, 3, 3, 2, 5, 3]
