"""Embeddings, evaluations and studies that are killed and made again: they must end as undisturbed ones do.

    python tests/promises/faults/kill_work.py embedding|evaluation|study [--kills 20]

One process imports everything and forks those that work, because an import takes longer than a trial. Prints a line for
each part. The exit code is 1 if what is made differs.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mvlm.runs.load  # noqa: F401 a command imports it when it runs: here once, in place of every fork
import mvlm.search.embed as embedding
from mvlm.commands.evaluate import eval_retrieval
from mvlm.distributed.world import join_ranks
from mvlm.evaluation import retrieval
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.studies.run import run_study
from mvlm.studies.study import Study
from mvlm_dataloading import open_dataset, tokenizer_for

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from support.faults.forks import ended_well, in_child, in_ranks, killed
from support.faults.kill_command import run_kills
from support.folders import folder_hash
from support.models import MICRO, micro_model
from support.scenes import write_scenes

STUDY = Study(
    name="killed",
    question="Does a kill change anything?",
    preset="tiny",
    base="all",
    seeds=[0, 1],
    measures=["ir.r1", "masked_nats"],
    budget={"steps": 12},
    settings={
        "model": {**MICRO, "image_mean": list(MICRO["image_mean"]), "image_std": list(MICRO["image_std"])},
        "batch_size": 8,
        "warmup_steps": 1,
        "device": "cpu",
        "checkpoint_every_steps": 3,
        "eval_every_steps": 6,
    },
    arms={"all": {}, "no pixels": {"mim_weight": 0.0}, "half the data": {"fraction": 0.5}},
)


class Killed:
    """Work that is killed and done again.

    Args:
        work: makes the file or folder that it gets, or goes on with it.
        contents: what is compared of it.
    """

    def __init__(self, folder: Path, work: Callable[[Path], object], contents: Callable[[Path], Any]) -> None:
        self.folder, self.work, self.contents = folder, work, contents
        begun = time.perf_counter()
        self.wanted = self._finished("undisturbed", 1)
        self.seconds = time.perf_counter() - begun

    def start(self, name: str, ranks: int = 1) -> list[int]:
        """Start the work of this name or go on with it, one process a rank. Returns their ids."""
        work = lambda: self.work(self.folder / name)  # noqa: E731
        return [in_child(work)] if ranks == 1 else in_ranks(work, ranks)

    def _finished(self, name: str, ranks: int) -> Any:
        ended = [ended_well(pid) for pid in self.start(name, ranks)]
        assert all(ended), f"{name}: a process failed"
        return self.contents(self.folder / name)

    def finish(self, name: str, ranks: int = 1) -> None:
        """Finish the work of this name, which has to be equal to the undisturbed one."""
        assert self._finished(name, ranks) == self.wanted, f"{name}: it differs from what is made undisturbed"

    def kill(self, kills: int, rng: random.Random, ranks: tuple[int, ...] = (1,)) -> None:
        """Kill so many processes, or ranks at once, at random moments. All works must end as the undisturbed one.

        Args:
            ranks: numbers of ranks that share a work, in turn.
        """
        done = works = 0
        while done < kills:
            name, size = f"killed-{works}", ranks[works % len(ranks)]
            for _ in range(rng.randint(1, 4)):
                first, *others = self.start(name, size)
                done += any([killed(first, self.seconds, rng), *(killed(pid, 0, rng) for pid in others)])
            self.finish(name, size)
            works += 1
        print(f"{done} kills over {works} works: the same result")


def embeddings(folder: Path, kills: int, rng: random.Random) -> None:
    """The files must be the same, also those of two ranks."""
    embedding.PART = 8
    data = write_scenes(folder / "data", {"train": 48, "test": 16})
    tokenizer = tokenizer_for(open_dataset(data, "train"), 300)

    def embed(out: Path) -> None:
        model = TrainedModel(micro_model(dtype=torch.float32), tokenizer, "fp32")
        embedding.embed(model, open_collection(data, ["train", "test"]), out, join_ranks("cpu"))

    def contents(out: Path) -> dict[str, str]:
        return {name: digest for name, (digest, _) in folder_hash(out).items()}

    work = Killed(folder, embed, contents)
    work.kill(kills, rng)
    work.finish("two", 2)
    print("2 ranks: the same files")


def evaluations(folder: Path, kills: int, rng: random.Random) -> None:
    """The figures must be the same. Every other evaluation is shared by two ranks.

    Of two more, one rank is killed, and the other has to end by itself.
    """
    retrieval.PAIRS_PER_BATCH = 64  # more parts for the few pairs
    data = write_scenes(folder / "data", {"train": 32, "test": 96})
    micro_model(dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer_for(open_dataset(data, "train"), 300).save(folder / "model" / "tokenizer.json")

    def parts(out: Path) -> Path:
        """Folder of an unfinished evaluation."""
        return out.with_name(f"{out.name}.parts")

    def figures(out: Path) -> dict[str, Any]:
        """Without the seconds and the machine, which names the number of ranks."""
        assert not parts(out).exists(), f"{out.name}: its parts were not removed"
        return {
            name: value for name, value in json.loads(out.read_text()).items() if name not in ("seconds", "machine")
        }

    def evaluate(out: Path) -> None:
        eval_retrieval(checkpoint=folder / "model", data=data, out=out, rerank=8, device="cpu")

    work = Killed(folder, evaluate, figures)
    work.kill(kills, rng, (2, 1))
    for rank in (0, 1):
        name = f"without-{rank}"
        pids = work.start(name, 2)
        while not parts(folder / name).exists():  # the ranks have met: else one would wait long for the other
            time.sleep(0.01)
        os.kill(pids[rank], signal.SIGKILL)
        ended = [ended_well(pid) for pid in pids]
        assert not any(ended), f"{name}: ended well without its other rank"
        work.finish(name, 2)
    print("one of two ranks killed: the other ends, and a new start finds the same figures")
    for ranks in (2, 4):
        work.finish(f"ranks-{ranks}", ranks)
    print("2 and 4 ranks: the same figures")


def studies(folder: Path, kills: int, rng: random.Random) -> None:
    """The table must be the same, and the page is there."""
    data = write_scenes(folder / "data", {"train": 64, "test": 16, "validation": 8})

    def table(out: Path) -> bytes:
        assert (out / "study.html").is_file()
        return (out / "study.csv").read_bytes()

    Killed(folder, lambda out: run_study(STUDY, data, out), table).kill(kills, rng)


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    works = {"embedding": embeddings, "evaluation": evaluations, "study": studies}
    sys.exit(run_kills(works[sys.argv.pop(1)], __doc__, "processes to kill", 20))
