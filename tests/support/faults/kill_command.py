"""The command line of the scripts that kill processes, or disturb them, at random moments."""

import argparse
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mvlm_dataloading.files import write_json


def run_kills(
    run_trials: Callable[[Path, int, random.Random], str | dict[str, Any] | None],
    doc: str | None,
    what: str,
    kills: int,
) -> int:
    """Run the trials in a temporary folder, print the fault. Returns the exit code.

    The command line has a number of kills, --seed, and --json, a file for the figures.

    Args:
        run_trials: called with a folder, a number of kills and a source of random moments. Returns a fault, figures
            or None. An AssertionError is a fault too.
        doc: docstring of the script, whose first line describes it.
        what: things that are killed, for --help.
        kills: default of their number.
    """
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=kills, help=what)
    parser.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    parser.add_argument("--json", type=Path, help="file for the figures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mvlm-faults-") as folder:
        found = run_trials(Path(folder), given.kills, random.Random(given.seed))
    if isinstance(found, str):
        print(found)
        return 1
    if given.json:
        write_json(given.json, found)
    return 0
