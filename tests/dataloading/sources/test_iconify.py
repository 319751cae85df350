"""Collections of icons in Iconify's JSON format, written as published."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import DataError, build_shards, open_dataset
from mvlm_dataloading.sources.emoji import named_emoji, plain, split_of
from mvlm_dataloading.sources.iconify import iconify


def square(x: int) -> dict[str, Any]:
    return {"body": f'<path fill="currentColor" d="M{x} 2h9v9h-9z"/>'}


COLLECTION: dict[str, Any] = {
    "prefix": "demo",
    "lastModified": 1,
    "width": 24,
    "height": 24,
    "icons": {
        "home": square(1),
        "home-outline": square(2),
        "arrow-left-24": square(3),
        "wide": {"body": '<path fill="red" d="M-4 0h40v10h-40z"/>', "left": -4, "width": 40, "height": 10},
        "secret": square(4) | {"hidden": True},
        "3d": square(5),
        "blank": {"body": '<path d=""/>'},
        "photo": {"body": '<image href="/etc/hostname.png" width="24" height="24"/>'},
    },
    "aliases": {
        "house": {"parent": "home"},
        "domicile": {"parent": "house"},
        "turned": {"parent": "home-mirrored"},
        "circle-a": {"parent": "circle-b"},
        "circle-b": {"parent": "circle-a"},
        "home-mirrored": {"parent": "home", "hFlip": True},
        "home-16": {"parent": "home"},
    },
}
INFO = {"name": "Demo Icons", "author": {"name": "Ann Lee"}, "license": {"title": "MIT", "spdx": "MIT"}}


def write(folder: Path, content: Any = COLLECTION, **beside: Any) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    path = folder / "icons.json"
    path.write_text(json.dumps(content))
    return path


def records(path: Path, **settings: Any) -> dict[str, tuple[str, Any]]:
    source: Any = iconify(path, **settings)
    return {record.where: (piece.split, record) for piece in source.pieces for record in piece.listed}


def test_captions_are_the_names_of_icons_and_of_plain_aliases(tmp_path: Path) -> None:
    found = records(write(tmp_path, info=INFO))
    assert {name: record.captions for name, (_, record) in found.items()} == {
        "home": ["home", "domicile", "house"],
        "home-outline": ["home outline"],
        "arrow-left-24": ["arrow left"],
        "wide": ["wide"],
        "blank": ["blank"],
        "photo": ["photo"],
    }
    assert found["home-outline"][1].metadata == {
        "name": "home-outline",
        "base": "home",
        "collection": "demo",
        "licence": "MIT",
        "attribution": "Demo Icons, Ann Lee",
    }


def test_styles_of_an_icon_are_in_one_split(tmp_path: Path) -> None:
    icons = {
        f"{word}{style}": square(1) for word in ("cat", "dog", "owl", "hen", "fox", "cow") for style in ("", "-bold")
    }
    found = records(write(tmp_path, {"prefix": "p", "icons": icons}), validation=0.3, test=0.3)
    assert len({split for split, _ in found.values()}) > 1
    for name, (split, _) in found.items():
        assert split == found[f"{name.removesuffix('-bold')}-bold"][0]


def test_icons_are_rendered_black_on_white_and_files_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "icons", info=INFO)
    out = build_shards(iconify(path, size=48, validation=0, test=0), tmp_path / "out", workers=0)
    dataset = open_dataset(out, "train")
    assert dataset.description["name"] == "iconify-demo"
    assert dataset.description["attribution"] == "Demo Icons, Ann Lee"
    assert dataset.description["rejected"] == {"drawing is blank or cannot be rendered": 2}  # the photo too
    rows = {dataset.captions(i)[0]: i for i in range(len(dataset))}
    home, wide = (
        np.array(Image.open(io.BytesIO(dataset.image_bytes(rows[name]))).convert("RGB")) for name in ("home", "wide")
    )
    assert home.shape == (48, 48, 3)
    assert home[10, 10].tolist() == [0, 0, 0]
    assert home[40, 40].tolist() == [255, 255, 255]
    assert wide[24, 1].tolist() == [255, 0, 0]
    assert wide[10, 24].tolist() == [255, 255, 255]


@pytest.mark.slow
def test_emoji_have_names_and_splits_of_the_emoji_data_set(tmp_path: Path) -> None:
    named = {stem: (captions, meta) for stem, _, captions, meta in named_emoji()}
    chosen = [stem for stem in sorted(named) if split_of(stem) == "test"][:3]
    chosen.append(next(stem for stem in sorted(named) if "FE0F" in stem))  # chars.json has no variation selectors
    content = {"prefix": "other-artist", "icons": {f"icon-{i}": square(i) for i in range(len(chosen))}}
    content["aliases"] = {"short": {"parent": "icon-1"}, "shorter": {"parent": "short"}}
    chars = {"f101": "icon-0", **{plain(stem): f"icon-{i}" for i, stem in enumerate(chosen)}}
    chars[plain(chosen[1])] = "shorter"
    found = records(write(tmp_path, content, chars=chars), validation=0, test=0)
    for i, stem in enumerate(chosen):
        split, record = found[f"icon-{i}"]
        assert (split, record.captions, record.metadata["base"]) == (
            split_of(stem),
            named[stem][0],
            named[stem][1]["base"],
        )


@pytest.mark.parametrize("prefix", ["twemoji", "noto"])
def test_held_out_artists_are_never_trained_on(tmp_path: Path, prefix: str) -> None:
    path = write(tmp_path, COLLECTION | {"prefix": prefix})
    with pytest.raises(DataError, match=f"{prefix} is held out to measure transfer, and never trained on"):
        iconify(path)
    assert {split for split, _ in records(path, evaluation_only=True).values()} <= {"seen", "validation", "test"}
