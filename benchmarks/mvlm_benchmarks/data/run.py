"""`mvlm bench data`: our loader and others on the same shards, each in a process of its own, in turns, with no model.

Only the process whose turn it is runs: the others are stopped (SIGSTOP), so that nothing they made ahead, and no work
of theirs, falls into another's turn. In each round every contender makes as many batches; what is reported is the
median over rounds, and for ratios the median of the rounds' ratios.

Processor time, of a contender's processes together, is reported beside it: all of them fill the cores, so on a machine
that does nothing else both ratios agree, and on a busy one the ratio of processor times is the one to trust. It is the
mean over rounds: what one turn makes ahead the next need not make, so turns differ, and only their sum is right.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_benchmarks.data import start_up as data_start
from mvlm_benchmarks.data.report import Row, stage_table, table, write
from mvlm_benchmarks.data.stages import STAGES
from mvlm_benchmarks.data.worker import CONTENDERS, RECIPES
from mvlm_benchmarks.kernels.report import heading

PACKAGES = ["nvidia-dali-cuda130", "pillow", "torchvision", "webdataset", "simplejpeg", "numpy"]


# Batches of the turn that does not count: more than anybody has made ahead, so that later turns begin as they end.
WARM_UP = 10
LOOKS = 39
"""At memory, in each tenth of a soak."""


class Contender:
    """A process that loads when it is told to, and stands still otherwise."""

    def __init__(self, name: str, recipe: str, data: Path, batch: int, size: int):
        self.name, self.recipe, self.batch = name, recipe, batch
        command = [sys.executable, "-m", "mvlm_benchmarks.data.worker", name, recipe, str(data), str(batch), str(size)]
        # Its workers belong to its group, so that they stand still with it.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        )  # fmt: skip
        self.rates: list[float] = []
        """Images a second, of each turn."""
        self.cpu_ms: list[float] = []
        """Milliseconds of processor time an image, of each turn."""
        answer = self._read()
        self.status, self.note = answer["status"], answer["note"]
        if self.status == "ok":
            self._signal(signal.SIGSTOP)

    def turn(self, batches: int) -> dict[str, Any]:
        """Make so many batches; what the process says of it."""
        spent = _cpu_s(self._process.pid)
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(f"{batches}\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        self.rates.append(batches * self.batch / answer["seconds"])
        self.cpu_ms.append(1e3 * (_cpu_s(self._process.pid) - spent) / (batches * self.batch))
        return answer

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            return {"status": "error", "note": f"ended with code {self._process.returncode}", "seconds": float("inf")}
        return json.loads(line)

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)


def run(
    data: Path,
    pictures: int,
    out: Path,
    contenders: Sequence[str] = (),
    recipes: Sequence[str] = (),
    rounds: int = 7,
    batches: int = 8,
    batch: int = 64,
    size: int = 224,
    soak: int = 0,
    start: int = 0,
    step: Path | None = None,
    json_file: Path | None = None,
) -> list[Path]:
    """Build the photographs at `data` if nothing is there, measure, print, write; returns the files written.

    Raises:
        ConfigError: a contender or recipe that there is not, numbers below 1, a `step` that is no result.
    """
    chosen = _chosen("contenders", contenders, CONTENDERS)
    recipes = _chosen("recipes", recipes, RECIPES)
    if min(rounds, batches, batch, size, pictures) < 1:
        raise ConfigError(
            f"wanted rounds, batches, batch, size and pictures of at least 1, got {rounds}, {batches}, ..."
        )
    need = None if step is None else _step_rate(step)
    if not data.exists():
        from mvlm_benchmarks.data import photos

        print(f"building {pictures} pictures in {data}", flush=True)
        photos.build(data, pictures)
    about = machine.describe("cpu", PACKAGES) | {"figures": f"loader only, no model, {os.cpu_count()} cores"}
    print(heading(about))
    shape = {"rounds": rounds, "batches": batches, "batch": batch, "size": size}
    rows, stages = [], {}
    for recipe in recipes:
        rows += _measure(chosen, recipe, data, shape)
        print(table(rows, recipe), flush=True)
        stages[recipe] = _stages(recipe, data, shape)
        print(stage_table(stages[recipe]), flush=True)
    others: dict[str, dict[str, Any]] = {}
    if need is not None and "ours" in chosen:
        others["step"] = _feeds(need, max(row["images_per_s"] for row in rows if row["contender"] == "ours"))
    if start:
        others["start"] = _start(start)
    if soak:
        write(rows, stages, others, about, out, data, json_file)  # a soak is long and may be cut short
        others["memory"] = _soak(data, shape, soak)
    for found in others.values():
        print(found["text"])
    return write(rows, stages, others, about, out, data, json_file)


def _measure(names: Sequence[str], recipe: str, data: Path, shape: dict[str, int]) -> list[Row]:
    with _started(names, recipe, data, shape) as contenders:
        _rounds(contenders, shape)
        ours = next((c for c in contenders if c.name == "ours" and c.status == "ok"), None)
        return [_row(contender, ours, data, shape) for contender in contenders]


@contextlib.contextmanager
def _started(names: Sequence[str], recipe: str, data: Path, shape: dict[str, int]) -> Iterator[list[Contender]]:
    contenders: list[Contender] = []
    try:
        for name in names:
            contenders.append(Contender(name, recipe, data, shape["batch"], shape["size"]))
        yield contenders
    finally:
        for contender in contenders:
            contender.close()


def _rounds(contenders: list[Contender], shape: dict[str, int]) -> None:
    running = [contender for contender in contenders if contender.status == "ok"]
    for number in range(shape["rounds"] + 1):
        # Every second round backwards, so that nobody always follows the same neighbour.
        for contender in running if number % 2 else running[::-1]:
            contender.turn(shape["batches"] if number else max(WARM_UP, shape["batches"]))
            if number == 0:
                contender.rates.clear()
                contender.cpu_ms.clear()


def _row(contender: Contender, ours: Contender | None, data: Path, shape: dict[str, int]) -> Row:
    rates, cpu = contender.rates, contender.cpu_ms
    row: Row = {
        "data": data.name,
        "recipe": contender.recipe,
        "contender": contender.name,
        "status": contender.status,
        "note": contender.note,
        **shape,
    }
    if not rates:
        return row | {"images_per_s": None}
    row |= {
        "images_per_s": round(statistics.median(rates), 1),
        "images_per_s_best": round(max(rates), 1),
        "images_per_s_worst": round(min(rates), 1),
        "cpu_ms": round(statistics.fmean(cpu), 3),
    }
    if ours is not None:
        row["ours_over"] = round(statistics.median(a / b for a, b in zip(ours.rates, rates, strict=True)), 3)
        row["ours_over_cpu"] = round(statistics.fmean(cpu) / statistics.fmean(ours.cpu_ms), 3)
    return row


def _cpu_s(group: int) -> float:
    """Seconds of processor time that the living processes of a group have used."""
    spent = 0.0
    for process in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):  # one that has just ended
            if os.getpgid(process) == group:
                spent += time.clock_gettime((~process << 3) | 2)  # Linux's number of a process's clock, in nanoseconds
    return spent


def _stages(recipe: str, data: Path, shape: dict[str, int]) -> dict[str, dict[str, float]]:
    """Stage -> images a second up to and with it, and microseconds of processor time a picture that it adds."""
    with _started([f"stage:{name}" for name in STAGES], recipe, data, shape) as contenders:
        _rounds(contenders, shape)
        found, before = {}, [0.0] * shape["rounds"]
        for name, contender in zip(STAGES, contenders, strict=True):
            took = [1e3 * ms for ms in contender.cpu_ms]
            added = statistics.median(now - then for now, then in zip(took, before, strict=True))
            found[name] = {"images_per_s": round(statistics.median(contender.rates), 1), "adds_us": round(added, 1)}
            before = took
        return found


def _soak(data: Path, shape: dict[str, int], samples: int) -> dict[str, Any]:
    """Resident memory of our loader's process while it makes so many samples: in each tenth.

    The median of many looks, because pictures of other sizes need other buffers from moment to moment.
    """
    turn = max(1, samples // (10 * LOOKS) // shape["batch"])
    with _started(["ours"], "crop+randaug", data, shape) as (ours,):
        looks = [[ours.turn(turn)["rss_mb"] for _ in range(LOOKS)] for _ in range(10)]
    resident = [round(statistics.median(tenth), 1) for tenth in looks]
    made, growth = 10 * LOOKS * turn * shape["batch"], max(resident[2:]) / resident[1] - 1
    text = f"resident MB in each tenth of {made} samples: {resident}; grew by {100 * growth:.1f} % after the second"
    return {"text": text, "samples": made, "rss_mb": resident, "growth": round(growth, 4)}


def _start(samples: int) -> dict[str, Any]:
    """Seconds from nothing to a first batch with an index of so many samples: the median of five processes."""
    with tempfile.TemporaryDirectory(prefix="mvlm-start-") as folder:
        data_start.build(Path(folder) / "data", samples)
        command = [sys.executable, "-m", "mvlm_benchmarks.data.start_up", str(Path(folder) / "data")]
        found = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(5)]
    seconds = [round(one["start_s"], 3) for one in found]
    spent = statistics.median(one["cpu_s"] for one in found)
    text = f"{statistics.median(seconds):.2f} s from nothing to the first batch of {found[0]['samples']} samples"
    text += f", imports apart, of five processes: {seconds}; {spent:.2f} s of processor time"
    return {"text": text, "samples": found[0]["samples"], "seconds": seconds, "cpu_s": round(spent, 3)}


def _feeds(need: float, ours: float) -> dict[str, Any]:
    """Whether the loader's images a second are enough for a step that takes `need` pairs a second."""
    enough = "feeds it" if ours >= need else f"is short of it: {need / ours:.1f} times these cores are needed"
    text = f"a step takes {need:.0f} pairs/s; the loader's {ours:.0f} images/s on this machine {enough}"
    return {
        "text": text,
        "step_pairs_per_s": need,
        "loader_images_per_s": ours,
        "loader_over_step": round(ours / need, 3),
    }


def _step_rate(path: Path) -> float:
    """The fastest step of a result of `mvlm bench step --json`."""
    try:
        rates = [row["pairs_per_s"] for row in json.loads(path.read_text())["rows"] if row.get("pairs_per_s")]
        return float(max(rates))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"step: wanted what `mvlm bench step --json` wrote, got {path}: {error!r}") from None


def _chosen(what: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"{what}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return list(wanted) or list(known)
