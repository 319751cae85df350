"""Images of classes on a disk, in ImageNet's layout."""

import tarfile
from pathlib import Path

import numpy as np

from .scenes import COLOURS, png


def write_classes(folder: Path, names: dict[str, str] | None = None, each: int = 3) -> Path:
    """Images of one colour each, in a folder for each colour; `names` are the folders' names."""
    for colour, rgb in COLOURS.items():
        place = folder / (names or {}).get(colour, colour)
        place.mkdir(parents=True)
        for i in range(each):
            pixels = np.full((32 + i, 40, 3), rgb, np.uint8)
            pixels[: 4 * (i + 1)] = 255
            (place / f"{colour}_{i}.{('png', 'PNG')[i % 2]}").write_bytes(png(pixels))
    return folder


def as_tar(folder: Path, tar: Path) -> Path:
    """A folder as a tar, whose paths begin with its name."""
    with tarfile.open(tar, "w") as file:
        file.add(folder, folder.name)
    return tar
