"""A build whose decoder aborts its process on some images. test_build.py runs it.

    python tests/promises/faults/dying_decoder.py OUT [killed]

With `killed`, the process is killed instead, as by a machine without memory, the first four times.

Worker processes import this file, and thereby replace the decoder too.
"""

import io
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from mvlm_dataloading.build import piece, workers
from mvlm_dataloading.build.build import build_shards
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import ListedPiece, Record, Source

DEADLY = b"deadly"


class ImageDecoder(piece.ImageDecoder):
    def __call__(self, images):
        if any(image.endswith(DEADLY) for image in images):
            if sys.argv[2:] != ["killed"]:
                os.abort()
            deaths = Path(f"{sys.argv[1]}.deaths")
            times = len(deaths.read_text()) if deaths.exists() else 0
            if times < 4:
                deaths.write_text("x" * (times + 1))
                os.kill(os.getpid(), signal.SIGKILL)
        yield from super().__call__(images)


def image(i: int) -> bytes:
    file = io.BytesIO()
    small = np.random.default_rng(i).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize((40, 30), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue() + (DEADLY if i in (3, 10) else b"")


piece.ImageDecoder = ImageDecoder

if __name__ == "__main__":
    pieces = [
        ListedPiece("train", [Record(f"k{i:02d}", image(i), ["words"], f"{i}.png") for i in range(begin, begin + 6)])
        for begin in (0, 6)
    ]
    if sys.argv[2:] != ["killed"]:
        again = [Record(f"k03-{n}", image(3), ["another question"], "3.png") for n in range(3)]
        pieces[0] = ListedPiece("train", [*pieces[0].listed[:4], *again, *pieces[0].listed[4:]])
        workers.MAX_CRASHES = 2  # one with all images of the group, one with the deadly image alone
    build_shards(Source("deadly", "", "", {}, pieces), Path(sys.argv[1]), BuildOptions(), workers=1)
