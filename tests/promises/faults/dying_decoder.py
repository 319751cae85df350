"""A decoder that kills its process on some pictures, and what becomes of the data set: called by test_build.py.

    python tests/promises/faults/dying_decoder.py OUT

Processes that are started from here import this file again, and get the deadly decoder by it.
"""

import io
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import mvlm_dataloading.build.piece as writing
from mvlm_dataloading.build.build import build_shards
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import ListedPiece, Record, Source

DEADLY = b"deadly"


class ImageDecoder(writing.ImageDecoder):
    def __call__(self, images):
        if any(image.endswith(DEADLY) for image in images):
            os.abort()
        yield from super().__call__(images)


def picture(i: int) -> bytes:
    file = io.BytesIO()
    small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue() + (DEADLY if i in (3, 10) else b"")


writing.ImageDecoder = ImageDecoder

if __name__ == "__main__":
    pieces = [
        ListedPiece("train", [Record(f"k{i:02d}", picture(i), ["words"], f"{i}.png") for i in range(begin, begin + 6)])
        for begin in (0, 6)
    ]
    build_shards(Source("deadly", "", "", {}, pieces), Path(sys.argv[1]), BuildOptions(), workers=2)
