"""The contact sheet of a data set."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    BuildOptions,
    build_shards,
)
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from mvlm_dataloading.tools.summary import contact_sheet
from support import published

CAPTIONS = {0: ["red and green"], 1: ["красный круг", "ein roter Kreis"], 2: ["赤い丸"], 3: ["7"]}


def write(out: Path, count: int = 10, **settings) -> Path:
    records = [
        Record(
            f"k{i}", published.encoded(published.make_image(i, (60 + 10 * i, 50))), CAPTIONS.get(i, [f"number {i}"]), ""
        )
        for i in range(count)
    ]
    test = [Record("t", published.encoded(published.make_image(90), "PNG"), ["a", "b", "c"], "")]
    pieces = [ListedPiece("train", records[k : k + 4]) for k in range(0, count, 4)]
    pieces.append(ListedPiece("test", [*test, Record("bad", b"", ["x"], "")]))
    return build_shards(Source("set", "tests", "CC0", {}, pieces), out, BuildOptions(**settings), workers=0)


@pytest.mark.slow
def test_contact_sheet_shows_images_and_captions(tmp_path):
    out = write(tmp_path / "out")
    path = contact_sheet(out, tmp_path / "sheet.png")
    with Image.open(path) as sheet:
        assert sheet.size == (8 * 168 + 8, 2 * 204 + 8)
        first = np.asarray(sheet.crop((8, 8, 168, 168)), float)
    # The test split comes first. Its image is centred in its cell, unscaled.
    image = np.asarray(published.make_image(90), float)  # 72 x 54
    assert np.abs(first[53 : 53 + 54, 44 : 44 + 72] - image).mean() < 2
    assert (first[:50] == 255).all()
