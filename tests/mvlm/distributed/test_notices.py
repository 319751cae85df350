"""Notices of ranks to each other, through a store in this process."""

import pytest
import torch
import torch.distributed as dist

from mvlm.distributed import notices as module
from mvlm.distributed.notices import Notices
from mvlm.distributed.world import World


@pytest.fixture
def store(monkeypatch):
    """The store of three ranks, which torchrun's agent keeps. Notices are read at once."""
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True)  # pyright: ignore[reportPrivateImportUsage]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.0)
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


def test_a_failure_of_this_rank_is_no_news(store):
    failing, other = of_rank(1), of_rank(2)
    with pytest.raises(KeyboardInterrupt):
        fail(failing, KeyboardInterrupt())
    with other:
        assert other.failure() == "rank 1: KeyboardInterrupt"
    assert failing.failure() is None


def test_an_exit_that_another_rank_asked_for_is_no_failure(store):
    with pytest.raises(SystemExit):
        fail(of_rank(1), SystemExit(2))
    with of_rank(0) as other:
        assert other.failure() is None


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


def test_notices_are_read_at_most_once_a_second(store, monkeypatch):
    monkeypatch.setattr(module, "POLL_SECONDS", 1.0)
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    with of_rank(0) as other:
        assert other.failure() is None
        with pytest.raises(ValueError, match="x"):
            fail(of_rank(1), ValueError("x"))
        clock[0] = 100.9
        assert other.failure() is None
        clock[0] = 101.0
        assert other.failure() == "rank 1: ValueError: x"


def test_a_world_of_one_sends_nothing():
    alone = of_rank(0, size=1)
    with alone:
        assert alone.failure() is None
        assert not alone.stop_requested(False)
        assert alone.stop_requested(True)
    with pytest.raises(ValueError, match="x"):
        fail(alone, ValueError("x"))
