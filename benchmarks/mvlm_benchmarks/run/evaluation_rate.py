"""Pairs that re-ranking judges in a second, against the plain network on padded captions, as evaluation once did.

    python -m mvlm_benchmarks.run.evaluation_rate RUN DATA [--split test] [--made-up 1000 5] [--json FILE]

Both rank for all images and all captions of a split. The plain one judges every candidate of every query. Ours judges a
pair once, and leaves out queries without a right candidate. Turns of both alternate in one process. A turn is 2,048
pairs.
With --made-up the features are random: so many images, each with so many captions of 6 to 24 tokens.

Shape legend: I images, T captions, N patches, L tokens of the longest caption, C width, R pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.device import autocast
from mvlm.evaluation.features import EncodedSplit, encode_split
from mvlm.evaluation.retrieval import (
    BATCHES_PER_PART,
    DIRECTIONS,
    PAIRS_PER_BATCH,
    find_candidates,
    pairs_to_judge,
    score_pairs,
)
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.load import load_model
from mvlm_benchmarks.machine import describe
from mvlm_benchmarks.results import write_json
from mvlm_dataloading import open_dataset

PLAIN_BATCH = 256
"""Pairs of a batch of the plain network."""
TURN = BATCHES_PER_PART * PAIRS_PER_BATCH


class PlainJudge:
    """The plain network on pairs of padded features."""

    def __init__(self, model: TrainedModel, features: EncodedSplit) -> None:
        self._model, self._v = model, features.v
        lengths = features.starts.diff()
        self._key_mask = torch.arange(int(lengths.max())) < lengths[:, None]  # (T, L), True = a token
        self._w = features.w.new_zeros(*self._key_mask.shape, features.w.shape[1])
        self._w[self._key_mask] = features.w

    @torch.no_grad()
    def log_odds(self, pairs: Tensor) -> Tensor:
        """ITM's log-odds (R,) of pairs int64 (R,): image x number of captions + caption."""
        found = []
        for batch in pairs.split(PLAIN_BATCH):
            images, texts = batch // len(self._w), batch % len(self._w)
            key_mask = self._key_mask[texts]
            length = int(key_mask.sum(1).max())
            with autocast(self._model.device, self._model.precision):
                w = self._w[texts][:, :length]
                found.append(self._model.network.match(self._v[images], w, key_mask[:, :length]).float())
        logits = torch.cat(found)
        return logits[:, 1] - logits[:, 0]


def made_up(model: TrainedModel, images: int, captions: int) -> EncodedSplit:
    """Random features. The embedding of a caption is that of its image and as much noise."""
    config, generator = model.network.config, torch.Generator().manual_seed(0)
    owner = torch.arange(images).repeat_interleave(captions)
    lengths = torch.randint(6, config.text_length + 1, (len(owner),), generator=generator)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    image = F.normalize(torch.randn(images, config.itc_width, generator=generator), dim=-1)
    noise = F.normalize(torch.randn(len(owner), config.itc_width, generator=generator), dim=-1)
    return EncodedSplit(
        v=torch.randn(images, 1 + config.num_patches, config.width, generator=generator),
        w=torch.randn(int(starts[-1]), config.width, generator=generator),
        starts=starts,
        image_embedding=image,
        text_embedding=F.normalize(image[owner] + noise, dim=-1),
        image=torch.arange(images),
        owner=owner,
        first=torch.arange(images) * captions,
        captions=[str(i) for i in range(len(owner))],
    )


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(model: TrainedModel, features: EncodedSplit, k: int, rounds: int) -> dict[str, Any]:
    """Rates and ratios over `rounds` rounds, of which the first is not counted."""
    found = [find_candidates(features, direction, k, Workspace()) for direction in DIRECTIONS]
    asked = torch.cat([candidates.pairs(features).flatten() for candidates in found])
    judged = torch.cat([pairs_to_judge(candidates, features, answers=False) for candidates in found]).unique()
    plain, generator = PlainJudge(model, features), torch.Generator().manual_seed(0)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    difference = 0.0
    for _ in range(rounds + 1):
        one, other = (int(torch.randint(len(x) - TURN + 1, (), generator=generator)) for x in (asked, judged))
        mine = judged[other : other + TURN]
        times["plain"].append(timed(lambda one=one: plain.log_odds(asked[one : one + TURN])))
        times["ours"].append(
            timed(lambda mine=mine: score_pairs(model.network, features, mine, model.precision, Workspace()))
        )
        few = mine[:64]
        ours = score_pairs(model.network, features, few, model.precision, Workspace())
        difference = max(difference, float((ours - plain.log_odds(few)).abs().max()))
    share = len(asked) / len(judged)
    pairs = list(zip(times["plain"][1:], times["ours"][1:], strict=True))
    return {
        "images": len(features.v),
        "captions": len(features.captions),
        "candidates": k,
        "pairs_asked_for": len(asked),
        "different_pairs": len(asked.unique()),
        "judged_pairs": len(judged),
        "plain_pairs_per_cpu_s": round(TURN / statistics.median(plain[1] for plain, _ in pairs)),
        "pairs_per_cpu_s": round(share * TURN / statistics.median(ours[1] for _, ours in pairs)),
        "ratio_of_one_pair": round(statistics.median(a[1] / b[1] for a, b in pairs), 2),
        "cpu_ratio": round(share * statistics.median(a[1] / b[1] for a, b in pairs), 2),
        "wall_ratio": round(share * statistics.median(a[0] / b[0] for a, b in pairs), 2),
        "largest_difference": round(difference, 6),
    }


def main() -> None:
    """Measure and print the rates, and write them to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--made-up", type=int, nargs=2, metavar=("IMAGES", "CAPTIONS"))
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = load_model(options.run, "cpu", options.precision)
    if options.made_up:
        features = made_up(model, *options.made_up)
    else:
        split = open_dataset(options.data, options.split)
        features = encode_split(model.network, split, model.tokenizer, model.precision)
    found = measure(model, features, options.candidates, options.rounds)
    print(found)
    if options.json:
        write_json({"machine": describe("cpu", []), "precision": options.precision, **found}, options.json)


if __name__ == "__main__":
    main()
