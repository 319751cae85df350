"""Opening, order and first batch of a link of very many samples.

    python -m mvlm_benchmarks.data.large_index [--samples 100000000] [--json FILE]

A link is written as `mvlm data link` writes it, of shards of 10,000 samples that are all one small tar with 50 images,
so that only the index takes room. Another process opens it, takes a batch, and looks up a million places of the order.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_benchmarks import machine
from mvlm_dataloading import Loader, open_dataset, train_tokenizer
from mvlm_dataloading.dataset.description import add_shard, write_description
from mvlm_dataloading.dataset.sample_index import IndexWriter, index_path, map_index
from mvlm_dataloading.files import write_json
from mvlm_dataloading.links.captions import parse_captions_option
from mvlm_dataloading.links.store import RangeStore
from mvlm_dataloading.loader.lanes import LaneOrder, choose_lanes
from mvlm_dataloading.tools.link import LinkOptions, link_files

from .remote import write_tars

SHARD = 10_000
BATCH = 64


def write_link(folder: Path, samples: int) -> Path:
    """Write the link. Returns its folder."""
    (folder / "tars").mkdir()
    (tar,) = write_tars(folder / "tars", 1, 50)
    options = LinkOptions(parse_captions_option("txt"))
    link_files([str(tar)], folder / "one", options, workers=0)
    one = json.loads((folder / "one" / "dataset.json").read_text())
    records, keys = map_index(index_path(folder / "one", "train")).shard_content(0)
    records, keys = np.tile(records, (SHARD // 50, 1)), keys * (SHARD // 50)
    records[:, -1] = 9 * np.arange(1, SHARD + 1)  # keys of nine digits
    os.truncate(tar, SHARD // 50 * tar.stat().st_size)  # as if it had so many samples, as a sparse file
    store = RangeStore(1)
    linked, splits = store.stat(tar), dict[str, dict[str, Any]]()
    store.close()
    shard = one["splits"]["train"]["shards"][0] | {"samples": SHARD, "bytes": linked.size, "etag": linked.etag}
    for _ in range(samples // SHARD):
        add_shard(splits, "train", dict(shard), SHARD)
    out = folder / "linked"
    out.mkdir()
    about: dict[str, str] = dict.fromkeys(("name", "source", "licence", "attribution"), "")
    write_description(out, about, {}, splits, {}, captions=one["captions"])
    with index_path(out, "train").open("w+b") as file:
        shards = splits["train"]["shards"]
        writer = IndexWriter(file, "train", shards, columns=records.shape[1], captions=one["captions"])
        for _ in shards:
            writer.add(records, keys)
        writer.finish()
    return out


def measure(folder: Path) -> dict[str, Any]:
    """Figures of this process, which has opened nothing yet."""
    tokenizer = train_tokenizer(["image 0123456789 shows a part of the photograph"], 300)
    before, began = _anonymous_mb(), time.perf_counter()
    dataset = open_dataset(folder, "train")
    opened, memory = time.perf_counter() - began, _anonymous_mb() - before
    loader = Loader(dataset, tokenizer, batch_size=BATCH, image_size=224, text_length=24, seed=0)
    next(iter(loader))
    first = time.perf_counter() - began
    loader.close()
    lanes = choose_lanes(dataset, 1, BATCH, 1)
    assert lanes is not None
    began = time.perf_counter()
    order = LaneOrder(dataset.shard_sizes, 0, lanes)
    for start in range(0, 1_000_000, 10_000):
        order.at(start + np.arange(10_000))
    spent = time.perf_counter() - began
    size = index_path(folder, "train").stat().st_size
    return {
        "samples": len(dataset), "index_bytes_per_sample": round(size / len(dataset), 1), "open_s": round(opened, 2),
        "open_MB": round(memory), "first_batch_s": round(first, 2), "order_s_of_a_million": round(spent, 2),
        "most_MB": round(_anonymous_mb() - before),
    }  # fmt: skip


def _anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--opened", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.opened is not None:
        print(json.dumps(measure(given.opened)))
        return
    with tempfile.TemporaryDirectory(prefix="mvlm-index-") as work:
        folder = write_link(Path(work), given.samples)
        command = [sys.executable, "-m", "mvlm_benchmarks.data.large_index", "--opened", str(folder)]
        environment = os.environ | {"MVLM_CACHE": str(Path(work, "cache"))}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1]) | {"machine": machine.describe("cpu", [])}
    print(json.dumps(found, indent=1))
    if given.json is not None:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
