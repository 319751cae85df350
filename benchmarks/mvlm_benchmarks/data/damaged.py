"""Time that images cost the loader which only decoding shows to be damaged: a first epoch with some, and one without.

    python -m mvlm_benchmarks.data.damaged [--tars 20] [--samples 50] [--every 100] [--rounds 5]

The images are JPEGs, and some PNGs with zeros among their pixels, or the same PNGs whole. Both data sets are linked.
A round reads an epoch of each, in turn, by a new loader; its first batch does not count.
"""

import argparse
import io
import itertools
import json
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

from mvlm_benchmarks import machine
from mvlm_dataloading import Dataset, Loader, open_dataset, train_tokenizer
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.tools.link import LinkOptions, link_files

from .remote import BATCH, write_tars


def as_png(image: bytes, damaged: bool) -> bytes:
    """An image as a PNG, whole or with zeros among its packed pixels, and a checksum that fits."""
    from PIL import Image

    content = io.BytesIO()
    Image.open(io.BytesIO(image)).save(content, "PNG", compress_level=1)
    png = content.getvalue()
    if not damaged:
        return png
    at = png.index(b"IDAT")
    end = at + 4 + int.from_bytes(png[at - 4 : at], "big")
    middle = (at + end) // 2
    packed = png[at:middle] + bytes(99) + png[middle + 99 : end]
    return png[:at] + packed + zlib.crc32(packed).to_bytes(4, "big") + png[end + 4 :]


def epoch_s(dataset: Dataset) -> tuple[float, int]:
    """Seconds of an epoch but for its first batch, and the number of damaged images found."""
    tokenizer = train_tokenizer(["image 0123456789 shows a part of the photograph, with other colours"], 300)
    loader = Loader(dataset, tokenizer, batch_size=BATCH, image_size=224, text_length=24, seed=0)
    batches = itertools.islice(loader, len(dataset) // BATCH)
    next(batches)
    began = time.perf_counter()
    for _ in batches:
        pass
    spent = time.perf_counter() - began
    loader.close()
    return spent, loader.skipped


def measure(work: Path, tars: int, samples: int, every: int, rounds: int) -> dict[str, Any]:
    """Seconds of epochs, and milliseconds of a damaged image. `every`: one image of so many is damaged."""
    opened = {}
    for damaged in (False, True):
        folder = work / ("damaged" if damaged else "whole")
        folder.mkdir()
        paths = write_tars(folder, tars, samples, lambda i, image: as_png(image, damaged) if i % every == 0 else image)  # noqa: B023
        link_files(list(map(str, paths)), folder / "linked", LinkOptions(parse_captions_option("txt")), workers=0)
        opened[damaged] = open_dataset(folder / "linked", "train")
    times, found = {False: list[float](), True: list[float]()}, 0
    for number in range(rounds):
        for damaged in (False, True) if number % 2 else (True, False):
            spent, skipped = epoch_s(opened[damaged])
            times[damaged].append(spent)
            found = max(found, skipped)
    each = [1e3 * (with_some - without) / found for with_some, without in zip(times[True], times[False], strict=True)]
    batch_ms = 1e3 * statistics.median(times[False]) / (tars * samples // BATCH - 1)
    return {
        "images": tars * samples, "damaged": found, "batch_ms": round(batch_ms, 1),
        "damaged_ms": round(statistics.median(each), 1), "damaged_ms_of_rounds": [round(one, 1) for one in each],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("tars", 20), ("samples", 50), ("every", 100), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    given = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="mvlm-damaged-") as work:
        print(json.dumps(measure(Path(work), **given) | {"machine": machine.describe("cpu", [])}, indent=1))


if __name__ == "__main__":
    main()
