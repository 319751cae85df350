"""Processor time by thread, page faults and context switches of this process, from Linux."""

import resource
import threading
import time
from dataclasses import dataclass
from pathlib import Path

MAIN, TEAM, LOADER, OTHER = "main", "team", "loader", "other"
GROUPS = (MAIN, TEAM, LOADER, OTHER)
"""Groups of threads. main: the thread that trains. team: OpenMP threads and other native threads. loader: the loader's
own, its resizing and DALI's. other: the watchdog, logging, checkpoints, and threads that have ended."""
_LOADER_NAMES = ("mvlm-loader", "mvlm-resize", "mvlm-fetching", "[DALI]", "PrefetchWorker")


def group_of_thread(name: str, python: bool, main: bool) -> str:
    """Group of a thread, by its Python name (`python`) or its name in Linux."""
    if main:
        return MAIN
    if name.startswith(_LOADER_NAMES):
        return LOADER
    return OTHER if python else TEAM


@dataclass(frozen=True)
class Usage:
    """Counters of this process at one moment, or their differences between two."""

    seconds: float
    """Wall-clock time in seconds."""
    cpu: dict[int, float]
    """Processor seconds of each living thread, by Linux's thread id."""
    groups: dict[int, str]
    """Group of each living thread."""
    cpu_total: float
    """Processor seconds of the process, with those of threads that have ended."""
    page_faults: int
    switches: int
    """Context switches, voluntary or not."""


def read_usage() -> Usage:
    """Read this process's counters: processor time of each thread, page faults, context switches."""
    named = {thread.native_id: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().native_id
    cpu, groups = {}, {}
    for task in Path("/proc/self/task").iterdir():
        thread = int(task.name)
        try:
            # Linux's clock of a thread of this process: its id, and two bits each for the kind of thread and of clock.
            cpu[thread] = time.clock_gettime((~thread << 3) | 6)
            name = named.get(thread) or (task / "comm").read_text().strip()
        except OSError:  # the thread has ended in the meantime
            cpu.pop(thread, None)
            continue
        groups[thread] = group_of_thread(name, thread in named, thread == main)
    counters = resource.getrusage(resource.RUSAGE_SELF)
    return Usage(
        seconds=time.perf_counter(),
        cpu=cpu,
        groups=groups,
        cpu_total=time.process_time(),
        page_faults=counters.ru_minflt + counters.ru_majflt,
        switches=counters.ru_nvcsw + counters.ru_nivcsw,
    )


def usage_between(before: Usage, after: Usage, steps: int) -> dict[str, float]:
    """Use of the machine between two readings, per step.

    Returns:
        `seconds`; `cpu_s` and, for each group of threads, `cpu_GROUP_s`; `page_faults`; `switches`.
    """
    by_group: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    for thread, seconds in after.cpu.items():
        by_group[after.groups[thread]] += seconds - before.cpu.get(thread, 0.0)
    total = after.cpu_total - before.cpu_total
    by_group[OTHER] += total - sum(by_group.values())
    return {
        "seconds": (after.seconds - before.seconds) / steps,
        "cpu_s": total / steps,
        **{f"cpu_{group}_s": by_group[group] / steps for group in GROUPS},
        "page_faults": (after.page_faults - before.page_faults) / steps,
        "switches": (after.switches - before.switches) / steps,
    }
