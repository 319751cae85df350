"""Trials by name, for tests that each ask for one: they share a process that has everything imported."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from campaign import Campaign, Failed


def serve(trials: dict[str, Callable[[Campaign, Path], None]]) -> None:
    """Do the trials whose names come by stdin, a line each; answer each with a line of JSON, null or why it failed.

    A trial gets a folder of its own that is not there yet. What else is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="mvlm-trials-") as folder:
        campaign = Campaign(Path(folder))
        for number, line in enumerate(sys.stdin):
            try:
                trials[line.strip()](campaign, Path(folder) / f"trial-{number}")
                answers.write("null\n")
            except (Failed, TimeoutError) as error:
                answers.write(json.dumps(str(error)) + "\n")
