"""The choice of a way of decoding, with simulated trials, as there may be no GPU."""

import json
import subprocess

import pytest

from mvlm_dataloading.loader import decoder_check
from mvlm_dataloading.loader.pipeline import Decoding


@pytest.fixture
def outcomes(monkeypatch):
    """Outcomes of the next trials, and the commands that were run."""
    planned, commands = [], []

    def run(command, **settings):
        commands.append(command)
        assert settings["timeout"] > 60
        outcome = planned.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        code, stdout, stderr = outcome
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    monkeypatch.setattr(decoder_check.subprocess, "run", run)
    decoder_check.choose_decoding.cache_clear()
    yield planned, commands
    decoder_check.choose_decoding.cache_clear()


def result(difference: float) -> tuple[int, str, str]:
    return 0, f"dlopen says hello\n{json.dumps({'worst_difference': difference})}\n", ""


GOOD = result(1.3)
BAD = {
    "killed by signal 11": (-11, "", ""),
    "failed: RuntimeError: no decoder": (1, "", "Traceback\nRuntimeError: no decoder\n"),
    "failed: no message": (1, "", ""),
    "differ from the CPU's by 96.4 of 255": result(96.4),  # black images
    "differ from the CPU's by nan": result(float("nan")),
    "gave no result": (0, "", ""),
    "gave no result: 'hello": (0, "hello\n", ""),
    "did not end within": subprocess.TimeoutExpired("python", 300),
}


@pytest.mark.slow
def test_a_trial_runs_in_its_own_process():
    """On the CPU, whose pixels are equal to themselves; nothing is simulated."""
    assert decoder_check.find_fault(Decoding.CPU, "cpu") is None


@pytest.mark.parametrize("reason", BAD)
def test_a_decoding_trial_that_fails_is_not_trusted(outcomes, caplog, reason):
    outcomes[0].extend([BAD[reason], GOOD])
    assert decoder_check.choose_decoding(1) is Decoding.GPU_FULL_IMAGE
    assert reason in caplog.text
    assert [command[-2:] for command in outcomes[1]] == [["1", "gpu-window"], ["1", "gpu-whole"]]


def test_ways_of_decoding_are_tried_once_and_the_cpu_is_the_last_resort(outcomes):
    outcomes[0].extend([GOOD, BAD["killed by signal 11"], BAD["did not end within"]])
    assert decoder_check.choose_decoding(0) is decoder_check.choose_decoding(0) is Decoding.GPU_CROP
    assert decoder_check.choose_decoding(2) is Decoding.CPU
    assert len(outcomes[1]) == 3
