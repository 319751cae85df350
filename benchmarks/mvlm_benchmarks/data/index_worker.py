"""One rank of `index_scale`: opens a data set and answers one command per line. Runs with older versions of ours too.

Commands, each answered by a line of JSON with `s`, the seconds that it took:

    open            open the data set
    batch           make the loader and get the first batch
    jump FRACTION   continue at this fraction of an epoch, and get two batches
    order           order the first samples, up to a million: `crc` of their ids, and statistics of how shards are mixed
    walk K          order the K-th tenth of an epoch, and look up each sample's image in the index
"""

import json
import sys
import time
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

SLICE = 16384
"""Samples that are ordered together, as many as in a segment of a rank."""


class Rank:
    """The rank's data set and loader."""

    def __init__(self, folder: Path, rank: int, ranks: int, shard_samples: int):
        from importlib import import_module

        import_module("nvidia.dali.fn")
        import_module("torch")
        from mvlm_dataloading import train_tokenizer

        self.folder, self.rank, self.ranks, self.shard_samples = folder, rank, ranks, shard_samples
        self.tokenizer = train_tokenizer(["a caption of sample 1"], 300)

    def open(self) -> dict[str, Any]:
        from mvlm_dataloading import open_dataset

        self.dataset: Any = open_dataset(self.folder, "train")
        return {"samples": len(self.dataset)}

    def batch(self) -> dict[str, Any]:
        from mvlm_dataloading import Loader

        self.loader = Loader(
            self.dataset, self.tokenizer, batch_size=64 * self.ranks, image_size=64, text_length=16, seed=0,
            rank=self.rank, world_size=self.ranks, num_threads=1,
        )  # fmt: skip
        next(iter(self.loader))
        return {}

    def jump(self, fraction: str) -> dict[str, Any]:
        state = self.loader.state_dict()
        self.loader.load_state_dict(state | {"position": int(float(fraction) * len(self.dataset))})
        list(islice(self.loader, 2))
        return {}

    def order(self) -> dict[str, Any]:
        count = min(len(self.dataset), 10**6)
        ids = self._order()(0, count)[0]
        shard = ids[: count // 256 * 256] // self.shard_samples
        batches = np.sort(shard.reshape(-1, 256), axis=1)
        return {
            "crc": zlib.crc32(ids.astype("<i8").tobytes()),
            "shards_in_a_batch": round(float((np.diff(batches, axis=1) != 0).sum(axis=1).mean() + 1), 3),
            "run": round(len(shard) / (1 + np.count_nonzero(np.diff(shard))), 3),
        }

    def walk(self, tenth: str) -> dict[str, Any]:
        size = len(self.dataset)
        begin, end = (size * (int(tenth) + k) // 10 for k in (0, 1))
        if tenth == "0":
            self.walked = self._order()
            self.total = 0
        for at in range(begin, end, SLICE):
            ids, _ = self.walked(at, min(SLICE, end - at))
            self.total += int(ids.sum())
            if hasattr(self.dataset, "locate"):
                self.dataset.locate("image", ids)
                self.dataset.index.release()
        return {"sum_is_right": self.total == size * (size - 1) // 2} if tenth == "9" else {}

    def _order(self) -> Any:
        from mvlm_dataloading.loader.sampler import SampleOrder

        before = hasattr(self.dataset, "shard")
        return SampleOrder(self.dataset.shard if before else self.dataset.shard_sizes, 0, shuffle=True)


def main() -> None:
    folder, *numbers = sys.argv[1:]
    rank = Rank(Path(folder), *map(int, numbers))
    print("{}", flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        started = time.perf_counter()
        answer = getattr(rank, command)(*arguments)
        print(json.dumps(answer | {"s": time.perf_counter() - started}), flush=True)


if __name__ == "__main__":
    main()
