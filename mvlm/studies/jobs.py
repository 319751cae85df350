"""Several processes on one machine that share a study's trials."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import torch

from mvlm.errors import RunError


def run_jobs(words: Sequence[str], part: tuple[int, int], jobs: int) -> None:
    """Run `mvlm study WORDS` in several processes, each with its share of a part's trials, and wait for all of them.

    On a CPU each process gets an equal share of the cores. On GPUs each gets one of them, in turn. Each line of output
    begins with the number of its process. SIGTERM and Ctrl-C are passed on, so that trials save their state and stop; a
    second one ends them at once.

    Args:
        words: file and options, without --part and --jobs.
        part: (i, n), as for `run_study`.

    Raises:
        RunError: a process failed. The others have ended.
    """
    number, parts = part
    running = []
    for job in range(jobs):
        command = [sys.executable, "-m", "mvlm", "study", *words, "--part", f"{number + parts * job}/{parts * jobs}"]
        running.append(
            subprocess.Popen(
                command,
                env=_environment(job, jobs),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
        )
    # One that is ignored stays so: SIGHUP under nohup, SIGINT of a script's background job.
    handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    stops = [number for number in handled if signal.getsignal(number) is not signal.SIG_IGN]
    before = [signal.signal(number, lambda *_: [process.terminate() for process in running]) for number in stops]
    relays = [threading.Thread(target=_relay, args=(job, process)) for job, process in enumerate(running, 1)]
    try:
        for relay in relays:
            relay.start()
        for relay in relays:
            relay.join()
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()  # does nothing to a process that has ended
        for number, handler in zip(stops, before, strict=True):
            signal.signal(number, handler)
    failed = [job for job, code in enumerate(codes, 1) if code != 0]
    if failed:
        raise RunError(
            f"processes of the study: wanted all {jobs} to end well, found an error in number "
            f"{', '.join(map(str, failed))}; its reason is above, and the same command continues"
        )


def _environment(job: int, jobs: int) -> dict[str, str]:
    """Environment of a process: its threads, or its GPU."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1"}
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        gpus = visible.split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[job % len(gpus)]
    return environment


def _relay(job: int, process: "subprocess.Popen[str]") -> None:
    """Print a process's lines behind its number."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"[{job}] {line}", end="", flush=True)
