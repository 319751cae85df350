"""A fault campaign: runs of a micro model, each disturbed in one way, and what became of them.

    python tests/faults/campaign.py --count 1000 --jobs 2 --json benchmarks/results/faults.json

After it was resumed, every trial has to end in the weights and the metrics of the undisturbed run, to the bit, or in
one clear error that left every file as it was. Trials differ in kind, place and moment, drawn from (seed, number).
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import zygote
from safetensors.torch import load_file
from zygote import Trial, configuration, spawn, wait

from mvlm.runs.checkpoint import checkpoints
from mvlm.runs.folder import read_metrics
from mvlm.training.run import pretrain

DATA = Path(__file__).parent / "data"
STEPS = 12
PASSING = ("pairs_per_s", "data_wait_s", "memory_mb", "mfu")
"""Fields of metrics.jsonl that no two runs share."""


class Failed(Exception):
    """A trial that did not end as it has to."""


def contents(folder: Path) -> dict[str, Any]:
    """A checkpoint's tensors, bytes by file and name, and its state."""
    found: dict[str, Any] = {"state": (folder / "state.json").read_text()}
    for path in sorted(folder.glob("*/*.safetensors")):
        found |= {f"{path.relative_to(folder)}/{name}": t.numpy().tobytes() for name, t in load_file(path).items()}
    return found


def outcome(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The final weights and state of a run, and its metrics but times, rates and memory."""
    rows = [{k: v for k, v in row.items() if k not in PASSING} for row in read_metrics(run / "metrics.jsonl")]
    return contents(run / "checkpoints" / f"step_{STEPS:08d}"), rows


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Failed(message)


class Campaign:
    """The undisturbed runs, and the trials against them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        shutil.copytree(DATA, self.data)
        for index in self.data.glob("*.idx"):
            os.utime(index)  # a checkout may have made the tar after its index
        # What is imported and set up on first use is so before any fork, and need not be again in each.
        pretrain(configuration(self.data, folder / "warm"))
        self._whole: dict[str, Path] = {}

    def whole(self, ranks: int = 1, **changes: Any) -> Path:
        """The undisturbed run with these changes of the configuration, which is made when it is first asked for."""
        asked = json.dumps([ranks, changes], sort_keys=True)
        if asked not in self._whole:
            out = self.folder / f"whole-{len(self._whole)}"
            codes = self.run(out, ranks, **changes)
            require(codes == [0] * ranks, f"the undisturbed run ended with {codes}: {log_of(out)}")
            self._whole[asked] = out
        return self._whole[asked]

    def run(
        self, out: Path, ranks: int = 1, before: dict[int, Callable[[], None]] | None = None, **changes
    ) -> list[int]:
        """Run (or resume) to the end; `before` arranges a rank's fault. Returns the ranks' exit codes."""
        environment: dict[str, str] = {}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        config = configuration(self.data, out, **changes)
        processes = []
        for rank in range(ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            fault = (before or {}).get(rank)
            processes.append(spawn(Trial(config, out.with_suffix(".log"), own, fault)))
        return [wait(process) for process in processes]

    def ends_as_undisturbed(self, out: Path, ranks: int = 1, **changes: Any) -> None:
        """Resume until the run is complete, and compare it with the undisturbed one."""
        codes = self.run(out, ranks, **changes)
        require(codes == [0] * ranks, f"resuming ended with {codes}: {log_of(out)}")
        self.is_as_undisturbed(out, ranks, **changes)

    def is_as_undisturbed(self, out: Path, ranks: int = 1, **changes: Any) -> None:
        """Compare a complete run with the undisturbed one: tensors, state and metrics, to the bit."""
        state, rows = outcome(out)
        whole_state, whole_rows = outcome(self.whole(ranks, **changes))
        wrong = [name for name in whole_state if state.get(name) != whole_state[name]]
        require(not wrong and state.keys() == whole_state.keys(), f"another end: {wrong[:3]}")
        require(rows == whole_rows, "other metrics")


def log_of(out: Path) -> str:
    lines = out.with_suffix(".log").read_text().splitlines()
    return " | ".join(lines[-3:])


def told(out: Path, words: str) -> None:
    require(words in out.with_suffix(".log").read_text(), f"wanted {words!r} in: {log_of(out)}")


# Each kind of fault: a trial in the folder `out`, with a generator for what is random in it. Returns the place.


def killed(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """kill -9 in the step, in the loader, or between two operations of a save."""
    place = draw.choice(["step", "data", "save"])
    if place == "save":
        before = partial(zygote.in_save, draw.randrange(50), zygote.kill())
    else:
        arrange = zygote.at_step if place == "step" else zygote.in_data
        before = partial(arrange, draw.randint(1, STEPS), zygote.kill())
    codes = campaign.run(out, before={0: before})
    require(codes == [-signal.SIGKILL], f"ended with {codes}: {log_of(out)}")
    campaign.ends_as_undisturbed(out)
    return place


def killed_twice(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """kill -9, and kill -9 again in the attempt to go on."""
    killed_at = draw.randint(4, STEPS)
    campaign.run(out, before={0: partial(zygote.at_step, killed_at, zygote.kill())})
    again = partial(zygote.in_save, draw.randrange(12), zygote.kill())
    codes = campaign.run(out, before={0: again})
    require(codes == [-signal.SIGKILL], f"ended with {codes}: {log_of(out)}")
    campaign.ends_as_undisturbed(out)
    return "step, then save"


def asked_to_stop(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """SIGTERM, SIGINT, SIGUSR1 or a file: the step is finished and saved, and the exit code is 0."""
    how = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, None])
    step = draw.randint(1, STEPS - 1)
    notice = out.with_suffix(".notice")
    action = zygote.kill(how) if how is not None else notice.touch
    changes: dict[str, Any] = {} if how is not None else {"preemption_file": notice}
    codes = campaign.run(out, before={0: partial(zygote.at_step, step, action)}, **changes)
    require(codes == [0], f"ended with {codes}: {log_of(out)}")
    newest = checkpoints(out / "checkpoints")[-1].name
    if how is not None:  # the file is looked for once a second
        require(newest == f"step_{step:08d}", f"asked in step {step}, saved {newest}")
    campaign.ends_as_undisturbed(out)
    return how.name if how is not None else "file"


def disk_full(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """A write fails for want of space: training goes on, or the run ends with one error if it was its last save."""
    codes = campaign.run(out, before={0: partial(zygote.in_save, draw.randrange(50), zygote.disk_full)})
    told(out, "could not save")
    told(out, "No space left on device")
    require(codes in ([0], [2]), f"ended with {codes}: {log_of(out)}")
    if codes == [2]:
        told(out, "could not be written (the reason is above), and the run ends here")
    campaign.ends_as_undisturbed(out)
    return "an earlier save" if codes == [0] else "the last save"


def damaged(campaign: Campaign, out: Path, draw: random.Random, how: str) -> str:
    """The newest checkpoint, or both, are damaged while the run is down: the older one is used, or one clear error."""
    campaign.run(out, before={0: partial(zygote.at_step, draw.randint(10, STEPS), zygote.kill())})
    folders = checkpoints(out / "checkpoints")
    # Three, where the kill fell between the rename of the newest and the removal of the oldest.
    require(len(folders) in (2, 3), f"wanted two or three checkpoints, found {len(folders)}")
    files = sorted(str(p.relative_to(folders[-1])) for p in folders[-1].rglob("*.*") if p.is_file())
    name = draw.choice(files)
    both = draw.random() < 0.2  # or all three
    for folder in folders if both else folders[-1:]:
        content = bytearray((folder / name).read_bytes())
        place = draw.randrange(len(content))
        if how == "bit flip":
            content[place] ^= 1 << draw.randrange(8)
        else:
            del content[place:]
        (folder / name).write_bytes(content)
    if both:
        before = files_of(out)
        codes = campaign.run(out)
        require(codes == [2], f"ended with {codes}: {log_of(out)}")
        told(out, "wanted a good checkpoint, found all of them damaged; remove the folder to start again")
        require(files_of(out) == before, "files were changed")
        return "both, an error"
    campaign.ends_as_undisturbed(out)
    if name != "manifest.json":  # there it may be a digest that changed, or the blank between two
        told(out, f"{name}: ")
        told(out, "looking for an older checkpoint")
    return name.split("/")[0]


def not_finite(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """The loss is NaN: the run stops with a diagnosis, and goes on as if nothing had been when the cause is gone."""
    step = draw.randint(1, STEPS)
    codes = campaign.run(out, before={0: partial(zygote.poison, step, draw.randint(1, 3))}, max_bad_steps=0)
    require(codes == [1], f"ended with {codes}: {log_of(out)}")
    told(out, f"mvlm: step {step}: mim is nan, grad_norm is nan; the update was not made")
    told(out, "Its samples: ")
    campaign.ends_as_undisturbed(out)
    return "step"


def stalled(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """The loader or the step stands still: the watchdog ends the run with stacks."""
    place, arrange = draw.choice([("loader", zygote.in_data), ("step", zygote.at_step)])
    codes = campaign.run(out, before={0: partial(arrange, draw.randint(2, STEPS), zygote.stall)}, stall_minutes=2 / 60)
    require(codes == [3], f"ended with {codes}: {log_of(out)}")
    told(out, "more than --stall-minutes")
    require("in stall" in (out / "stalled_rank_00000.txt").read_text(), "no stacks")
    campaign.ends_as_undisturbed(out)
    return place


def lost_rank(campaign: Campaign, out: Path, draw: random.Random) -> str:
    """One of two ranks is killed, or stands still: the other ends too, and both go on from the last checkpoint."""
    place, action = draw.choice([("killed", zygote.kill()), ("stalled", zygote.stall)])
    rank = draw.randrange(2)
    fault = partial(zygote.at_step, draw.randint(2, STEPS), action)
    codes = campaign.run(out, ranks=2, before={rank: fault}, stall_minutes=(4 if place == "stalled" else 30) / 60)
    require(0 not in codes, f"ended with {codes}: {log_of(out)}")
    if place == "killed":
        told(out, f"mvlm: rank {1 - rank} lost another rank after step ")
    campaign.ends_as_undisturbed(out, 2)
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
"""By fault and place, how many trials passed and failed."""


def trials(numbers: range, seed: int, until: float) -> tuple[Rows, list[dict[str, Any]]]:
    """The trials with these numbers, none begun after `until` (of time.monotonic): the table, and what failed."""
    rows: Rows = collections.defaultdict(collections.Counter)
    failures = []
    with tempfile.TemporaryDirectory(prefix="mvlm-faults-") as folder:
        campaign = Campaign(Path(folder))
        for number in numbers:
            if time.monotonic() > until:
                break
            draw = random.Random(f"{seed}/{number}")
            kind = list(KINDS)[number % len(KINDS)]
            out = Path(folder) / f"trial-{number}"
            place = "-"
            try:
                place = KINDS[kind](campaign, out, draw)
                rows[kind, place]["passed"] += 1
            except Exception as error:  # a trial's own mistake is a failure as well, and the others go on
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    started = time.monotonic()
    shares = [range(k, arguments.count, arguments.jobs) for k in range(arguments.jobs)]
    work = partial(trials, seed=arguments.seed, until=started + 60 * arguments.minutes)
    if arguments.jobs == 1:
        found = [work(shares[0])]
    else:
        # A fresh interpreter each: every share forks its own runs.
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(work, shares))
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
        figures = {
            "trials": total,
            "seed": arguments.seed,
            "seconds": round(seconds, 1),
            "failed": failures,
            "rows": table,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
