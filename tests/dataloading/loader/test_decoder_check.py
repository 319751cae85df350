"""The choice of a way of decoding. Trials on a GPU are simulated, as there may be none."""

import json
import subprocess

import pytest

from mvlm_dataloading.loader import decoder_check
from mvlm_dataloading.loader.pipeline import Decoding


def result(difference: float) -> tuple[int, str]:
    """Exit code and output of a trial whose pixels differ so much from the CPU's."""
    return 0, f"dlopen says hello\n{json.dumps({'worst_difference': difference})}\n"


GOOD, BLACK_IMAGES, KILLED = result(1.3), result(96.4), (-11, "")
BAD = [KILLED, BLACK_IMAGES, result(float("nan")), (1, ""), (0, ""), (0, "hello\n"), subprocess.TimeoutExpired("", 300)]


@pytest.mark.slow
def test_a_trial_runs_in_its_own_process():
    """On the CPU, whose pixels are equal to themselves; nothing is simulated."""
    assert decoder_check.find_fault(Decoding.CPU, "cpu") is None


@pytest.mark.parametrize(
    "outcomes, chosen",
    [
        ([GOOD], Decoding.GPU_CROP),
        *(([bad, GOOD], Decoding.GPU_FULL_IMAGE) for bad in BAD),
        ([KILLED, BLACK_IMAGES], Decoding.CPU),
    ],
)
def test_the_first_way_of_decoding_whose_trial_succeeds_is_chosen(monkeypatch, outcomes, chosen):
    upcoming = iter(outcomes)

    def run(command, **_):
        outcome = next(upcoming)
        if isinstance(outcome, Exception):
            raise outcome
        code, printed = outcome
        return subprocess.CompletedProcess(command, code, printed, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert decoder_check.choose_decoding.__wrapped__(0) is chosen
