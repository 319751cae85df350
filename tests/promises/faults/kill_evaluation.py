"""Evaluations that are killed and made again, and shared by ranks: the figures must equal those of one process.

    python tests/promises/faults/kill_evaluation.py [--kills 10]

One process imports everything and forks those that evaluate. Every third evaluation is shared by two ranks, which are
killed together. Of two more, one rank is killed, and the other has to end by itself. Prints a line for
each part. The exit code is 1 if figures differ.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mvlm.runs.load  # noqa: F401 a command imports it when it runs: here once, in place of every fork
from mvlm.commands.evaluate import eval_retrieval
from mvlm.evaluation import retrieval
from mvlm_dataloading import open_dataset, tokenizer_for

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from support.faults.forks import ended_well, in_child, in_ranks, killed
from support.faults.kill_command import run_kills
from support.models import micro_model
from support.scenes import write_scenes


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` evaluations. Returns the difference from an undisturbed one, or None."""
    retrieval.PAIRS_PER_BATCH = 64  # more parts for the few pairs
    data = write_scenes(folder / "data", {"train": 32, "test": 96})
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)
    micro_model(dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save(folder / "model" / "tokenizer.json")

    def start(name: str, ranks: int = 1) -> list[int]:
        """Start or continue the evaluation of this name, one process a rank. Returns their ids."""

        def work() -> None:
            eval_retrieval(
                checkpoint=folder / "model", data=data, out=folder / f"{name}.json", rerank=8, device="cpu"
            )  # fmt: skip

        return [in_child(work)] if ranks == 1 else in_ranks(work, ranks)

    def parts(name: str) -> Path:
        """Folder of an unfinished evaluation."""
        return folder / f"{name}.json.parts"

    def finish(name: str, ranks: int = 1) -> dict[str, Any]:
        """Figures of an evaluation, without the seconds and the machine, which names the number of ranks."""
        ended = [ended_well(pid) for pid in start(name, ranks)]
        assert all(ended), f"{name}: a process failed"
        assert not parts(name).exists(), f"{name}: its parts were not removed"
        found = json.loads((folder / f"{name}.json").read_text())
        return {name: value for name, value in found.items() if name not in ("seconds", "machine")}

    begun = time.perf_counter()
    wanted = finish("undisturbed")
    seconds = time.perf_counter() - begun
    done = evaluations = continued = 0
    while done < kills:
        name, ranks = f"killed-{evaluations}", 2 if evaluations % 3 == 2 else 1
        for _ in range(rng.randint(1, 3)):
            first, *others = start(name, ranks)
            at_once = [killed(first, seconds, rng), *(killed(pid, 0, rng) for pid in others)]
            done += any(at_once)
            continued += any(marks.read_bytes().strip(b"\0") for marks in parts(name).glob("*.finished"))
        if finish(name, ranks) != wanted:
            return f"{name}: other figures than those of an undisturbed evaluation"
        evaluations += 1
    print(f"{done} kills over {evaluations} evaluations, {continued} of which left finished parts: the same figures")
    for rank in (0, 1):
        name = f"without-{rank}"
        pids = start(name, 2)
        while not parts(name).exists():  # the ranks have met: one would wait long for another that was killed before
            time.sleep(0.01)
        os.kill(pids[rank], signal.SIGKILL)
        ended = [ended_well(pid) for pid in pids]
        if any(ended):
            return f"{name}: ended well without its other rank"
        if finish(name, 2) != wanted:
            return f"{name}: other figures than those of an undisturbed evaluation"
    print("one of two ranks killed: the other ends, and a new start finds the same figures")
    for ranks in (2, 4):
        if finish(f"ranks-{ranks}", ranks) != wanted:
            return f"{ranks} ranks: other figures than those of one process"
    print("2 and 4 ranks: the same figures")
    return None


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(run_kills(run_trials, __doc__, "evaluations to kill", 10))
