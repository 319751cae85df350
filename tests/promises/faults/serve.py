"""Server of the trials of test_ranks.py: all of them share one process that has everything imported.

echo "1 to 2, ddp" | python tests/promises/faults/serve.py
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

import elastic
import ranks

from support.faults.campaign import Campaign, Failed

TRIALS = ranks.TRIALS | elastic.TRIALS


def main() -> None:
    """Read names of trials from stdin, one a line. Answer each with a line of JSON: null, or why the trial failed.

    Each trial gets the name of a new folder. All other output goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="mvlm-trials-") as folder:
        campaign = Campaign(Path(folder))
        for number, line in enumerate(sys.stdin):
            try:
                TRIALS[line.strip()](campaign, Path(folder) / f"trial-{number}")
                answers.write("null\n")
            except (Failed, TimeoutError) as error:
                answers.write(json.dumps(str(error)) + "\n")


if __name__ == "__main__":
    main()
