"""Studies that are killed and continued: table and trials must equal those of an undisturbed one.

    python tests/promises/faults/kill_studies.py [--kills 10]

One process imports everything and forks those that run a study of a micro model. Prints a line. The exit code is 1 if a
table differs.
"""

import random
import sys
import time
from pathlib import Path

import torch

from mvlm.studies.run import run_study
from mvlm.studies.study import Study

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from support.faults.forks import ended_well, in_child, killed
from support.faults.kill_command import run_kills
from support.models import MICRO
from support.scenes import write_scenes

MODEL = {**MICRO, "image_mean": list(MICRO["image_mean"]), "image_std": list(MICRO["image_std"])}
STUDY = Study(
    name="killed",
    question="Does a kill change anything?",
    preset="tiny",
    base="all",
    seeds=[0, 1],
    measures=["ir.r1", "masked_nats"],
    budget={"steps": 12},
    settings={
        "model": MODEL,
        "batch_size": 8,
        "warmup_steps": 1,
        "device": "cpu",
        "checkpoint_every_steps": 3,
        "eval_every_steps": 6,
    },
    arms={"all": {}, "no pixels": {"mim_weight": 0.0}, "half the data": {"fraction": 0.5}},
)


def run_trials(folder: Path, kills: int, rng: random.Random) -> str | None:
    """Kill `kills` runs of studies. Returns the difference from an undisturbed study, or None."""
    data = write_scenes(folder / "data", {"train": 64, "test": 16, "validation": 8})

    def start(out: Path) -> int:
        def work() -> None:
            torch.set_num_threads(1)
            run_study(STUDY, data, out)

        return in_child(work)

    begun = time.perf_counter()
    if not ended_well(start(folder / "undisturbed")):
        return "the undisturbed study failed"
    seconds, wanted = time.perf_counter() - begun, (folder / "undisturbed" / "study.csv").read_bytes()
    done = studies = 0
    while done < kills:
        out = folder / f"killed-{studies}"
        for _ in range(rng.randint(2, 4)):
            done += killed(start(out), seconds, rng)
        if not ended_well(start(out)):
            return f"{out.name}: the study that was continued failed"
        if (out / "study.csv").read_bytes() != wanted:
            return f"{out.name}: another table than that of an undisturbed study"
        if not (out / "study.html").is_file():
            return f"{out.name}: no page"
        studies += 1
    print(f"{done} kills over {studies} studies: the same table")
    return None


if __name__ == "__main__":
    # Import DALI before the forks; it must start no thread in this process.
    import nvidia.dali.fn  # noqa: F401

    sys.exit(run_kills(run_trials, __doc__, "runs of studies to kill", 10))
