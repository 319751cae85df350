"""Trials of test_ranks.py with torchrun, which restarts two ranks when one is killed.

Each run has to end with code 0 and with the weights and metrics of the undisturbed run, to the bit. The processes are
real: two torchrun agents on one machine stand for two nodes.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.faults.campaign import Campaign, end_of_log, require, require_log

WORKER = Path(__file__).with_name("torchrun_worker.py")
SECONDS = 240
"""Timeout; each trial takes about 20 s on an idle machine."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def torchrun(campaign: Campaign, out: Path, *settings: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the agent of one node and its workers; end them on the way out. They log to `out` with suffix .log."""
    words = [sys.executable, "-m", "torch.distributed.run", *settings, str(WORKER), "pretrain"]
    words += ["--config", str(campaign.undisturbed(2) / "config.json"), "--out", str(out), "--resume"]
    with out.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(words, env=os.environ | environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # the agent terminates its workers
            process.wait(60)


def ends(process: "subprocess.Popen[bytes]", out: Path, code: int = 0) -> None:
    """Wait for an agent to end, and require this exit code."""
    try:
        found = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"torchrun did not end within {SECONDS} s: {end_of_log(out)}") from None
    require(found == code, f"torchrun ended with {found}, not {code}: {end_of_log(out)}")


def worker_killed(campaign: Campaign, out: Path) -> None:
    """One of two workers gets SIGKILL: torchrun restarts both."""
    settings = ("--standalone", "--nproc-per-node", "2", "--max-restarts", "2")
    with torchrun(campaign, out, *settings, MVLM_KILL="1 8 worker") as agent:
        ends(agent, out)
    require_log(out, "resuming from")
    campaign.require_equal(out, ranks=2)


def node_killed(campaign: Campaign, out: Path) -> None:
    """The agent of one of two nodes and its worker get SIGKILL, and a new agent replaces them."""
    port = free_port()
    settings = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "2", "--local-addr", "127.0.0.1"]
    settings += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
    # An agent without a sign of life for 8 s counts as dead; 15 s is the default.
    settings += ["--rdzv-conf", "keep_alive_interval=1,keep_alive_max_attempt=8"]
    own_stores = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with torchrun(campaign, out, *settings, **own_stores) as first:
        wait_for(port)  # the first keeps the rendezvous
        with torchrun(campaign, out, *settings, **own_stores, MVLM_KILL="1 8 node") as second:
            ends(second, out, -signal.SIGKILL)
        with torchrun(campaign, out, *settings, **own_stores) as again:
            ends(again, out)
        ends(first, out)
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
