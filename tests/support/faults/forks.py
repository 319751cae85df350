"""Work in forked processes, alone or as ranks: torch and DALI are imported once, in the parent.

The parent must not start threads before it forks.
"""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch

# torch imports its compiler with the first optimizer and the first checkpointed function: here once, in place of every
# fork.
import torch._dynamo

from support.ports import free_port


def in_child(work: Callable[[], object], log: Path | None = None) -> int:
    """Fork a process, in a process group of its own, that calls `work`. Returns its id.

    It ends with the code that `work` returns, 0 for anything that is no number, and 1 after an exception.

    Args:
        log: file that its output and errors are appended to. Without it the output is dropped, errors are not.
    """
    pid = os.fork()
    if pid:
        with contextlib.suppress(OSError):  # parent and child both set it, because either may be first
            os.setpgid(pid, pid)
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        torch.set_num_threads(1)  # the threads of the parent's OpenMP are not here: to wait for them takes for ever
        output = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        if log is not None:
            os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        ended = work()
        code = ended if isinstance(ended, int) else 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def in_ranks(work: Callable[[], object], size: int, log: Path | None = None) -> list[int]:
    """Fork `size` ranks that can find each other, as torchrun starts them. Returns their ids, by rank.

    Args:
        log: file of the output and errors of all.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    pids = []
    for rank in range(size):
        os.environ["RANK"] = str(rank)
        pids.append(in_child(work, log))
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        del os.environ[name]
    return pids


def wait(pid: int, seconds: float = 600.0) -> int:
    """Exit code of a process, or minus the signal that ended it.

    After `seconds` the process is killed and TimeoutError is raised.
    """
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} did not end within {seconds} s")


def ended_well(pid: int) -> bool:
    """True if the process ended with exit code 0. Waits for it."""
    return os.waitpid(pid, 0)[1] == 0


def killed(pid: int, seconds: float, rng: Random) -> bool:
    """Kill a process at a random moment of the next `seconds`. False if it had ended before."""
    time.sleep(rng.uniform(0, seconds))
    if os.waitpid(pid, os.WNOHANG)[0] != 0:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True
