"""Tars by webdataset's writer and Parquet files by `datasets` and pyarrow, as others have them in their buckets."""

import io
import json
import zlib
from collections.abc import Set
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF"}


def picture(number: int, extension: str = "jpg") -> bytes:
    """An encoded image of 40 x 56 pixels that no other number has."""
    pixels = np.zeros((40, 56, 3), np.uint8)
    pixels[:] = number * 37 % 256, number * 59 % 256, 99
    pixels[8:20, 8:30] = 255 - pixels[0, 0]
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, FORMATS[extension])
    return content.getvalue()


def damaged_png(png: bytes) -> bytes:
    """A PNG with zeros among its packed pixels and a checksum that fits, so that only decoding shows the damage."""
    at = png.index(b"IDAT")
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    packed = b"IDAT" + png[at + 4 : at + 10] + bytes(20) + png[at + 30 : end]
    return png[:at] + packed + zlib.crc32(packed).to_bytes(4, "big") + png[end + 4 :]


def sample(number: int) -> dict[str, Any]:
    """A sample as webdataset writes it: an image of one of four formats, a .txt and a .json."""
    extension = list(FORMATS)[number % 4]
    texts = {"caption": f"json {number}", "recaption": [f"re {number} a", f"re {number} b"]}
    return {"__key__": f"{number:09d}", extension: picture(number, extension), "txt": f"text {number}", "json": texts}


def write_tars(
    folder: Path, tars: int, samples: int, name: str = "{:05d}.tar", damaged: Set[int] = frozenset()
) -> list[Path]:
    """Tars of `sample`, numbered through all of them. The PNGs of `damaged` ones have a good header and a good end."""
    webdataset = pytest.importorskip("webdataset")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for tar in range(tars):
        paths.append(folder / name.format(tar))
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for number in range(tar * samples, (tar + 1) * samples):
                one = sample(number)
                if number in damaged:
                    one["png"] = damaged_png(one["png"])
                writer.write(one)
    return paths


def write_table(path: Path, numbers: range, *, by_datasets: bool, group: int = 7) -> Path:
    """A Parquet file of images and captions: by `datasets`, a struct of bytes and path; by pyarrow, bytes.

    `group` rows are a row group.
    """
    captions = [f"text {number}" for number in numbers]
    others = [[f"re {number} a", f"re {number} b"] for number in numbers]
    images = [picture(number, list(FORMATS)[number % 4]) for number in numbers]
    path.parent.mkdir(parents=True, exist_ok=True)
    if by_datasets:
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": one, "path": None} for one in images], "caption": captions, "others": others}
        features = datasets.Features(
            image=datasets.Image(), caption=datasets.Value("string"), others=datasets.List(datasets.Value("string"))
        )
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path), batch_size=group)
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        info = [json.dumps({"caption": text}) for text in captions]
        table = arrow.table({"image": images, "caption": captions, "others": others, "info": info})
        parquet.write_table(table, path, row_group_size=group, compression="zstd")
    return path
