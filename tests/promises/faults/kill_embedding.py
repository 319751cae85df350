"""Embeddings that are killed and made again, and made by two ranks: the files must equal those of one process.

    python tests/promises/faults/kill_embedding.py [--kills 20]

One process imports everything and forks those that embed, because an import takes longer than a trial. Prints a line
for each part. The exit code is 1 if files differ.
"""

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch

import mvlm.search.embed as embedding
from mvlm.distributed.world import World, join_ranks
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm_dataloading import open_dataset, tokenizer_for

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.folders import folder_hash
from support.models import micro_model
from support.scenes import write_scenes


def in_child(work: Callable[[], None]) -> int:
    """Fork a process that calls `work` and ends. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended_well(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def contents(folder: Path) -> dict[str, str]:
    return {name: digest for name, (digest, _) in folder_hash(folder).items()}


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` processes that embed. Returns the difference from undisturbed work, or None."""
    embedding.PART = 8
    data = write_scenes(folder / "data", {"train": 96, "test": 32})
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
    killed = finished = unfinished = 0
    while killed < kills:
        out = folder / f"killed-{finished}"
        while killed < kills:
            pid = in_child(lambda out=out: write(out, alone))
            time.sleep(rng.uniform(0, seconds))
            if os.waitpid(pid, os.WNOHANG)[0] != 0:
                break  # it ended before it was to be killed
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            killed += 1
            unfinished += not (out / "embedding.json").exists()
        if not ended_well(in_child(lambda out=out: write(out, alone))):
            return f"{out.name}: the last process failed"
        if contents(out) != wanted:
            return f"{out.name}: files differ from those of an undisturbed process"
        finished += 1
    print(f"{killed} kills over {finished} embeddings, {unfinished} of them before the end: the same files")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}

    def write_as_rank(rank: int) -> None:
        os.environ["RANK"] = str(rank)
        write(folder / "two", join_ranks("cpu"))

    pids = [in_child(lambda rank=rank: write_as_rank(rank)) for rank in range(2)]
    ended = [ended_well(pid) for pid in pids]
    if not all(ended):
        return "a rank failed"
    if contents(folder / "two") != wanted:
        return "two ranks write other files than one process"
    print("2 ranks: the same files")
    return None


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="processes to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fault = run_trials(Path(folder), arguments.kills, random.Random(arguments.seed))
    if fault is not None:
        print(fault)
    return int(fault is not None)


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(main())
