"""What torchrun starts in elastic.py: `python -m mvlm`, and in it the end of a process, if MVLM_KILL asks for one.

MVLM_KILL is "RANK STEP worker" or "RANK STEP node": in the middle of that step of the first attempt that rank gets
SIGKILL, and with "node" its agent gets one before it.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import zygote

from mvlm import cli


def end(what: str) -> None:
    if what == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


asked = os.environ.get("MVLM_KILL")
if asked is not None and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    rank, step, what = asked.split()
    if rank == os.environ["RANK"]:
        zygote.at_step(int(step), lambda: end(what))
cli.main()
