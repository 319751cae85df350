"""Work in forked processes, alone or as ranks: torch and DALI are imported once, in the parent."""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from random import Random

import torch

# torch imports its compiler with the first checkpointed or compiled function: here once, in place of every fork.
import torch._dynamo


def in_child(work: Callable[[], object]) -> int:
    """Fork a process that calls `work`, without its output, and ends. Returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)  # the threads of the parent's OpenMP are not here: to wait for them takes for ever
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            work()
        code = 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def in_ranks(work: Callable[[], object], size: int) -> list[int]:
    """Fork `size` ranks that can find each other, as torchrun starts them. Returns their ids, by rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    pids = []
    for rank in range(size):
        os.environ["RANK"] = str(rank)
        pids.append(in_child(work))
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"):
        del os.environ[name]
    return pids


def ended_well(pid: int) -> bool:
    """True if the process ended with exit code 0. Waits for it."""
    return os.waitpid(pid, 0)[1] == 0


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def killed(pid: int, seconds: float, rng: Random) -> bool:
    """Kill a process at a random moment of the next `seconds`. False if it had ended before."""
    time.sleep(rng.uniform(0, seconds))
    if os.waitpid(pid, os.WNOHANG)[0] != 0:
        return False
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True
