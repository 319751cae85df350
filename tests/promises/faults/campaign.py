"""A fault campaign: runs of a micro model, each disturbed in one way and then resumed.

    python tests/promises/faults/campaign.py --count 1000 --jobs 2 --json benchmarks/results/faults.json

After it was resumed, every run has to end with the weights and the metrics of the undisturbed run, to the bit, or with
one clear error that leaves every file as it was. Trials differ in kind, place and moment, drawn from (seed, number).
"""

import argparse
import collections
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm.runs.checkpoint import checkpoints
from mvlm_dataloading.files import write_json
from support.faults import injections
from support.faults.campaign import STEPS, Campaign, Failed, end_of_log, file_bytes, require, require_log

# One function a kind of fault. Each does one trial in the folder `out`, draws its random choices from `draw`, and
# returns the place of the fault.


def killed(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """kill -9 in the step, in the loader, or between two operations of a save."""
    place = draw.choice(["step", "data", "save"])
    if place == "save":
        before = partial(injections.at_save, draw.randrange(50), injections.kill())
    else:
        arrange = injections.at_step if place == "step" else injections.at_batch
        before = partial(arrange, draw.randint(1, STEPS), injections.kill())
    campaign.run(out, faults={0: before}, ends=[-signal.SIGKILL])
    campaign.require_resume(out)
    return place


def killed_twice(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """kill -9, and kill -9 again while the run resumes."""
    killed_at = draw.randint(4, STEPS)
    campaign.run(out, faults={0: partial(injections.at_step, killed_at, injections.kill())})
    again = partial(injections.at_save, draw.randrange(12), injections.kill())
    campaign.run(out, faults={0: again}, ends=[-signal.SIGKILL])
    campaign.require_resume(out)
    return "step, then save"


def asked_to_stop(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """SIGTERM, SIGINT, SIGUSR1 or a file: the step is finished and saved, and the exit code is 0."""
    how = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, None])
    step = draw.randint(1, STEPS - 1)
    notice = out.with_suffix(".notice")
    action = injections.kill(how) if how is not None else notice.touch
    changes: dict[str, Any] = {} if how is not None else {"preemption_file": notice}
    campaign.run(out, faults={0: partial(injections.at_step, step, action)}, ends=[0], **changes)
    newest = checkpoints(out / "checkpoints")[-1].name
    if how is not None:  # the loop looks for the file only once a second
        require(newest == f"step_{step:08d}", f"asked in step {step}, saved {newest}")
    campaign.require_resume(out)
    return how.name if how is not None else "file"


def disk_full(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """A write finds the disk full: training continues, or the run ends with one error if it was the last save."""
    codes = campaign.run(out, faults={0: partial(injections.at_save, draw.randrange(50), injections.disk_full)})
    require_log(out, "could not save")
    require_log(out, "No space left on device")
    require(codes in ([0], [2]), f"ended with {codes}: {end_of_log(out)}")
    if codes == [2]:
        require_log(out, "could not be written (the reason is above), and the run ends here")
    campaign.require_resume(out)
    return "an earlier save" if codes == [0] else "the last save"


def damaged(campaign: Campaign, out: Path, draw: random.Random, how: str) -> str:
    """The newest checkpoint, or every one, is damaged after a kill: an older one is used, or one clear error."""
    campaign.run(out, faults={0: partial(injections.at_step, draw.randint(10, STEPS), injections.kill())})
    folders = checkpoints(out / "checkpoints")
    # Three if the kill fell between the rename of the newest and the removal of the oldest.
    require(len(folders) in (2, 3), f"wanted two or three checkpoints, found {len(folders)}")
    files = sorted(str(p.relative_to(folders[-1])) for p in folders[-1].rglob("*.*") if p.is_file())
    name = draw.choice(files)
    every = draw.random() < 0.2
    for folder in folders if every else folders[-1:]:
        content = bytearray((folder / name).read_bytes())
        place = draw.randrange(len(content))
        if how == "bit flip":
            content[place] ^= 1 << draw.randrange(8)
        else:
            del content[place:]
        (folder / name).write_bytes(content)
    if every:
        before = file_bytes(out)
        campaign.run(out, ends=[2])
        require_log(out, "wanted a good checkpoint, found all of them damaged; remove the folder to start again")
        require(file_bytes(out) == before, "files were changed")
        return "both, an error"  # the name in committed tables
    campaign.require_resume(out)
    if name != "manifest.json":  # a changed digest there is reported for the file it belongs to
        require_log(out, f"{name}: ")
        require_log(out, "looking for an older checkpoint")
    return name.split("/")[0]


def not_finite(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """The loss is NaN: the run stops with a diagnosis. Resumed without the cause, it ends as the undisturbed run."""
    step = draw.randint(1, STEPS)
    fault = partial(injections.nan_loss, step, draw.randint(1, 3))
    campaign.run(out, faults={0: fault}, ends=[1], max_bad_steps=0)
    require_log(out, f"mvlm: step {step}: mim is nan, grad_norm is nan; the update was not made")
    require_log(out, "Its samples: ")
    campaign.require_resume(out)
    return "step"


def stalled(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """The loader or the step hangs: the watchdog ends the run and writes stacks."""
    place, arrange = draw.choice([("loader", injections.at_batch), ("step", injections.at_step)])
    fault = partial(arrange, draw.randint(2, STEPS), injections.stall)
    campaign.run(out, faults={0: fault}, ends=[3], stall_minutes=2 / 60)
    require_log(out, "more than stall_minutes")
    require("in stall" in (out / "stalled_rank_00000.txt").read_text(), "no stacks")
    campaign.require_resume(out)
    return place


def lost_rank(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """One of two ranks is killed or hangs: the other ends too, and both resume from the last checkpoint."""
    place, action = draw.choice([("killed", injections.kill()), ("stalled", injections.stall)])
    rank = draw.randrange(2)
    fault = partial(injections.at_step, draw.randint(2, STEPS), action)
    codes = campaign.run(out, ranks=2, faults={rank: fault}, stall_minutes=(4 if place == "stalled" else 30) / 60)
    require(0 not in codes, f"ended with {codes}: {end_of_log(out)}")
    if place == "killed":
        require_log(out, f"mvlm: rank {1 - rank} lost another rank and ends too (")
    campaign.require_resume(out, 2)
    return f"rank {rank} {place}"


KINDS: dict[str, Callable[[Campaign, Path, random.Random], str]] = {
    "kill -9": killed,
    "kill -9 twice": killed_twice,
    "asked to stop": asked_to_stop,
    "disk full": disk_full,
    "bit flip": partial(damaged, how="bit flip"),
    "truncation": partial(damaged, how="truncation"),
    "NaN": not_finite,
    "stall": stalled,
    "lost rank": lost_rank,
}


Rows = dict[tuple[str, str], collections.Counter[str]]
"""Numbers of trials that passed and failed, by fault and place."""


def trials(numbers: range, seed: int) -> tuple[Rows, list[dict[str, Any]]]:
    """Do the trials with these numbers. Returns the table and the failures."""
    rows: Rows = collections.defaultdict(collections.Counter)
    failures = []
    with tempfile.TemporaryDirectory(prefix="mvlm-faults-") as folder:
        campaign = Campaign(Path(folder))
        for number in numbers:
            draw = random.Random(f"{seed}/{number}")
            kind = list(KINDS)[number % len(KINDS)]
            out = Path(folder) / f"trial-{number}"
            place = "-"
            try:
                place = KINDS[kind](campaign, out, draw)
                rows[kind, place]["passed"] += 1
            except Exception as error:  # a mistake in the trial is a failure too, and must not stop the others
                rows[kind, place]["failed"] += 1
                message = str(error) if isinstance(error, Failed) else repr(error)
                failures.append({"number": number, "kind": kind, "message": message})
                print(f"trial {number}, {kind}: {message}", flush=True)
            shutil.rmtree(out, ignore_errors=True)
            for rest in Path(folder).glob(f"trial-{number}.*"):
                rest.unlink()
    return dict(rows), failures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="trials")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    arguments = parser.parse_args()
    started = time.monotonic()
    shares = [range(k, arguments.count, arguments.jobs) for k in range(arguments.jobs)]
    work = partial(trials, seed=arguments.seed)
    # Each in a new interpreter, because every share forks its own runs.
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        found = list(pool.map(work, shares) if arguments.jobs > 1 else map(work, shares))
    rows: Rows = collections.defaultdict(collections.Counter)
    for part, _ in found:
        for key, counter in part.items():
            rows[key] += counter
    failures = sorted((failure for _, failed in found for failure in failed), key=lambda failure: failure["number"])
    seconds = time.monotonic() - started
    total = sum(counter.total() for counter in rows.values())
    print(f"{'fault':<16}{'where':<22}{'passed':>8}{'failed':>8}")
    for (kind, place), counter in sorted(rows.items()):
        print(f"{kind:<16}{place:<22}{counter['passed']:>8}{counter['failed']:>8}")
    print(f"{total} trials in {seconds:.0f} s, {len(failures)} failed")
    if arguments.json:
        table = [{"fault": kind, "where": place, **counter} for (kind, place), counter in sorted(rows.items())]
        figures = {"trials": total, "seed": arguments.seed, "seconds": round(seconds, 1), "failed": failures}
        write_json(arguments.json, figures | {"rows": table})
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
