"""The source of Tux Paint's stamps, from a Debian package written as published."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, build_shards, open_dataset
from mvlm_dataloading.sources.drawings.stamps import read_stamps, stamps
from support.debian import write_package


def stamp(width: int, height: int, colour: tuple[int, int, int] = (200, 0, 0)) -> bytes:
    """A rectangle in a corner of a transparent image, with a nearly invisible speck in the other."""
    image = Image.new("RGBA", (200, 200))
    image.paste((*colour, 255), (0, 0, width, height))
    image.putpixel((199, 199), (0, 0, 0, 3))
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


FILES = {
    "animals/frog.png": stamp(100, 50),
    "animals/frog.txt": b"A frog.\nde.utf8=Ein Frosch.\n",
    "animals/frog_mirror.png": stamp(9, 9),
    "animals/cartoon/cow.png": stamp(20, 60),
    "animals/cartoon/cow.txt": b"The  cow, a friend!\n",
    "animals/silent.png": stamp(9, 9),
    "animals/broken.png": b"no image",
    "animals/broken.txt": b"A broken one.",
    "animals/frog.ogg": b"sound",
    "symbols/a.png": stamp(9, 9),
    "symbols/a.txt": b"The letter A.",
    **{
        f"space/rocket{n}.{ending}": content
        for n in range(1, 9)
        for ending, content in (("png", stamp(9, 9 + n)), ("txt", b"A rocket."))
    },
}


def package(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    return write_package(folder / "x.deb", files, "usr/share/tuxpaint/stamps")


def test_stamps_have_their_english_sentence(tmp_path: Path) -> None:
    source: Any = stamps(package(tmp_path), validation=0.3, test=0.3)
    found = {record.where: (piece.split, record) for piece in source.pieces for record in piece.listed}
    rockets = {f"space/rocket{n}" for n in range(1, 9)}
    assert set(found) == {"animals/frog", "animals/cartoon/cow", "animals/broken"} | rockets
    assert found["animals/frog"][1].captions == ["A frog."]
    assert found["animals/cartoon/cow"][1].metadata == {
        "base": "cow", "category": "animals/cartoon", "cartoon": True, "licence": "GPL-2",
    }  # fmt: skip
    assert len({found[rocket][0] for rocket in rockets}) == 1  # a series stays together


@pytest.mark.parametrize("content", [b"\x28\xb5\x2f\xfd" + bytes(400), b"\xfd7zXZ\0" + b"x" * 400, b"x" * 999])
def test_packages_that_are_packed_otherwise_or_damaged_are_refused(tmp_path: Path, content: bytes) -> None:
    head = b"%-16s%-12d%-6d%-6d%-8o%-10d`\n" % (b"data.tar.zst", 0, 0, 0, 0o100644, len(content))
    (tmp_path / "x.deb").write_bytes(b"!<arch>\n" + head + content)
    with pytest.raises(DataError, match=r"packed with xz or gzip, found .*; fetch Debian's, Ubuntu packs with zstd"):
        stamps(tmp_path / "x.deb")


def test_stamps_are_put_on_white(tmp_path: Path) -> None:
    build_shards(stamps(package(tmp_path), size=32, validation=0, test=0), tmp_path / "out", workers=0)
    dataset = open_dataset(tmp_path / "out", "train")
    assert dataset.description["licence"] == "GPL-2"
    assert dataset.description["rejected"] == {"drawing is blank or cannot be rendered": 1}
    where = next(i for i in range(len(dataset)) if dataset.captions(i) == ["A frog."])
    image = np.array(Image.open(io.BytesIO(dataset.image_bytes(where))).convert("RGB"))  # (32, 32, 3)
    red = (image == (200, 0, 0)).all(-1)
    assert image.shape == (32, 32, 3)
    assert red[9:23, 2:30].all()  # 28 x 14, in the middle
    assert (image[~red] == 255).mean() > 0.9


def test_all_stamps_are_read_with_transparency(tmp_path: Path) -> None:
    names = [one.name for one in read_stamps(package(tmp_path))]
    assert "animals/silent" in names
    assert "symbols/a" in names
    assert "animals/frog_mirror" not in names


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wanted a file, found none"):
        stamps(tmp_path / "none.deb")
    with pytest.raises(DataError, match="wanted stamps with sentences, found none"):
        stamps(package(tmp_path, {"symbols/a.png": stamp(9, 9)}))
    (tmp_path / "x.deb").write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="fetch it with `apt-get download tuxpaint-stamps-default`"):
        stamps(tmp_path / "x.deb")
    with pytest.raises(DataError, match="wanted size >= 16, got 8"):
        stamps(tmp_path / "x.deb", size=8)
