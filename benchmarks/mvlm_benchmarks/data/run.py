"""`mvlm bench data`: our loader and others on the same shards, each in its own process, without a model.

Contenders take turns. All others are stopped (SIGSTOP), so that they do no work during the turn. In each round every
contender makes the same number of batches. Rates are medians over rounds, and ratios of rates are medians of the ratios
within a round, with an interval by drawing rounds.

Processor time is reported too, summed over a contender's processes. On an idle machine both ratios agree, because every
contender fills the cores. On a busy machine, trust the ratio of processor times.

The processor time of a contender is a mean over rounds, not a median: work done in advance in one turn is missing in
the next, so only the sum is right. The processor time that a stage adds is a small difference of large figures. It is
a median over rounds, because one disturbed round could dominate a mean.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_benchmarks import intervals, machine
from mvlm_benchmarks.choices import choose
from mvlm_benchmarks.data import start_up
from mvlm_benchmarks.data.process import LoaderProcess
from mvlm_benchmarks.data.report import Row, stage_table, table, write
from mvlm_benchmarks.data.stages import STAGES
from mvlm_benchmarks.data.worker import CONTENDERS, RECIPES
from mvlm_benchmarks.results import heading
from mvlm_dataloading import open_dataset
from mvlm_dataloading.urls import is_remote

PACKAGES = [
    "nvidia-dali-cuda130",
    "pillow",
    "torchvision",
    "webdataset",
    "simplejpeg",
    "litdata",
    "mosaicml-streaming",
    "numpy",
]
PHOTOS = Path("data/photos")
"""Data set that is timed if none is named."""
WARM_UP = 10
"""Minimum number of batches in the first turn, which does not count. More than any contender prepares in advance, so
that later turns start and end in the same state."""
READINGS = 39
"""Memory readings in each tenth of the soak test."""
START_UPS = 5
"""Processes whose time to the first batch is measured."""


def run(
    data: Path | None,
    images: int,
    out: Path,
    contenders: Sequence[str] = (),
    recipes: Sequence[str] = (),
    rounds: int = 7,
    batches: int = 8,
    batch: int = 64,
    size: int = 224,
    threads: int = 2,
    soak_samples: int = 0,
    start_up_samples: int = 0,
    step: Path | None = None,
    json_file: Path | None = None,
) -> list[Path]:
    """Measure, print tables and write files. Returns the files. `mvlm_benchmarks.cli.data` describes the arguments.

    Raises:
        ConfigError: an unknown contender or recipe, a number below 1, or a `step` file that is no result.
        DataError: `data` is no data folder.
    """
    names = choose("contenders", contenders, CONTENDERS)
    recipes = choose("recipes", recipes, RECIPES)
    settings = {"rounds": rounds, "batches": batches, "batch": batch, "size": size, "threads": threads}
    for option, value in (*settings.items(), ("images", images)):
        if value < 1:
            raise ConfigError(f"{option}: wanted at least 1, got {value}")
    step_rate = None if step is None else _fastest_step(step)
    data = data or _photographs(images)
    images = len(open_dataset(data, "train"))
    if batch > images:
        raise ConfigError(f"batch: wanted at most {images}, the images of {data}, got {batch}")
    about = machine.describe("cpu", PACKAGES) | {
        "figures": f"loader only, no model, {threads} threads each, {os.cpu_count()} cores"
    }
    print(heading(about))
    rows, stages = [], {}
    for recipe in recipes:
        rows += measure_recipe(names, recipe, data, settings)
        print(table(rows, recipe), flush=True)
        if not is_remote(data):  # its stages are those of a local folder
            stages[recipe] = _measure_stages(recipe, data, settings)
            print(stage_table(stages[recipe]), flush=True)
        write(rows, stages, {}, about, out, data, json_file)  # what follows may be interrupted
    others: dict[str, dict[str, Any]] = {}
    if step_rate is not None and "ours" in names:
        rates = [row["images_per_s"] for row in rows if row["contender"] == "ours" and row["images_per_s"]]
        if rates:
            others["step"] = _compare_with_step(step_rate, max(rates))
    if start_up_samples:
        others["start"] = _measure_start_up(start_up_samples)
    if soak_samples:
        write(rows, stages, others, about, out, data, json_file)  # the soak test takes long and may be interrupted
        others["memory"] = _measure_memory(data, settings, soak_samples)
    for result in others.values():
        print(result["text"])
    return write(rows, stages, others, about, out, data, json_file)


def _photographs(images: int) -> Path:
    """The data set of photographs, which is built of so many images unless it is there."""
    if not PHOTOS.exists():
        from mvlm_benchmarks.data import photos

        print(f"building {images} images in {PHOTOS}", flush=True)
        photos.build(PHOTOS, images)
    return PHOTOS


def measure_recipe(names: Sequence[str], recipe: str, data: Path, settings: dict[str, int]) -> list[Row]:
    """Measure the named contenders in rounds. Returns a row for each. `settings` as of `run`."""
    with _started(names, recipe, data, settings) as contenders:
        run_rounds(contenders, settings)
        ours = next((c for c in contenders if c.name == "ours" and c.status == "ok"), None)
        return [_row(contender, ours, data, settings) for contender in contenders]


@contextlib.contextmanager
def _started(names: Sequence[str], recipe: str, data: Path, settings: dict[str, int]) -> Iterator[list[LoaderProcess]]:
    """Start the contenders' processes one after another, and close them on exit.

    On SIGTERM too, because a stopped process would outlive this one.
    """
    contenders: list[LoaderProcess] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in names:
            contenders.append(
                LoaderProcess(name, recipe, data, settings["batch"], settings["size"], settings["threads"])
            )
        yield contenders
    finally:
        for contender in contenders:
            contender.close()
        signal.signal(signal.SIGTERM, before)


def run_rounds(contenders: Sequence[LoaderProcess], settings: dict[str, int]) -> None:
    """Run a warm-up round, whose figures are dropped, then all rounds. settings: rounds, batches."""
    running = [contender for contender in contenders if contender.status == "ok"]
    for number in range(settings["rounds"] + 1):
        # Every second round runs in reverse order, so that no contender always follows the same one.
        for contender in running if number % 2 else running[::-1]:
            if contender.status != "ok":
                continue
            contender.turn(settings["batches"] if number else max(WARM_UP, settings["batches"]))
            if number == 0:
                contender.rates.clear()
                contender.cpu_ms.clear()


def _row(contender: LoaderProcess, ours: LoaderProcess | None, data: Path, settings: dict[str, int]) -> Row:
    rates, cpu_ms = contender.rates, contender.cpu_ms
    row: Row = {
        "data": data.name,
        "recipe": contender.recipe,
        "contender": contender.name,
        "status": contender.status,
        "note": contender.note,
        **settings,
    }
    if not rates:
        return row | {"images_per_s": None}
    row |= {
        "images_per_s": round(statistics.median(rates), 1),
        "images_per_s_best": round(max(rates), 1),
        "images_per_s_worst": round(min(rates), 1),
        "cpu_ms": round(statistics.fmean(cpu_ms), 3),
    }
    if ours is not None:
        over = intervals.ratio([[rate] for rate in ours.rates], [[rate] for rate in rates])
        row["ours_over"] = round(over.value, 3)
        row["ours_over_low"], row["ours_over_high"] = round(over.low, 3), round(over.high, 3)
        row["ours_over_cpu"] = round(statistics.fmean(cpu_ms) / statistics.fmean(ours.cpu_ms), 3)
    return row


def _measure_stages(recipe: str, data: Path, settings: dict[str, int]) -> dict[str, dict[str, float | None]]:
    """Measure our loader up to each stage.

    Returns:
        Stage -> `images_per_s` up to and including it, and `adds_us`, the processor time per image that it adds (median
        over rounds of the difference from the previous stage), None if that stage failed.
    """
    with _started([f"stage:{name}" for name in STAGES], recipe, data, settings) as contenders:
        run_rounds(contenders, settings)
        stages, previous = {}, [0.0] * settings["rounds"]
        for name, contender in zip(STAGES, contenders, strict=True):
            if contender.status != "ok":  # it adds nothing that is known, nor does the next
                previous = []
                continue
            spent_us = [1e3 * ms for ms in contender.cpu_ms]
            pairs = zip(spent_us, previous, strict=bool(previous))
            added = round(statistics.median(now - before for now, before in pairs), 1) if previous else None
            stages[name] = {"images_per_s": round(statistics.median(contender.rates), 1), "adds_us": added}
            previous = spent_us
        return stages


def _measure_memory(data: Path, settings: dict[str, int], samples: int) -> dict[str, Any]:
    """Measure resident memory of our loader's process in each tenth of a run over `samples` samples.

    The figure of a tenth is the median of many readings, because buffers vary with the sizes of the images.
    """
    turn = max(1, samples // (10 * READINGS) // settings["batch"])
    with _started(["ours"], "crop+randaug", data, settings) as (ours,):
        answers = [[ours.turn(turn) for _ in range(READINGS)] for _ in range(10) if ours.status == "ok"]
    if ours.status != "ok":
        return {"text": f"memory: no figure, the loader ended: {ours.note}"}
    resident = [round(statistics.median(answer["rss_mb"] for answer in tenth), 1) for tenth in answers]
    loaded, growth = 10 * READINGS * turn * settings["batch"], max(resident[2:]) / resident[1] - 1
    text = f"resident MB in each tenth of {loaded} samples: {resident}; grew by {100 * growth:.1f} % after the second"
    return {"text": text, "samples": loaded, "rss_mb": resident, "growth": round(growth, 4)}


def _measure_start_up(samples: int) -> dict[str, Any]:
    """Measure the seconds to the first batch of an index of `samples` samples, in START_UPS processes."""
    with tempfile.TemporaryDirectory(prefix="mvlm-start-") as folder:
        start_up.build(Path(folder) / "data", samples)
        command = [sys.executable, "-m", "mvlm_benchmarks.data.start_up", str(Path(folder) / "data")]
        runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(START_UPS)]
    seconds = [round(run["start_s"], 3) for run in runs]
    cpu_s = statistics.median(run["cpu_s"] for run in runs)
    text = f"{statistics.median(seconds):.2f} s to the first batch of {runs[0]['samples']} samples, without imports"
    text += f"; {len(runs)} processes: {seconds}; {cpu_s:.2f} s of processor time"
    return {"text": text, "samples": runs[0]["samples"], "seconds": seconds, "cpu_s": round(cpu_s, 3)}


def _compare_with_step(step_rate: float, loader_rate: float) -> dict[str, Any]:
    """Compare the loader's images per second with a step's pairs per second."""
    enough = loader_rate >= step_rate
    verdict = "is enough" if enough else f"is too slow: {step_rate / loader_rate:.1f} times these cores are needed"
    text = f"a step takes {step_rate:.0f} pairs/s; the loader's {loader_rate:.0f} images/s on this machine {verdict}"
    return {
        "text": text,
        "step_pairs_per_s": step_rate,
        "loader_images_per_s": loader_rate,
        "loader_over_step": round(loader_rate / step_rate, 3),
    }


def _fastest_step(path: Path) -> float:
    """Pairs per second of the fastest contender in a JSON file of `mvlm bench step`."""
    try:
        rates = [row["pairs_per_s"] for row in json.loads(path.read_text())["rows"] if row.get("pairs_per_s")]
        return float(max(rates))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"step: wanted a JSON file of `mvlm bench step --json`, got {path}: {error!r}") from None
