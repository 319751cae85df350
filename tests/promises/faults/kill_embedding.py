"""Embeddings that are killed and made again, and made by two ranks: the files must equal those of one process.

    python tests/promises/faults/kill_embedding.py [--kills 20]

One process imports everything and forks those that embed, because an import takes longer than a trial. Prints a line
for each part. The exit code is 1 if files differ.
"""

import random
import sys
import time
from pathlib import Path

import torch

import mvlm.search.embed as embedding
from mvlm.distributed.world import World, join_ranks
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm_dataloading import open_dataset, tokenizer_for

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from support.faults.forks import ended_well, in_child, in_ranks, killed
from support.faults.kill_command import run_kills
from support.folders import folder_hash
from support.models import micro_model
from support.scenes import write_scenes


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in folder_hash(folder).items()}


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` processes that embed. Returns the difference from undisturbed work, or None."""
    embedding.PART = 8
    data = write_scenes(folder / "data", {"train": 48, "test": 16})
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)

    def write(out: Path, world: World) -> None:
        model = TrainedModel(micro_model(dtype=torch.float32), tokenizer, "fp32")
        embed(model, open_collection(data, ["train", "test"]), out, world)

    alone = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    begun = time.perf_counter()
    if not ended_well(in_child(lambda: write(folder / "undisturbed", alone))):
        return "the undisturbed process failed"
    seconds = time.perf_counter() - begun
    wanted = contents(folder / "undisturbed")
    kills_done = finished = unfinished = 0
    while kills_done < kills:
        out = folder / f"killed-{finished}"
        while kills_done < kills:
            if not killed(in_child(lambda out=out: write(out, alone)), seconds, rng):
                break  # it ended before it was to be killed
            kills_done += 1
            unfinished += not (out / "embedding.json").exists()
        if not ended_well(in_child(lambda out=out: write(out, alone))):
            return f"{out.name}: the last process failed"
        if contents(out) != wanted:
            return f"{out.name}: files differ from those of an undisturbed process"
        finished += 1
    print(f"{kills_done} kills over {finished} embeddings, {unfinished} of them before the end: the same files")
    pids = in_ranks(lambda: write(folder / "two", join_ranks("cpu")), 2)
    ended = [ended_well(pid) for pid in pids]
    if not all(ended):
        return "a rank failed"
    if contents(folder / "two") != wanted:
        return "two ranks write other files than one process"
    print("2 ranks: the same files")
    return None


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(run_kills(run_trials, __doc__, "processes to kill", 20))
