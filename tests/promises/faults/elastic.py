"""Trials of test_ranks.py with torchrun, which restarts two ranks when one is killed.

Each run has to end with code 0 and with the weights and metrics of the undisturbed run, to the bit. Two of torchrun's
agents on one machine stand for two nodes. Agents and workers are forks of one process that has everything imported:
imports would take most of a trial. tests/mvlm/distributed/test_parallel.py starts torchrun as users do.
"""

import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mvlm import cli
from support.faults import injections
from support.faults.campaign import Campaign, end_of_log, require, require_log
from support.faults.forks import in_child, wait
from support.ports import free_port

SECONDS = 240
"""Timeout; each trial takes a few seconds on an idle machine, and 8 more to notice a dead agent."""


@contextmanager
def agent(
    campaign: Campaign, out: Path, settings: list[str], rank: int = -1, target: str = ""
) -> Iterator[Callable[[int], None]]:
    """The agent of one node, a forked process that starts its workers. All of them log to `out` with suffix .log.

    Yields a function that waits for its end and requires an exit code. On the way out it is ended if it still runs.

    Args:
        settings: torchrun's command line, up to the script.
        rank, target: the rank that is killed in the middle of step 8 of its first attempt: the "worker" alone, or the
            "node", whose agent is killed before it.
    """
    config = campaign.undisturbed(2) / "config.json"
    command = ["pretrain", "--config", str(config), "--out", str(out), "--resume"]
    pid, ended = (
        in_child(lambda: _launch(settings, lambda *_: _work(command, rank, target)), out.with_suffix(".log")),
        [],
    )

    def ends(code: int) -> None:
        ended.append(wait(pid, SECONDS))
        require(ended == [code], f"torchrun ended with {ended}, not {code}: {end_of_log(out)}")

    try:
        yield ends
    finally:
        if not ended:
            os.kill(pid, signal.SIGTERM)  # the agent terminates its workers
            wait(pid, SECONDS)


def _launch(settings: list[str], work: Callable[..., None]) -> None:
    """Be torchrun, whose workers are forks that call `work`."""

    def forked(config: LaunchConfig, entrypoint: Any) -> Callable[..., Any]:
        return elastic_launch(replace(config, start_method="fork"), work)

    with patch.object(torchrun, "elastic_launch", forked):
        torchrun.main([*settings, "script"])


def _work(command: list[str], rank: int, target: str) -> None:
    """Be a worker: `mvlm COMMAND`, with a kill in its first attempt."""
    # A new process has no handlers of signals and of messages.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    logging.root.handlers.clear()
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)

    def end() -> None:
        if target == "node":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == str(rank) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        injections.at_step(8, end)
    sys.argv = ["mvlm", *command]
    cli.main()


def worker_killed(campaign: Campaign, out: Path) -> None:
    """One of two workers gets SIGKILL: torchrun restarts both."""
    settings = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    with agent(campaign, out, settings, 1, "worker") as ends:
        ends(0)
    require_log(out, "resuming from")
    campaign.require_equal(out, ranks=2)


def node_killed(campaign: Campaign, out: Path) -> None:
    """The agent of one of two nodes and its worker get SIGKILL, and a new agent replaces them."""
    port = free_port()
    settings = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--local-addr", "127.0.0.1"]
    settings += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    # An agent without a sign of life for 8 s counts as dead; 15 s is the default.
    settings += ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=8"]
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with agent(campaign, out, settings) as first:
        wait_for(port)  # the first keeps the rendezvous
        with agent(campaign, out, settings, 1, "node") as second:
            second(-signal.SIGKILL)
        with agent(campaign, out, settings) as again:
            again(0)
        first(0)
    del os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"]
    require_log(out, "resuming from")
    campaign.require_equal(out, ranks=2)


def wait_for(port: int) -> None:
    """Wait until a process listens at this port."""
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"no process listens at port {port}")


TRIALS = {"worker killed": worker_killed, "node killed": node_killed}
