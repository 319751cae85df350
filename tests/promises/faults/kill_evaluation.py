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

from support.faults.forks import ended_well, in_child, in_ranks
from support.faults.kill_command import run_kills
from support.models import micro_model
from support.scenes import write_scenes


class Evaluation:
    """One evaluation of a made-up model, which may be shared by ranks."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._out = folder, folder / f"{name}.json"

    def start(self, ranks: int) -> list[int]:
        """Ids of the processes."""

        def work() -> None:
            torch.set_num_threads(1)
            eval_retrieval(
                checkpoint=self._folder / "model", data=self._folder / "data", out=self._out, rerank=8, device="cpu"
            )

        return [in_child(work)] if ranks == 1 else in_ranks(work, ranks)

    def finish(self, ranks: int) -> str | None:
        """Run it to its end. Returns what went wrong, or None."""
        ended = [ended_well(pid) for pid in self.start(ranks)]
        if not all(ended):
            return f"{self._out.name}: a process failed"
        if self.parts.exists():
            return f"{self.parts.name}: was not removed"
        return None

    def figures(self) -> dict[str, Any]:
        """The figures, without the seconds that they took and the machine, which names the number of ranks."""
        found = json.loads(self._out.read_text())
        return {name: value for name, value in found.items() if name not in ("seconds", "machine")}

    @property
    def parts(self) -> Path:
        """Folder of an unfinished evaluation."""
        return self._out.with_name(f"{self._out.name}.parts")


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` evaluations. Returns the difference from an undisturbed one, or None."""
    retrieval.PAIRS_PER_BATCH = 64  # more parts for the few pairs
    data = write_scenes(folder / "data", {"train": 32, "test": 96})
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)
    micro_model(dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save(folder / "model" / "tokenizer.json")
    undisturbed = Evaluation(folder, "undisturbed")
    begun = time.perf_counter()
    if fault := undisturbed.finish(1):
        return fault
    seconds, wanted = time.perf_counter() - begun, undisturbed.figures()
    done = evaluations = continued = 0
    while done < kills:
        evaluation, ranks = Evaluation(folder, f"killed-{evaluations}"), 2 if evaluations % 3 == 2 else 1
        for _ in range(rng.randint(1, 3)):
            pids = evaluation.start(ranks)
            time.sleep(rng.uniform(0, seconds))
            running = [pid for pid in pids if os.waitpid(pid, os.WNOHANG)[0] == 0]
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            done += bool(running)
            continued += any(marks.read_bytes().strip(b"\0") for marks in evaluation.parts.glob("*.finished"))
        if fault := evaluation.finish(ranks):
            return fault
        if evaluation.figures() != wanted:
            return f"killed-{evaluations}: other figures than those of an undisturbed evaluation"
        evaluations += 1
    print(f"{done} kills over {evaluations} evaluations, {continued} of which left finished parts: the same figures")
    for rank in (0, 1):
        bereaved = Evaluation(folder, f"without-{rank}")
        pids = bereaved.start(2)
        while not bereaved.parts.exists():  # the ranks have met: one would wait long for another that was killed before
            time.sleep(0.01)
        os.kill(pids[rank], signal.SIGKILL)
        if any(ended_well(pid) for pid in pids):
            return f"without-{rank}: ended well without its other rank"
        if fault := bereaved.finish(2):
            return fault
        if bereaved.figures() != wanted:
            return f"without-{rank}: other figures than those of an undisturbed evaluation"
    print("one of two ranks killed: the other ends, and a new start finds the same figures")
    for ranks in (2, 4):
        shared = Evaluation(folder, f"ranks-{ranks}")
        if fault := shared.finish(ranks):
            return fault
        if shared.figures() != wanted:
            return f"{ranks} ranks: other figures than those of one process"
    print("2 and 4 ranks: the same figures")
    return None


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(run_kills(run_trials, __doc__, "evaluations to kill", 10))
