"""The command line of the scripts that kill processes at random moments."""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path


def run_kills(
    run_trials: Callable[[Path, int, random.Random], str | None], doc: str | None, what: str, kills: int
) -> int:
    """Parse --kills and --seed, run the trials in a temporary folder, print the fault. Returns the exit code.

    Args:
        run_trials: called with a folder, a number of kills and a source of random moments; returns a fault, or None.
        doc: docstring of the script, whose first line describes it.
        what: things that are killed, for --help.
        kills: default of --kills.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=kills, help=what)
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fault = run_trials(Path(folder), arguments.kills, random.Random(arguments.seed))
    if fault is not None:
        print(fault)
    return int(fault is not None)
