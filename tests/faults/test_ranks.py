"""One run on another number of ranks, split weights and their average, bf16 on two, and a last save that fails."""

import pytest


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("ranks", ["1 to 2", "2 to 1"])
def test_a_run_goes_on_with_another_number_of_ranks(trial, ranks, parallel):
    trial(f"{ranks}, {parallel}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_can_be_resumed(trial, ranks):
    trial(f"last save, {ranks}")


def test_split_weights_and_their_average_resume_exactly_and_are_those_of_ddp(trial):
    trial("average")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_bf16_on_two_ranks_learns_what_it_does_on_one(trial, parallel):
    trial(f"bf16, {parallel}")
