"""Waits of OpenMP's threads: they spin on an idle machine, and sleep where other processes want the cores.

Threads of libgomp, which torch's CPU builds have, spin until the last one has finished its part. If another process has
the core of that one, they spin for its whole time slice: two threads then make a tenth of the steps of one.
"""

import os
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

SLEEP = {"GOMP_SPINCOUNT": "1000"}
"""Variable that limits for how many rounds a waiting thread of libgomp spins before it sleeps: some microseconds.

libgomp reads it once, when torch is imported.
"""
SAMPLES, PAUSE = 5, 0.002


def busy_others(read: Callable[[], str] = Path("/proc/loadavg").read_text) -> int:
    """Number of other threads on the machine that run or wait for a core: the median of a few moments. 0 if unknown."""
    found = []
    for _ in range(SAMPLES):
        try:
            found.append(int(read().split()[3].split("/")[0]) - 1)  # this process is one
        except (OSError, ValueError, IndexError):
            return 0
        time.sleep(PAUSE)
    return max(0, sorted(found)[SAMPLES // 2])


def let_threads_sleep(environment: MutableMapping[str, str], others: int, cores: int) -> str | None:
    """Set variables in `environment` by which waiting OpenMP threads sleep, if other processes want the cores.

    Call it before torch is imported. Returns a sentence for the user; None if nothing was changed, as when the
    environment already has a variable for it.

    Args:
        others: busy threads of other processes.
        cores: cores that this process may use.
    """
    threads = int(own) if (own := environment.get("OMP_NUM_THREADS", "")).isdigit() else cores
    if others + threads <= cores or threads < 2 or {"OMP_WAIT_POLICY", *SLEEP} & environment.keys():
        return None
    environment.update(SLEEP)
    return (
        f"{others} other threads are busy on {cores} cores: ours sleep where they wait. If that lasts, "
        f"OMP_NUM_THREADS={max(1, cores - others)} is as fast"
    )


NOTICE: list[str] = []
"""Sentences on what `prepare` changed, to be said by a command that computes for long."""


def prepare() -> None:
    """Let OpenMP's threads sleep while they wait if the machine is busy now; called once, at the start of a command."""
    if notice := let_threads_sleep(os.environ, busy_others(), len(os.sched_getaffinity(0))):
        NOTICE.append(notice)
