"""Broken and odd samples: each is accepted, or rejected with its reason, and no process dies."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from mvlm_dataloading import BuildOptions, Loader, Masking, build_shards, open_dataset
from mvlm_dataloading.images.limits import TOO_MANY_PIXELS, UNDECODABLE
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support import published
from support.data import read_json_lines
from support.hostile_images import chunk, peak_memory, png, reset_peak

GOOD = "accepted"


def jpeg_of_size(jpeg: bytes, width: int, height: int, *, second: bool = False) -> bytes:
    """A JPEG whose header states another size; with `second`, in a header before the right one."""
    at = jpeg.index(b"\xff\xc0")
    end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    header = jpeg[at : at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 : end]
    return jpeg[:at] + header + jpeg[at if second else end :]


def webp_of_size(width: int, height: int) -> bytes:
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little")
    lossless = published.encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
    body = b"WEBP" + extended + (height - 1).to_bytes(3, "little") + lossless
    return b"RIFF" + struct.pack("<I", len(body)) + body


def odd_images() -> dict[str, tuple[bytes, str | tuple[str, str]]]:
    """Name -> the image's bytes, and GOOD or the reason for its rejection."""
    image = published.make_image(1, (90, 60))
    jpeg, whole_png, webp = (published.encoded(image, kind) for kind in ("JPEG", "PNG", "WEBP"))
    progressive = published.encoded(image, "JPEG", progressive=True)
    zoo: dict[str, tuple[bytes, str | tuple[str, str]]] = {}
    for name, whole in (("jpeg", jpeg), ("progressive", progressive), ("png", whole_png), ("webp", webp)):
        zoo[f"{name} whole"] = (whole, GOOD)
        zoo[f"{name} and more"] = (whole + b"more", GOOD)
        end = len(whole)
        for cut in (1, 4, 8, 12, 16, 20, 33, *range(50, end - 9, end // 12), end - 9, end - 2, end - 1):
            zoo[f"{name} cut at {cut} of {len(whole)}"] = (whole[:cut], UNDECODABLE)
    zoo |= {
        "empty": (b"", "image file is empty"),
        "a web page": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", UNDECODABLE),
        "noise": (np.random.default_rng(0).bytes(5000), UNDECODABLE),
        "zeros": (bytes(5000), UNDECODABLE),
        "wrong magic": (b"\xff\xd9" + jpeg[2:], UNDECODABLE),
        "png in jpeg's magic": (b"\xff\xd8\xff" + whole_png[3:], UNDECODABLE),
        "zeros for the scan's end": (jpeg[:-200] + bytes(200), UNDECODABLE),
        "png with a wrong checksum": (whole_png[:40] + bytes([whole_png[40] ^ 1]) + whole_png[41:], UNDECODABLE),
        "gif": (published.encoded(image, "GIF"), "image format is GIF, not JPEG, PNG or WebP"),
        "bmp": (published.encoded(image, "BMP"), "image format is BMP, not JPEG, PNG or WebP"),
        "tiff": (published.encoded(image, "TIFF"), "image format is TIFF, not JPEG, PNG or WebP"),
        "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", UNDECODABLE),
        "png bomb": (png(60_000, 60_000, 0), TOO_MANY_PIXELS),
        "png bomb with its data": (png(4_000, 4_000, 4_000), TOO_MANY_PIXELS),
        "png just over the cap": (png(1001, 1000, 1000), TOO_MANY_PIXELS),
        "png at the cap": (png(1000, 1000, 1000), GOOD),
        "png with a claim of data": (png(900, 900, 0), UNDECODABLE),
        "png of no size": (png(0, 0, 0), UNDECODABLE),
        "jpeg bomb": (jpeg_of_size(jpeg, 65_500, 65_500), TOO_MANY_PIXELS),
        "jpeg bomb before a small header": (jpeg_of_size(jpeg, 65_500, 65_500, second=True), UNDECODABLE),
        # It has its end mark, and both decoders fill up what is missing.
        "jpeg that claims more rows": (jpeg_of_size(jpeg, 90, 600), GOOD),
        # Pillow 12 cannot open it; Pillow 13 reads its size first.
        "webp bomb": (webp_of_size(16_000, 16_000), (TOO_MANY_PIXELS, UNDECODABLE)),
        "webp that is not as large as it says": (webp_of_size(90, 60), UNDECODABLE),
        "text bomb in a png": (text_bomb(whole_png), "any"),
        "too small": (published.encoded(published.make_image(1, (90, 15)), "PNG"), "image is too small"),
        "a pixel": (published.encoded(Image.new("RGB", (1, 1))), "image is too small"),
        "a banner": (published.encoded(published.make_image(1, (400, 20))), "image is too long and thin"),
        "cmyk": (published.encoded(image.convert("CMYK")), GOOD),
        "grey": (published.encoded(image.convert("L")), GOOD),
        "16 bits": (published.encoded(Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 257), "PNG"), GOOD),
        "black and white": (published.encoded(image.convert("1"), "PNG"), GOOD),
        "palette": (published.encoded(image.convert("P"), "PNG"), GOOD),
        "grey and alpha": (published.encoded(image.convert("LA"), "PNG"), GOOD),
        "alpha": (published.encoded(image.convert("RGBA"), "PNG"), GOOD),
        "webp with alpha": (published.encoded(image.convert("RGBA"), "WEBP"), GOOD),
        "webp without loss": (published.encoded(image, "WEBP", lossless=True), GOOD),
        "progressive": (progressive, GOOD),
        "animated png": (published.encoded(image, "PNG", save_all=True, append_images=[image.rotate(90)]), GOOD),
        "animated webp": (published.encoded(image, "WEBP", save_all=True, append_images=[image.rotate(90)]), GOOD),
        "camera's jpeg of two": (published.encoded(image, "MPO", save_all=True, append_images=[image]), GOOD),
        "flat": (published.encoded(Image.new("RGB", (64, 64), "teal"), "PNG"), GOOD),
    }
    for kind in ("JPEG", "PNG", "WEBP"):
        for orientation in range(2, 9):
            zoo[f"{kind} orientation {orientation}"] = (published.with_exif(image, kind, orientation), GOOD)
    zoo["orientation 99"] = (published.with_exif(image, "JPEG", 99), GOOD)
    return zoo


def text_bomb(png: bytes) -> bytes:
    """A PNG with 80 MB of text in it, compressed to 80 kB."""
    return png[:33] + chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20), 9)) + png[33:]


CAPTIONS: dict[str, tuple[list[str], Any]] = {
    "none": ([], "no caption"),
    "blank": ([" \t", "\n", "\u3000"], "no caption"),
    "100 kB": (["x" * 100_000], "caption is too long"),
    "100 kB and a short one": (["x" * 100_000, "short"], ["short"]),
    "many bytes in few signs": (["猫" * 700], "caption is too long"),
    "nul": (["a\0b", "\0"], ["a b"]),
    "controls": (["a\x07\x1b[31mb\x7f"], ["a [31mb"]),
    "bidi": (["\u202eabc\u202c \u2066d\u2069\u200f"], ["abc d"]),
    "lines": (["a\nb\r\nc\u2028d\x85e"], ["a b c d e"]),
    "half a pair": (["a \ud83d b"], "caption is not valid Unicode"),
    "half a pair beside a good one": (["\udfff", "good"], ["good"]),
    "emoji and scripts": (["👩‍👩‍👧 猫 кот"], ["👩‍👩‍👧 猫 кот"]),
    "repeated": (["a  b", "a b", "c"], ["a b", "c"]),
    "byte-order mark": (["\ufeffa"], ["a"]),
    "markup": (["<b>a</b> [MASK] </s>"], ["<b>a</b> [MASK] </s>"]),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> dict[str, Any]:
    """Results of a build of all records; keys are their positions in the two tables above."""
    out = tmp_path_factory.mktemp("zoo") / "out"
    good = published.encoded(published.make_image(2))
    cases = {name: (image, ["words"], wanted) for name, (image, wanted) in odd_images().items()}
    cases |= {f"caption: {name}": (good, known, wanted) for name, (known, wanted) in CAPTIONS.items()}
    records = [
        Record(f"{i:04d}", image, captions, name) for i, (name, (image, captions, _)) in enumerate(cases.items())
    ]
    records += [
        Record("0000", good, ["a"], "key again"),
        Record("../a", good, ["a"], "key that climbs"),
        Record("gone", out / "gone.jpg", ["a"], "file that is gone"),
        Record("folder", out.parent, ["a"], "file that is a folder"),
        Record("nul", out / "a\0b.jpg", ["a"], "file name with a nul"),
        Record("null", None, ["a"], "no picture"),
    ]
    before = reset_peak()
    build_shards(
        Source("zoo", "", "", {}, [ListedPiece("train", records)]), out, BuildOptions(max_pixels=1_000_000), workers=0
    )
    grown = peak_memory() - before
    rejected = {line["where"]: line["reason"] for line in read_json_lines(out / "rejected.jsonl")}
    return {"cases": cases, "out": out, "rejected": rejected, "grown": grown, "dataset": open_dataset(out, "train")}


@pytest.mark.slow
def test_each_odd_image_is_accepted_or_rejected_with_its_reason(zoo):
    assert len(zoo["cases"]) > 100
    assert zoo["grown"] < 1 << 30
    keys = {str(key): i for i, key in enumerate(zoo["dataset"].keys)}
    wrong = {}
    for number, (name, (_, _, wanted)) in enumerate(zoo["cases"].items()):
        i = keys.get(f"{number:04d}")
        found = zoo["rejected"].get(name, GOOD) if i is None else GOOD
        if isinstance(wanted, list):
            found = zoo["dataset"].captions(i) if i is not None else found
        reasons = wanted if isinstance(wanted, tuple) else (wanted,)
        if (wanted == "any" and not found) or (wanted != "any" and found not in reasons):
            wrong[name] = (found, wanted)
        assert (i is None) == (name in zoo["rejected"]), name  # either in the shards or in the list
    assert wrong == {}


@pytest.mark.slow
def test_odd_records_are_rejected_with_their_reasons(zoo):
    reasons = {where: reason for where, reason in zoo["rejected"].items() if where not in zoo["cases"]}
    assert reasons == {
        "key again": "key was used before",
        "key that climbs": "key is not 1 to 80 of A-Z a-z 0-9 _ + = @ , -",
        "file that is gone": "image file is missing",
        "file that is a folder": "image file is missing",
        "file name with a nul": "image file is missing",
        "no picture": "no image",
    }


@pytest.mark.slow
def test_accepted_odd_images_are_loaded_correctly(zoo, waves_tokenizer):
    """The loader's images, EXIF orientation applied, against Pillow's decoders and its transposition."""
    dataset, side = zoo["dataset"], 60
    loader = Loader(dataset, waves_tokenizer, batch_size=16, image_size=side, text_length=8, seed=0, train=False,
                    masking=Masking(patch_size=20, mask_block=20))  # fmt: skip
    images = np.concatenate([batch.images.numpy() for batch, _ in loader])  # (n, 3, 60, 60)
    assert len(images) == len(dataset) > 50
    names = list(zoo["cases"])
    turned = 0
    for i, pixels in enumerate(images):
        name = names[int(str(dataset.keys[i]))]
        if name in ("camera's jpeg of two", "16 bits") or "bomb" in name:
            continue  # Pillow decodes these differently
        with Image.open(io.BytesIO(dataset.image_bytes(i))) as stored:
            shown = ImageOps.exif_transpose(stored).convert("RGB")
        size = dataset.metadata(i)["width"], dataset.metadata(i)["height"]
        assert size == shown.size, name
        turned += size != stored.size
        wanted = np.asarray(shown.resize((side, side), Image.Resampling.BILINEAR), np.float64).transpose(2, 0, 1)
        assert np.abs(pixels - wanted).mean() < 8, name  # turned wrongly: more than 50
    assert turned == 3 * 4  # orientations 5 to 8 swap width and height
