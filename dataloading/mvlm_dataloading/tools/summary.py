"""Summary of a data set: a table of findings, and a contact sheet of images."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.build.duplicates import decoder_with_max_limit
from mvlm_dataloading.dataset.description import read_description
from mvlm_dataloading.dataset.open import open_dataset
from mvlm_dataloading.errors import need

from .check import Findings

_SHEET = (8, 6)  # images across and down
_CELL, _TEXT = 160, 36


def findings_table(folder: Path, found: dict[str, Findings]) -> str:
    """Format findings as text: a column per split, then the records that the build rejected."""
    rows: list[list[str]] = [["", *found]]

    def row(name: str, cell: Callable[[Findings], str]) -> None:
        rows.append([name, *(cell(one) for one in found.values())])

    row("images", lambda f: f"{len(f.sizes):,}")
    row("captions", lambda f: f"{sum(f.captions):,}")
    row("captions per image", lambda f: _range(f.captions))
    row("words per caption", lambda f: _range(f.words))
    row("short side, pixels", lambda f: _range([min(size) for size in f.sizes]))
    row("long side, pixels", lambda f: _range([max(size) for size in f.sizes]))
    row("width over height", lambda f: _range([w / h for w, h in f.sizes], 2))
    row("file, kB", lambda f: _range([size / 1000 for size in f.image_bytes], 1))
    row("formats", lambda f: _shares(f.formats))
    if any(one.transparent for one in found.values()):
        row("transparent images", lambda f: f"{f.transparent:,}")
    row("scripts", lambda f: _shares(f.scripts))
    row("problems", lambda f: str(len(f.problems)))
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    rejected = read_description(folder).get("rejected", {})
    text += [f"rejected: {count:,} {reason}" for reason, count in sorted(rejected.items(), key=lambda item: -item[1])]
    return "\n".join(text)


def _range(values: Sequence[float], digits: int = 0) -> str:
    if not values:
        return "-"
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f}"


def _shares(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {100 * count / total:.0f}%" for name, count in counts.most_common(4)) or "-"


def contact_sheet(folder: Path, path: Path) -> Path:
    """Write a PNG of up to 48 images with their first captions below, spread evenly over all splits."""
    pil, draw = need("PIL.Image"), need("PIL.ImageDraw")
    splits = [open_dataset(folder, split) for split in read_description(folder)["splits"]]
    places = [(dataset, i) for dataset in splits for i in range(len(dataset))]
    across, down = _SHEET
    count = min(len(places), across * down)
    chosen = [places[i * len(places) // count] for i in range(count)]
    rows = -(-count // across)
    sheet = pil.new("RGB", (across * (_CELL + 8) + 8, rows * (_CELL + _TEXT + 8) + 8), "white")
    pen, decoder = draw.Draw(sheet), decoder_with_max_limit()
    for place, (dataset, i) in enumerate(chosen):
        x, y = 8 + place % across * (_CELL + 8), 8 + place // across * (_CELL + _TEXT + 8)
        (pixels,) = decoder([dataset.image_bytes(i)])
        if isinstance(pixels, str):
            pen.rectangle((x, y, x + _CELL, y + _CELL), outline="red")
            pen.text((x + 4, y + 4), pixels, fill="red")
        else:
            image = pil.fromarray(pixels)
            image.thumbnail((_CELL, _CELL))
            sheet.paste(image, (x + (_CELL - image.width) // 2, y + (_CELL - image.height) // 2))
        for line, words in enumerate(_lines(pen, dataset.captions(i)[0])):
            pen.text((x, y + _CELL + 2 + 12 * line), words, fill="black")
    sheet.save(path)
    return path


def _lines(pen: Any, caption: str) -> list[str]:
    """Break a caption into at most three lines that fit below an image."""
    lines = [""]
    for word in caption[:200].split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) <= _CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 3:
        lines[2:] = [lines[2] + " ..."]
    return [line if pen.textlength(line) <= _CELL else line[:20] + " ..." for line in lines]
