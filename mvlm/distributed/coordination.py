"""Decisions that all ranks of a run make together: start, stop, fail.

`Notices` are those of one rank to all others, which need no exchange: a failure, and a request to stop. A rank that
fails takes part in no further exchange, and the others would wait for it. It leaves a notice in the store in which the
ranks found each other. Every rank reads the store on a connection of its own.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from mvlm.config.groups import RunConfig, of_recipe
from mvlm.device import chosen_precision
from mvlm.distributed.world import World, join_ranks
from mvlm.errors import ConfigError, LostRankError, RunError
from mvlm_dataloading import DataError, Dataset

T = TypeVar("T")
USER_ERRORS = (ConfigError, RunError, DataError)
"""Errors with a message for the user; others are faults of the program and keep their traceback."""


def run_on_all_ranks(world: World, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return its result. If it fails on one rank, all ranks end.

    A user error is raised on rank 0 alone, so that the user sees one message; the other ranks raise SystemExit(2). Any
    other error is also raised on its own rank, with its traceback.
    """
    try:
        result, error = work(), None
    except Exception as caught:
        result, error = None, caught
    messages = world.gather_objects(None if error is None else str(error))
    if error is not None and (world.first or not isinstance(error, USER_ERRORS)):
        raise error
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    if failed and world.first:
        raise RunError(f"rank {failed[0]}: {messages[failed[0]]}")
    if failed:
        raise SystemExit(2)
    return result  # pyright: ignore[reportReturnType]


TOGETHER = (
    "device", "log_every", "eval_every_steps", "eval_images", "checkpoint_every_steps", "max_bad_steps",
    "failed_step_mb", "extend_to",
)  # fmt: skip
"""Settings that are not part of the recipe of a run, and must still be equal on all ranks.

NOTE: each rank derives from them alone at which step its next collective is. Ranks with other values wait for ever.
"""


def check_ranks(world: World, config: RunConfig, dataset: Dataset, further: dict[str, Any]) -> None:
    """Check that all ranks have the same settings and data. If not, rank 0 raises RunError and the others end.

    further: further data sets, or other objects with a `fingerprint`, or None, by their names in messages.
    """
    settings = config.to_dict()
    own = {f"model.{name}": value for name, value in settings.pop("model").items()}
    own |= {name: value for name, value in settings.items() if name in TOGETHER or of_recipe(name)}
    own |= {"out": str(config.out), "data": dataset.fingerprint}
    own |= {name: None if data is None else data.fingerprint for name, data in further.items()}
    # What "auto" stands for may differ from machine to machine.
    own["device in use"] = world.device.type
    own["precision in use"] = chosen_precision(world.device, config.precision)
    check_same(world, own)


def check_same(
    world: World, own: dict[str, Any], advice: str = "name --device and --precision where their machines differ"
) -> None:
    """Check that the ranks agree on some named values. If not, rank 0 raises RunError and the others end.

    Args:
        own: this rank's values by name, plain values for JSON.
        advice: for the message: what else to do than to start the same command on the same data.
    """
    by_rank = world.gather_objects(own)

    def compare() -> None:
        for rank, other in enumerate(by_rank):
            pairs = [(name, by_rank[0].get(name), other.get(name)) for name in by_rank[0] | other]
            differing = [f"{name}: rank 0 has {a}, rank {rank} has {b}" for name, a, b in pairs if a != b]
            if differing:
                raise RunError(
                    f"rank {rank} was started with other settings or data than rank 0 ({'; '.join(differing)}); start "
                    f"all ranks with the same command on the same data, and {advice}"
                )

    run_on_all_ranks(world, compare)


SHARED_SECONDS = 30.0
"""Longest time until a file of one node is seen on another one: network disks keep what they have read for a while."""


def check_shared(world: World, folder: Path) -> None:
    """Check that a folder is the same on all ranks. If not, rank 0 raises RunError and the others end.

    Rank 0 writes an empty file with a random name in it, for which the others look.
    """
    if world.size == 1:
        return
    token = run_on_all_ranks(world, lambda: _leave_token(folder) if world.first else "")
    name = world.gather_objects(token)[0]
    missing = world.gather_objects(None if _appears(folder / name) else socket.gethostname())
    if world.first:
        (folder / name).unlink(missing_ok=True)
    lost = [(rank, host) for rank, host in enumerate(missing) if host is not None]

    def judge() -> None:
        if lost:
            rank, host = lost[0]
            more = f", nor do {len(lost) - 1} more" if len(lost) > 1 else ""
            raise RunError(
                f"{folder}: wanted a folder that all ranks share, found that rank {rank} on {host} does not see what "
                f"rank 0 on {socket.gethostname()} writes there{more}; give an --out on a shared disk"
            )

    run_on_all_ranks(world, judge)


def _leave_token(folder: Path) -> str:
    name = f".shared-{secrets.token_hex(8)}"
    (folder / name).touch(exist_ok=False)
    return name


def _appears(file: Path) -> bool:
    """True if a file is there, or appears within `SHARED_SECONDS`."""
    until = time.monotonic() + SHARED_SECONDS
    while not file.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
        for place in (file.parent.parent, file.parent):  # a listing makes a network disk look again
            with contextlib.suppress(OSError):
                os.listdir(place)
    return True


@contextmanager
def joined_ranks(device: str) -> Iterator[World]:
    """Context with the ranks that torchrun started, or with a world of one. LostRankError if another rank is gone."""
    world = join_ranks(device)
    with naming_lost_ranks(world, lambda: None, "Start all ranks again"):
        yield world
    world.close()


@contextmanager
def naming_lost_ranks(world: World, failure: Callable[[], str | None], advice: str) -> Iterator[None]:
    """Context that raises LostRankError if a collective fails because another rank is gone.

    Args:
        failure: returns the failure that the other rank has reported; None if it has reported none.
        advice: what to do, for the message.
    """
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not is_lost_rank(error):
            raise
        reason = failure() or f"{str(error).splitlines()[0]}; that rank's log says why"
        raise LostRankError(f"rank {world.rank} lost another rank and ends too ({reason}). {advice}") from error


def is_lost_rank(error: RuntimeError) -> bool:
    """True if a collective failed because another rank is gone.

    NCCL and the store raise their own exception classes. Gloo raises RuntimeError, recognised by its message.
    """
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)


POLL_SECONDS = 1.0
"""Least time between two reads of the ranks' store."""
TIMEOUT = timedelta(seconds=20)


class Notices:
    """Context that reports an exception of its block to the other ranks, and announces requests to stop.

    With one rank, nothing is sent or read. `join_ranks` made the world, so the address of the store is in the
    environment.
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
        """Write a notice to the store of the ranks, unless one of this name is there already."""
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
