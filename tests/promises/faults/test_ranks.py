"""Runs on several ranks: restarted by torchrun, resumed on other numbers of ranks, sharded, and on a full disk.

Each test is a trial of ranks.py or elastic.py, in forks of one process that has everything imported.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.seaweed import weed

pytestmark = pytest.mark.slow
SERVER = Path(__file__).with_name("ranks.py")


@pytest.fixture(scope="module")
def trial() -> Iterator[Callable[[str], None]]:
    """A function that does a trial by name, in a process that all trials share. It raises AssertionError on failure."""
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        asking, answers = process.stdin, process.stdout
        assert asking is not None
        assert answers is not None

        def do(name: str) -> None:
            asking.write(name + "\n")
            answer = answers.readline()
            assert answer, "the process ended"
            failure = json.loads(answer)
            assert failure is None, failure

        yield do


@pytest.mark.extended
def test_torchrun_restarts_a_run_after_a_worker_is_killed(trial):
    trial("worker killed")


@pytest.mark.extended
def test_a_node_that_is_killed_is_replaced(trial):
    trial("node killed")


@pytest.mark.parametrize(
    "ranks, parallel",
    [("1 to 2", "fsdp"), ("2 to 1", "fsdp"), pytest.param("2 to 1", "ddp", marks=pytest.mark.extended)],
)
def test_a_run_resumes_on_another_number_of_ranks(trial, ranks, parallel):
    trial(f"{ranks}, {parallel}")


def test_a_run_from_a_bucket_is_killed_and_resumes_elsewhere_on_one_rank(trial):
    weed()
    pytest.importorskip("webdataset")
    trial("linked")


@pytest.mark.extended
@pytest.mark.parametrize("sources", ["view of links", "links and a folder"])
def test_a_weighted_view_trains_and_goes_on_on_another_number_of_ranks(trial, sources):
    pytest.importorskip("webdataset")
    trial(sources)


@pytest.mark.extended
def test_a_bucket_that_is_away_during_training_costs_one_line(trial):
    weed()
    pytest.importorskip("webdataset")
    trial("store away")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.extended)], ids="{} ranks".format)
def test_a_run_goes_on_from_its_copies_in_a_bucket(trial, ranks):
    weed()
    pytest.importorskip("obstore")
    trial(f"mirror, {ranks}")


def test_a_run_killed_on_four_ranks_goes_on_with_two_and_accumulates(trial):
    trial("4 to 2")


@pytest.mark.extended
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_last_checkpoint_is_not_written_says_so_and_can_resume(trial, ranks):
    trial(f"last save, {ranks}")


@pytest.mark.extended
def test_sharded_weights_and_their_average_resume_exactly_and_equal_ddps(trial):
    trial("average")


@pytest.mark.extended
def test_the_average_of_sharded_weights_is_evaluated_during_training(trial):
    trial("evaluated average")


@pytest.mark.extended
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_learns_the_same_on_two_ranks_as_on_one(trial, parallel):
    trial(f"bf16, {parallel}")


@pytest.mark.extended
@pytest.mark.parametrize("rank, end", [(0, "hangs"), (1, "ends")])
def test_a_rank_that_fails_between_exchanges_ends_the_others_in_seconds(trial, rank, end):
    trial(f"failed rank, {rank}, {end}")


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.extended)])
def test_a_stop_during_an_evaluation_ends_it_and_leaves_a_checkpoint(trial, ranks):
    trial(f"stopped evaluation, {ranks}")
