"""The source of Open Clip Art, from a Debian package written as published."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, build_shards, open_dataset
from mvlm_dataloading.sources.drawings.openclipart import openclipart
from support import debian

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:dc="http://purl.org/dc/elements/1.1/" width="{width}pt" height="50pt">
<metadata><rdf:RDF xmlns="http://web.resource.org/cc/"><Work><dc:title>{title}</dc:title>
<dc:creator><Agent><dc:title>{author}</dc:title></Agent></dc:creator>
<dc:subject><rdf:Bag><rdf:li>hash</rdf:li><rdf:li>thing</rdf:li></rdf:Bag></dc:subject>
<license rdf:resource="{licence}"/></Work></rdf:RDF></metadata>
<rect x="{x}" width="20" height="30" fill="red"/></svg>"""


def drawing(title: str, author: str = "Ann Lee", licence: str = "http://web.resource.org/cc/PublicDomain", x: int = 0):
    return SVG.format(title=title, author=author, licence=licence, width=100, x=x).encode()


def write_package(path: Path, files: dict[str, bytes]) -> Path:
    return debian.write_package(path, files, "usr/share/openclipart/svg")


def records(package: Path, **settings):
    source: Any = openclipart(package, **settings)
    return {
        r.metadata["category"] + "/" + r.where.split("/")[-1]: (p.split, r) for p in source.pieces for r in p.listed
    }


FILES = {
    "furniture/soft_blue_couch_ann_l_01.svg": drawing("Soft_Blue  Couch 2"),
    "food/red_wine_ann_lee_02.svg": drawing("A bottle d&amp;#39;eau", x=3),
    "food/golf_flag_on_gr.svg": drawing("Golf flag on green", x=6),
    "icons/mail_send3.svg": drawing("Icon collection", x=9),
    "icons/mail_open.svg": drawing("Icon collection", x=12),
    "icons/door.svg": drawing("Icon collection", x=15),
    "icons/home.svg": drawing("Icon collection", x=18),
    **{f"stars/star_{n}pt.svg": drawing("gramastar", x=n) for n in range(20, 25)},
    "other/licensed.svg": drawing("Licensed", licence="http://creativecommons.org/licenses/GPL/2.0/"),
    "other/broken.svg": b"<svg",
    "other/entity.svg": b'<!DOCTYPE svg [<!ENTITY a "b">]>' + drawing("Entity"),
    "other/readme.txt": b"text",
    "other/large.svg": drawing("Large") + b" " * (1 << 20),
}


def test_captions_are_titles_and_the_words_of_file_names(tmp_path: Path) -> None:
    found = records(write_package(tmp_path / "x.deb", FILES))
    assert {name: r.captions for name, (_, r) in found.items()} == {
        "furniture/soft_blue_couch_ann_l_01.svg": ["Soft Blue Couch"],
        "food/red_wine_ann_lee_02.svg": ["A bottle d'eau", "red wine"],
        "food/golf_flag_on_gr.svg": ["Golf flag on green"],  # the name is the title, cut off
        "icons/mail_send3.svg": ["mail send"],  # the title is that of a collection
        "icons/mail_open.svg": ["mail open"],
        "icons/door.svg": ["door"],
        "icons/home.svg": ["home"],
    }
    _, couch = found["furniture/soft_blue_couch_ann_l_01.svg"]
    assert couch.metadata == {
        "base": "soft blue couch",
        "author": "Ann Lee",
        "category": "furniture",
        "keywords": ["thing"],
        "licence": "public domain",
    }


def test_an_author_is_in_one_split_and_a_large_one_in_training(tmp_path: Path) -> None:
    files = {f"a/big_{chr(97 + n)}.svg": drawing(f"big thing {chr(97 + n)}", "Big", x=n % 80) for n in range(20)}
    for n in range(200):
        word = f"{chr(97 + n // 26)}{chr(97 + n % 26)}x"
        author = ["Jo", "JO"][n % 2] + chr(97 + n // 4 % 26) + chr(97 + n // 104)
        files[f"b/{word}.svg"] = drawing(word, author, x=n % 80)
    found = records(write_package(tmp_path / "x.deb", files))
    splits: dict[str, set[str]] = {}
    for split, record in found.values():
        splits.setdefault(record.metadata["author"].lower(), set()).add(split)
    assert all(len(of_author) == 1 for of_author in splits.values())
    assert splits["big"] == {"train"}
    assert {s for of_author in splits.values() for s in of_author} == {"train", "validation", "test"}


@pytest.mark.slow
def test_shards_hold_drawings_centred_on_white(tmp_path: Path) -> None:
    source = openclipart(write_package(tmp_path / "x.deb", FILES), size=32, validation=0, test=0)
    build_shards(source, tmp_path / "out", workers=1)
    dataset = open_dataset(tmp_path / "out", "train")
    assert len(dataset) == 7
    where = next(i for i in range(7) if dataset.captions(i)[0] == "Soft Blue Couch")
    image = Image.open(io.BytesIO(dataset.image_bytes(where))).convert("RGB")
    assert image.size == (32, 32)
    # A red bar of 20 x 30 on a page of 100 x 50 points fills the square, but for a 16th: 28 high.
    red = np.array(image)[..., 1] < 128  # (rows, columns)
    assert red[2:30, 6:24].all()
    assert red.sum() == 28 * 18
    assert image.getpixel((16, 16)) == (255, 0, 0)
    assert dataset.description["attribution"].startswith("Open Clip Art")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\3\4 not a package", r"wanted a Debian package .* found another file; fetch it with `apt-get download"),
        (
            b"!<arch>\n" + b"data.tar.xz     " + b"0           0     0     100644  9999      `\nxx",
            "found a damaged one",
        ),
        (b"!<arch>\n", "found a damaged one"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.deb").write_bytes(content)
    with pytest.raises(DataError, match=message):
        openclipart(tmp_path / "x.deb")


def test_a_package_without_drawings_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="wanted drawings with titles, found none"):
        openclipart(write_package(tmp_path / "x.deb", {"a/b.txt": b""}))
    with pytest.raises(DataError, match="wanted a file, found none"):
        openclipart(tmp_path / "none.deb")


def test_shares_that_exceed_the_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wanted shares from 0 to 1 that sum to at most 1, got 0\.8 and 0\.8"):
        openclipart(write_package(tmp_path / "openclipart.deb", FILES), validation=0.8, test=0.8)
