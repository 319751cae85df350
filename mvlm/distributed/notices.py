"""Notices of one rank to all others, which need no exchange: a failure, and a request to stop.

A rank that fails takes part in no further exchange, and the others would wait for it. It leaves a notice in the store
in which the ranks found each other. Every rank reads the store on a connection of its own.
"""

import contextlib
import os
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from mvlm.distributed.world import World

POLL_SECONDS = 1.0
"""The store is read at most this often."""
TIMEOUT = timedelta(seconds=20)


class Notices:
    """Context that reports an exception of its block to the other ranks. With one rank, nothing is sent or read.

    `join_ranks` made the world, so the address of the store is in the environment.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._store: Any = None
        self._read_at: dict[str, float] = {}
        self._found: dict[str, str] = {}

    def __enter__(self) -> "Notices":
        if self._world.size > 1:
            self._store = self._connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if self._store is None or error is None or isinstance(error, SystemExit):
            return  # a rank that exits was told to by another one
        words = " ".join(str(error).split())
        self._post("failure", f"rank {self._world.rank}: {type(error).__name__}{': ' if words else ''}{words}")
        if self._world.first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            time.sleep(2 * POLL_SECONDS)  # the store ends with this process: let the others read it first

    def failure(self) -> str | None:
        """The first failure, if another rank reported it: the rank, and its error on one line. Else None."""
        found = self._read("failure")
        return None if found is None or found.startswith(f"rank {self._world.rank}:") else found

    def stop_requested(self, here: bool) -> bool:
        """True if this rank (`here`) or any other rank has been asked to stop. This rank's request is announced."""
        if here and self._store is not None:
            self._post("stop", f"rank {self._world.rank}")
        return here or self._read("stop") is not None

    @staticmethod
    def _connect() -> PrefixStore:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: a request on the process group's may wait for minutes, and others wait behind it.
        store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]
        return PrefixStore(f"notices_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def _post(self, name: str, text: str) -> None:
        """Write a notice, unless there is one already."""
        with contextlib.suppress(dist.DistError):  # the store is gone with its rank; the others find that out too
            self._store.compare_set(name, "", text)

    def _read(self, name: str) -> str | None:
        now = time.monotonic()
        if self._store is None or name in self._found or now - self._read_at.get(name, -POLL_SECONDS) < POLL_SECONDS:
            return self._found.get(name)
        self._read_at[name] = now
        try:
            if self._store.check([name]):
                self._found[name] = self._store.get(name).decode()
        except dist.DistError:
            if name == "failure":
                self._found[name] = "the store of the ranks is gone, and with it rank 0 or its node"
        return self._found.get(name)
