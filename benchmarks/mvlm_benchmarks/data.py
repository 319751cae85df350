"""`mvlm bench data`: our loader and others on the same shards, each in a process of its own, in turns, with no model.

Only the process whose turn it is runs: the others are stopped (SIGSTOP), so that nothing they made ahead, and no work
of theirs, falls into another's turn. In each round every contender makes as many batches; what is reported is the
median over rounds, and for ratios the median of the rounds' ratios.

Processor time, of a contender's processes together, is reported beside it: all of them fill the cores, so on a machine
that does nothing else both ratios agree, and on a busy one the ratio of processor times is the one to trust.
"""

import contextlib
import csv
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_benchmarks.data_stages import STAGES
from mvlm_benchmarks.data_worker import CONTENDERS, RECIPES
from mvlm_benchmarks.report import MACHINE_COLUMNS, heading

Row = dict[str, Any]
COLUMNS = (
    "data", "recipe", "contender", "status", "note", "images_per_s", "images_per_s_best", "images_per_s_worst",
    "ours_over", "cpu_ms", "ours_over_cpu", "rounds", "batches", "batch", "size", *MACHINE_COLUMNS,
)  # fmt: skip
PACKAGES = ["nvidia-dali-cuda130", "pillow", "torchvision", "webdataset", "simplejpeg", "numpy"]


class Contender:
    """A process that loads when it is told to, and stands still otherwise."""

    def __init__(self, name: str, recipe: str, data: Path, batch: int, size: int):
        self.name, self.recipe, self.batch = name, recipe, batch
        command = [sys.executable, "-m", "mvlm_benchmarks.data_worker", name, recipe, str(data), str(batch), str(size)]
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
        from mvlm_benchmarks import photos

        print(f"building {pictures} pictures in {data}", flush=True)
        photos.build(data, pictures)
    about = machine.describe("cpu", PACKAGES) | {"figures": f"loader only, no model, {os.cpu_count()} cores"}
    print(heading(about))
    shape = {"rounds": rounds, "batches": batches, "batch": batch, "size": size}
    rows, stages = [], {}
    for recipe in recipes:
        rows += _measure(chosen, recipe, data, shape)
        print(_table(rows, recipe), flush=True)
        stages[recipe] = _stages(recipe, data, shape)
        print(_stage_lines(stages[recipe]), flush=True)
    verdict: dict[str, Any] = {}
    if need is not None and "ours" in chosen:
        ours = max(row["images_per_s"] for row in rows if row["contender"] == "ours")
        verdict = {"step_pairs_per_s": need, "loader_images_per_s": ours, "loader_over_step": round(ours / need, 3)}
        enough = "feeds it" if ours >= need else f"is short of it: {need / ours:.1f} times these cores are needed"
        print(f"a step takes {need:.0f} pairs/s; the loader's {ours:.0f} images/s on this machine {enough}")
    memory: dict[str, Any] = {}
    if soak:
        _write(rows, stages, verdict, memory, about, out, data, json_file)  # a soak is long and may be cut short
        memory = _soak(data, shape, soak)
    return _write(rows, stages, verdict, memory, about, out, data, json_file)


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
            contender.turn(shape["batches"])
            if number == 0:
                contender.rates.clear()  # a turn to warm up
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
        "cpu_ms": round(statistics.median(cpu), 3),
    }
    if ours is not None:
        row["ours_over"] = round(statistics.median(a / b for a, b in zip(ours.rates, rates, strict=True)), 3)
        row["ours_over_cpu"] = round(statistics.median(b / a for a, b in zip(ours.cpu_ms, cpu, strict=True)), 3)
    return row


def _cpu_s(group: int) -> float:
    """Seconds of processor time that the living processes of a group have used."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # the name before may hold anything
            if int(fields[2]) == group:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


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


def _stage_lines(stages: dict[str, dict[str, float]]) -> str:
    lines = [
        f"{'stage':10} {'images/s':>9} {'adds us':>8}   up to and with it; processor time that it adds to a picture"
    ]
    lines += [f"{name:10} {row['images_per_s']:9.0f} {row['adds_us']:8.0f}" for name, row in stages.items()]
    worst = max(stages, key=lambda name: stages[name]["adds_us"])
    return "\n".join([*lines, f"bottleneck: {worst}", ""])


def _table(rows: list[Row], recipe: str) -> str:
    lines = [f"{recipe:24} {'images/s':>9} {'best':>8} {'worst':>8} {'ours/it':>8} {'CPU ms':>8} {'it/ours':>8}"]
    for row in rows:
        if row["recipe"] != recipe:
            continue
        if row["status"] != "ok":
            lines.append(f"{row['contender']:24} {row['status']}: {row['note']}")
            continue
        rates = (row["images_per_s"], row["images_per_s_best"], row["images_per_s_worst"])
        ratios = [f"{row[name]:.2f}x" if name in row else "" for name in ("ours_over", "ours_over_cpu")]
        line = f"{row['contender']:24} {rates[0]:9.0f} {rates[1]:8.0f} {rates[2]:8.0f} {ratios[0]:>8}"
        lines.append(f"{line} {row['cpu_ms']:8.2f} {ratios[1]:>8}")
    return "\n".join(lines)


def _soak(data: Path, shape: dict[str, int], samples: int) -> dict[str, Any]:
    """Resident memory of our loader's process while it makes so many samples: after each tenth."""
    turn = max(1, samples // 10 // shape["batch"])
    with _started(["ours"], "crop+randaug", data, shape) as (ours,):
        resident = [round(ours.turn(turn)["rss_mb"], 1) for _ in range(10)]
    growth = max(resident[2:]) / resident[1] - 1
    print(f"resident memory over {10 * turn * shape['batch']} samples: {resident} MB, grew by {100 * growth:.1f} %")
    return {"samples": 10 * turn * shape["batch"], "rss_mb": resident, "growth": round(growth, 4)}


def _step_rate(path: Path) -> float:
    """The fastest step of a result of `mvlm bench step --json`."""
    try:
        rates = [row["pairs_per_s"] for row in json.loads(path.read_text())["rows"] if row.get("pairs_per_s")]
        return float(max(rates))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"step: wanted what `mvlm bench step --json` wrote, got {path}: {error!r}") from None


def _write(
    rows: list[Row],
    stages: dict,
    verdict: dict,
    memory: dict,
    about: dict,
    out: Path,
    data: Path,
    json_file: Path | None,
) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"data {data.name} {about['device'].split(',')[0]}".lower()).strip("-")
    files = [out / f"{name}.csv"]
    rows = list(rows)
    versions = "; ".join(f"{package} {found}" for package, found in about["versions"].items() if found)
    columns = {key: about[key] for key in MACHINE_COLUMNS} | {"versions": versions}
    for recipe, found in stages.items():
        for stage, figures in found.items():
            note = f"stage, adds {figures['adds_us']} us of processor time a picture"
            rate = {"images_per_s": figures["images_per_s"]}
            rows.append({"data": data.name, "recipe": recipe, "contender": stage, "status": "ok", "note": note, **rate})
    if memory:
        resident = f"resident MB after each tenth of {memory['samples']} samples: {memory['rss_mb']}"
        note = f"{resident}; growth {memory['growth']}"
        rows.append({"data": data.name, "recipe": "crop+randaug", "contender": "memory", "status": "ok", "note": note})
    with files[0].open("w", newline="") as file:
        writer = csv.DictWriter(file, list[str](COLUMNS))
        writer.writeheader()
        writer.writerows({**row, **columns} for row in rows)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        timed = [row for row in rows if row["contender"] in CONTENDERS]
        content = {"machine": about, "rows": timed, "stages": stages, "step": verdict, "memory": memory}
        json_file.write_text(json.dumps(content, indent=1) + "\n")
        files.append(json_file)
    return files


def _chosen(what: str, wanted: Sequence[str], known: Sequence[str]) -> list[str]:
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"{what}: wanted some of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    return list(wanted) or list(known)
