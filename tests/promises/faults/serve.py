"""The trials of test_ranks.py, asked for by name; they share a process that has everything imported.

echo "1 to 2, ddp" | python tests/promises/faults/serve.py
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import elastic
import ranks
from campaign import Campaign, Failed

TRIALS = ranks.TRIALS | elastic.TRIALS


def main() -> None:
    """Do the trials whose names come by stdin, a line each; answer each with a line of JSON, null or why it failed.

    A trial gets a folder of its own that is not there yet. What else is printed goes to stderr.
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
