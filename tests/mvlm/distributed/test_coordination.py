"""Decisions of several ranks and their notices. Two threads stand for ranks, and exchange values in this process."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mvlm.distributed import coordination
from mvlm.distributed.coordination import Notices, check_ranks, run_on_all_ranks
from mvlm.distributed.world import World
from mvlm.errors import ConfigError, RunError
from mvlm_dataloading import open_dataset
from support.models import pretrain_config
from support.scenes import write_scenes


@dataclass
class Meeting:
    """Exchange of values among threads: a collective returns the values of all, by rank, once all have arrived."""

    size: int = 2
    values: dict[int, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)
        self.lock = threading.Lock()

    def exchange(self, number: int, rank: int, value: Any) -> list[Any]:
        with self.lock:
            self.values.setdefault(number, [None] * self.size)[rank] = value
        self.barrier.wait()
        return self.values[number]


class Rank:
    """One of two ranks, with the methods of World that decisions use."""

    size, device = 2, torch.device("cpu")

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank, self.first, self._meeting, self._number = rank, rank == 0, meeting, 0

    def gather_objects(self, value: Any, group: Any = None) -> list[Any]:
        self._number += 1
        return self._meeting.exchange(self._number, self.rank, value)


def on_two_ranks(work: Callable[[Any], Any]) -> list[Any]:
    """Result or exception of `work` on each of two ranks."""
    meeting = Meeting()
    found: list[Any] = [None, None]

    def one(rank: int) -> None:
        try:
            found[rank] = work(Rank(rank, meeting))
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_on_one_rank_ends_all_ranks(failing):
    def work(world):
        def step() -> int:
            if world.rank == failing:
                raise ConfigError(f"no room on {world.rank}")
            return world.rank

        return run_on_all_ranks(world, step)

    first, second = on_two_ranks(work)
    assert isinstance(first, ConfigError if failing == 0 else RunError)
    assert str(first) == ("no room on 0" if failing == 0 else "rank 1: no room on 1")
    assert isinstance(second, SystemExit)
    assert second.code == 2


def test_each_rank_gets_its_own_result_or_its_own_fault_of_the_program():
    assert on_two_ranks(lambda world: run_on_all_ranks(world, lambda: world.rank * 10)) == [0, 10]
    first, second = on_two_ranks(lambda world: run_on_all_ranks(world, lambda: 1 // world.rank))
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, SystemExit)


DIFFERENT = {"seed": 5, "checkpoint_every_steps": 3, "eval_every_steps": 2}


@pytest.mark.parametrize("what", [*DIFFERENT, "out", "data", "validation", "precision in use", None])
def test_ranks_with_different_settings_or_data_all_end(scenes, tmp_path, monkeypatch, what):
    other = write_scenes(tmp_path / "other", {"train": 9, "validation": 3})

    def work(world):
        changed = what if world.rank == 1 else None
        settings = {changed: DIFFERENT[changed]} if changed in DIFFERENT else {}
        out = tmp_path / ("there" if changed == "out" else "run")
        data = {split: other if changed == split else scenes for split in ("data", "validation")}
        config = pretrain_config(scenes, out, precision="auto", **settings)
        further = {"validation": open_dataset(data["validation"], "validation"), "classes": None}
        return check_ranks(world, config, open_dataset(data["data"], "train"), further)

    if what == "precision in use":  # the machine of one rank computes bf16 in hardware
        machines = iter(("bf16", "fp32"))
        monkeypatch.setattr(coordination, "chosen_precision", lambda *_: next(machines))
    first, second = on_two_ranks(work)
    if what is None:
        assert (first, second) == (None, None)
        return
    assert isinstance(first, RunError)
    assert isinstance(second, SystemExit)
    assert f"{what}: rank 0 has " in str(first)


@pytest.fixture
def store(monkeypatch):
    """The store of three ranks, which torchrun's agent keeps. Notices are read at once."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(coordination, "POLL_SECONDS", 0.0)
    return kept


def of_rank(rank: int, size: int = 3) -> Notices:
    return Notices(World(rank=rank, size=size, local_rank=rank, device=torch.device("cpu")))


def fail(notices: Notices, error: BaseException) -> None:
    with notices:
        raise error


def test_the_first_failure_is_told_to_all_other_ranks(store):
    with of_rank(0) as first, of_rank(2) as last:
        assert first.failure() is last.failure() is None
        with pytest.raises(ValueError, match="broken"):
            fail(of_rank(1), ValueError("a broken\nthing"))
        with pytest.raises(RuntimeError):
            fail(of_rank(2), RuntimeError("lost rank 1"))
        assert first.failure() == last.failure() == "rank 1: ValueError: a broken thing"
        assert not first.stop_requested(False)


def test_a_stop_of_one_rank_is_one_of_all(store):
    with of_rank(0) as first, of_rank(1) as second:
        assert not first.stop_requested(False)
        assert second.stop_requested(True)
        assert first.stop_requested(False)
        assert first.failure() is None


def test_an_attempt_does_not_see_the_notices_of_the_one_before(store, monkeypatch):
    with pytest.raises(ValueError, match="x"):
        fail(of_rank(1), ValueError("x"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with of_rank(0) as other:
        assert other.failure() is None
