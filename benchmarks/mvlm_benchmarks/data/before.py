"""Images a second that the loader makes of a built folder, beside those of an earlier checkout, in turns.

    git worktree add ../before de59c636
    python -m mvlm_benchmarks.data.before --before ../before [--rounds 11] [--batches 16] [--json FILE]

Both loaders read the same JPEGs with two threads. As in `mvlm bench data` each is a process that is stopped while the
other one runs, and every second round runs in reverse order. A ratio is this tree's speed over the checkout's. It is
taken within each round, by the clock and by the processor's time: on a busy machine the second one tells more.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mvlm.errors import ConfigError
from mvlm_benchmarks import intervals, machine
from mvlm_dataloading.files import write_json

from .photos import build
from .process import LoaderProcess
from .run import run_rounds
from .worker import RECIPES

TREE = Path(__file__).parents[3]
_FOLDERS = ("", "kernels", "dataloading", "benchmarks")  # of a checkout, with its packages


def environment_of(tree: Path) -> dict[str, str]:
    """Variables with which a process imports the packages of a checkout, if it starts there.

    Raises:
        ConfigError: such a process imports others.
    """
    found = os.environ | {"PYTHONPATH": os.pathsep.join(str(tree / folder) for folder in _FOLDERS)}
    code = "import mvlm_benchmarks.data.worker as a, mvlm_dataloading as b; print(a.__file__); print(b.__file__)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tree, env=found, capture_output=True, text=True, check=False)
    files = done.stdout.splitlines()
    if done.returncode or not all(Path(file).is_relative_to(tree) for file in files):
        raise ConfigError(
            f"{tree}: wanted a checkout of this repository with its loader and benchmarks, found "
            f"{', '.join(files) or 'none'}; `git worktree add` makes one"
        )
    return found


def measure(
    data: Path, before: Path, recipes: tuple[str, ...], settings: dict[str, int], tree: Path = TREE
) -> list[dict[str, Any]]:
    """A row of ratios of each recipe. settings: rounds, batches, batch, size."""
    trees = {one: environment_of(one) for one in (before.resolve(), tree.resolve())}
    rows = []
    for recipe in recipes:
        loaders, numbers = list[LoaderProcess](), (settings["batch"], settings["size"])
        try:
            for one, environment in trees.items():
                loaders.append(LoaderProcess("ours", recipe, data.resolve(), *numbers, 2, environment, one))
            run_rounds(loaders, settings)
        finally:
            for loader in loaders:
                loader.close()
        for loader, one in zip(loaders, trees, strict=True):
            if loader.status != "ok":
                raise ConfigError(f"{one}: wanted a loader that runs, found {loader.note}; choose another commit")
        rows.append({"recipe": recipe} | compare(*loaders))
    return rows


def compare(before: LoaderProcess, now: LoaderProcess) -> dict[str, Any]:
    """Rates of two loaders, and ratios of their speeds by the clock and by the processor's time."""
    found: dict[str, Any] = {}
    for name, loader in (("before", before), ("now", now)):
        found[f"images_per_s_{name}"] = [round(one, 1) for one in loader.rates]
        found[f"processor_ms_{name}"] = [round(one, 4) for one in loader.cpu_ms]
    times = [[[1 / rate] for rate in loader.rates] for loader in (before, now)]
    spent = [[[one] for one in loader.cpu_ms] for loader in (before, now)]
    for name, pair in (("by_clock", times), ("by_processor", spent)):
        value, low, high, _ = intervals.ratio(pair[0], pair[1])
        of_rounds = [round(a / b, 4) for (a,), (b,) in zip(*pair, strict=True)]
        found[name] = {"ratio": round(value, 4), "low": round(low, 4), "high": round(high, 4), "of_rounds": of_rounds}
    return found


def commit_of(tree: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="Checkout of the earlier commit.")
    parser.add_argument("--data", type=Path, help="Built folder. Default: generated JPEGs.")
    for name, value in (
        ("images", 2000), ("rounds", 11), ("batches", 16), ("batch", 64), ("size", 224),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    settings = {name: getattr(given, name) for name in ("rounds", "batches", "batch", "size")}
    with tempfile.TemporaryDirectory(prefix="mvlm-before-") as work:
        if (data := given.data) is None:
            build(data := Path(work, "photos"), given.images)
        rows = measure(data, given.before, tuple(given.recipes), settings)
    found = {"before": commit_of(given.before), "settings": settings, "rows": rows}
    found["machine"] = machine.describe("cpu", ["nvidia-dali-cuda130", "numpy"])
    print(json.dumps(found, indent=1))
    if given.json is not None:
        write_json(given.json, found)


if __name__ == "__main__":
    main()
