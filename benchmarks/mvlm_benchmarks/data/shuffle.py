"""Quality of the loader's shuffles beside a full permutation of the split.

    python -m mvlm_benchmarks.data.shuffle [--shards 1200] [--samples 10000] [--batches 300] [--json FILE]

Neighbours in a data set may be alike: pages of one site, frames of one film. If all samples of a group of neighbours
are equal, and groups are independent, the mean over a batch of B samples with n_g of group g has the variance
sum (n_g / B)^2, in units of one sample's. A batch is then worth B^2 / sum n_g^2 independent samples. This is counted
for groups of whole shards and of 64 neighbours, in batches of each order at equal distances in an epoch.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.files import write_json
from mvlm_dataloading.loader.lanes import LaneOrder, Lanes
from mvlm_dataloading.loader.sampler import SampleOrder

NEIGHBOURS = 64
BATCHES = (512, 4096, 32768)
LANES, BLOCK = 64, 57
"""The default number of lanes, and the samples of a block of 2 MB if one takes 35 kB."""


def independent_samples(ids: Int64, group: int) -> float:
    """Number of independent samples that a batch of ids is worth, if each `group` neighbours are equal."""
    _, counts = np.unique(ids // group, return_counts=True)
    return len(ids) ** 2 / float((counts**2).sum())


def rows(shards: int, samples: int, batches: int) -> Iterator[dict[str, Any]]:
    """Measure how well each order of samples shuffles: a row of the table for every order and batch size.

    Args:
        shards: number of shards of the simulated split.
        samples: samples in each shard.
        batches: batches that are looked at.
    """
    sizes = np.full(shards, samples)
    whole = np.random.default_rng(0).permutation(shards * samples)
    for batch in BATCHES:
        lanes = Lanes(LANES, batch // LANES, BLOCK)
        orders: dict[str, Callable[[Int64], tuple[Int64, Int64]]] = {
            "order 1": SampleOrder(sizes, 0, shuffle=True).at,
            "order 2": LaneOrder(sizes, 0, lanes).at,
            "full permutation": lambda at: (whole[at], at),
        }
        count = min(batches, len(whole) // batch)
        starts = [k * (len(whole) // batch) // count * batch for k in range(count)]
        for name, order in orders.items():
            found = [order(begin + np.arange(batch))[0] for begin in starts]
            worth = {
                group: round(float(np.mean([independent_samples(ids, size) for ids in found])))
                for group, size in {"shard": samples, "neighbours": NEIGHBOURS}.items()
            }
            yield {"batch": batch, "order": name, **worth}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, value in (("shards", 1200), ("samples", 10000), ("batches", 300)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = []
    print(f"{'batch':>6} {'order':18} {'if shards are alike':>20} {f'if {NEIGHBOURS} neighbours are':>22}")
    for row in rows(given.shards, given.samples, given.batches):
        print(f"{row['batch']:6} {row['order']:18} {row['shard']:20} {row['neighbours']:22}", flush=True)
        found.append(row)
    if given.json is not None:
        write_json(given.json, {"shards": given.shards, "samples": given.samples, "rows": found})


if __name__ == "__main__":
    main()
