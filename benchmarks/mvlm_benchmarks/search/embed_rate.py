"""Rate of `mvlm embed` beside the forward alone: `python -m mvlm_benchmarks.search.embed_rate RUN DATA --json FILE`.

The forward encodes the same images and captions, which lie in memory, decoded and tokenized. Both run in turns
in one process. `cpu_ratio` is the forward's processor time over that of embedding, `wall_ratio` the same of the
clock: 1 means that reading, decoding, tokenizing and writing cost nothing.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from mvlm.device import autocast
from mvlm.distributed.world import World
from mvlm.inference.encode import BATCH, eval_loader, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.fast import encode_tokens
from mvlm.runs.load import load_model
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm_benchmarks.machine import describe
from mvlm_benchmarks.results import write_json
from mvlm_dataloading import open_dataset


def forward_alone(model: TrainedModel, data: Path, split: str) -> Callable[[], None]:
    """A function that encodes all images and captions of a split, from memory."""
    dataset = open_dataset(data, split)
    pixels = [batch.images for batch, _ in eval_loader(dataset, model.network, model.tokenizer)]
    captions = [caption for i in range(len(dataset)) for caption in dataset.captions(i)]
    length, texts = model.network.config.text_length, []
    for start in range(0, len(captions), BATCH):
        tokens, lengths = model.tokenizer.encode(captions[start : start + BATCH], length)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.from_numpy(lengths).cumsum(0)]).int()
        texts.append((torch.from_numpy(tokens), starts, int(lengths.max())))

    @torch.no_grad()
    def work() -> None:
        with autocast(model.device, model.precision):
            for batch in pixels:
                image_features(model.network, batch, model.precision)
            for packed in texts:
                model.network.embed_text(encode_tokens(model.network, *packed).first())

    return work


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds by the clock and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(run: Path, data: Path, split: str, rounds: int) -> dict[str, Any]:
    """Ratios and rates over `rounds` rounds, of which the first is not counted."""
    model = load_model(run, "cpu")
    collection = open_collection(data, [split])
    forward = forward_alone(model, data, split)
    alone = World(rank=0, size=1, local_rank=0, device=model.device)
    alone_times, ours, memory = [], [], []
    for _ in range(rounds + 1):
        alone_times.append(timed(forward))
        with tempfile.TemporaryDirectory() as out, redirect_stdout(StringIO()):
            ours.append(timed(lambda out=out: embed(model, collection, Path(out) / "out", alone)))
        memory.append(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
    pairs = list(zip(alone_times[1:], ours[1:], strict=True))
    return {
        "machine": describe("cpu", ["nvidia-dali-cuda130", "pyarrow"]),
        "split": split,
        "images": len(collection),
        "rounds": rounds,
        "cpu_ratio": round(statistics.median(a[1] / b[1] for a, b in pairs), 3),
        "wall_ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
        "images_per_cpu_s": round(len(collection) / statistics.median(b[1] for _, b in pairs), 1),
        "images_per_s": round(len(collection) / statistics.median(b[0] for _, b in pairs), 1),
        "peak_mib_by_round": memory,
    }


def main() -> None:
    """Measure and print the ratios, and write them to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.run, options.data, options.split, options.rounds)
    print({name: value for name, value in found.items() if name != "machine"})
    if options.json:
        write_json(found, options.json)


if __name__ == "__main__":
    main()
