"""Worker that torchrun starts in elastic.py: `python -m mvlm`, which kills itself if MVLM_KILL says so.

MVLM_KILL is "RANK STEP worker" or "RANK STEP node". In the middle of that step of the first attempt, that rank gets
SIGKILL. With "node", its agent gets SIGKILL before it.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.extend(str(Path(__file__).parents[n]) for n in (3, 2))  # in this order: tests/mvlm must not hide mvlm

from mvlm import cli
from support.faults import injections


def end(target: str) -> None:
    if target == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


asked = os.environ.get("MVLM_KILL")
if asked is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    rank, step, target = asked.split()
    if rank == os.environ["RANK"]:
        injections.at_step(int(step), lambda: end(target))
cli.main()
