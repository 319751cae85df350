"""Samples a second that `mvlm data link` scans on one core, from tars of small samples on a disk.

    python -m mvlm_benchmarks.data.link [--tars 4] [--samples 10000] [--rounds 7] [--json FILE]

The tars are webdataset's, of JPEGs of 64 x 64 pixels with a caption each, as text or in JSON beside further fields. A
round links all tars of either kind by one process. Its seconds are those of a clock and of the processor: on a busy
machine the second tell what a core does.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_dataloading.dataset.sample_index import index_path
from mvlm_dataloading.files import write_json
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.tools.link import LinkOptions, link_files

CAPTIONS = {"txt": "txt", "json": "json:caption"}
"""Kind of tar -> its captions, as `--caption` names them."""
_IMAGES = 64


def images() -> list[bytes]:
    """JPEGs of waves in colours, and of some noise, which no two have alike."""
    from PIL import Image

    found, (y, x) = [], np.mgrid[:64, :64] / 64
    for number in range(_IMAGES):
        rng, content = np.random.default_rng(number), io.BytesIO()
        waves = np.sin(np.stack([x, y, x + y], 2) * rng.uniform(3, 30, 3) + rng.uniform(0, 6, 3))
        pixels = 128 + 90 * waves + rng.normal(0, 4, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(content, "JPEG")
        found.append(content.getvalue())
    return found


def write_tars(folder: Path, kind: str, tars: int, samples: int) -> list[Path]:
    """Write `tars` tars of `samples` samples each, with captions in a text or in JSON."""
    try:
        writer: Any = import_module("webdataset").TarWriter
    except ImportError:
        raise ConfigError("link: wanted webdataset, which is not installed; pip install 'mvlm[bench]'") from None
    known, paths = images(), []
    folder.mkdir(parents=True)
    for tar in range(tars):
        paths.append(folder / f"{tar:05d}.tar")
        with writer(str(paths[-1])) as open_tar:
            for number in range(tar * samples, (tar + 1) * samples):
                caption: Any = f"waves number {number} in three colours, with some noise"
                if kind == "json":
                    caption = {"url": f"https://example.org/{number}.jpg", "caption": caption, "width": 64}
                open_tar.write({"__key__": f"{number:09d}", "jpg": known[number % _IMAGES], kind: caption})
    return paths


def scan(paths: list[Path], kind: str, out: Path) -> tuple[float, float]:
    """Link tars in this process. Returns seconds, and seconds of the processor."""
    options = LinkOptions(parse_captions_option(CAPTIONS[kind]))
    began, busy = time.perf_counter(), time.process_time()
    link_files(list(map(str, paths)), out, options, workers=0)
    return time.perf_counter() - began, time.process_time() - busy


def measure(work: Path, tars: int, samples: int, rounds: int) -> list[dict[str, Any]]:
    """A row of figures of each kind of tar. The first pass over the tars, which does not count, warms the disk."""
    paths = {kind: write_tars(work / kind, kind, tars, samples) for kind in CAPTIONS}
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in CAPTIONS}
    for number in range(rounds + 1):
        for kind in CAPTIONS:
            seconds[kind].append(scan(paths[kind], kind, work / f"{kind}-{number}"))
    rows, total = [], tars * samples
    for kind in CAPTIONS:
        walls, busy = ([total / one[k] for one in seconds[kind][1:]] for k in range(2))
        size = index_path(work / f"{kind}-0", "train").stat().st_size
        rows.append({
            "captions": kind, "samples": total, "bytes_per_sample": sum(p.stat().st_size for p in paths[kind]) // total,
            "index_bytes_per_sample": round(size / total, 1),
            "samples_per_processor_s": round(statistics.median(busy)),
            "samples_per_processor_s_of_rounds": [round(one) for one in busy],
            "samples_per_s": round(statistics.median(walls)),
            "samples_per_s_of_rounds": [round(one) for one in walls],
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("tars", 4), ("samples", 10_000), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-link-") as work:
        rows = measure(Path(work), given.tars, given.samples, given.rounds)
    found = {"rows": rows, "machine": machine.describe("cpu", ["webdataset"])}
    print(json.dumps(found, indent=1))
    if given.json is not None:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
