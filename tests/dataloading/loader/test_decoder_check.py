"""The choice of a way of decoding, with simulated trials, as there may be no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.slow
def test_a_trial_finds_the_package_where_this_process_has_it(tmp_path):
    """In a script that puts the package's folder into sys.path itself, from another folder."""
    folder = Path(decoder_check.__file__).parents[2]
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r})\n"
        "from mvlm_dataloading.loader import decoder_check\n"
        "from mvlm_dataloading.loader.pipeline import Decoding\n"
        "assert decoder_check.__file__.startswith(sys.path[0])\n"
        "import subprocess; run = subprocess.run\n"
        "def check(command, **settings):\n"
        "    code = 'import mvlm_dataloading as m; print(m.__file__)'\n"
        "    print(run([command[0], '-c', code], **settings).stdout.strip())\n"
        "    return run(command, **settings)\n"
        "subprocess.run = check\n"
        "print(decoder_check.find_fault(Decoding.CPU, 'cpu'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.split() == [str(folder / "mvlm_dataloading/__init__.py"), "None"], done.stderr


def test_cropped_gpu_decoding_is_tried_first(outcomes, caplog):
    caplog.set_level("INFO")
    outcomes[0].append(GOOD)
    assert decoder_check.choose_decoding(0) is Decoding.GPU_CROP
    assert decoder_check.choose_decoding(0) is Decoding.GPU_CROP  # tried once
    assert len(outcomes[1]) == 1
    assert "CUDA device 0 decodes images by `gpu-window`" in caplog.text


@pytest.mark.parametrize("reason", BAD)
def test_a_decoding_trial_that_fails_is_not_trusted(outcomes, caplog, reason):
    outcomes[0].extend([BAD[reason], GOOD])
    assert decoder_check.choose_decoding(1) is Decoding.GPU_FULL_IMAGE
    assert "CUDA device 1 cannot decode images by `gpu-window`" in caplog.text
    assert reason in caplog.text
    assert [command[-2:] for command in outcomes[1]] == [["1", "gpu-window"], ["1", "gpu-whole"]]


def test_cpu_decoding_is_the_last_resort(outcomes, caplog):
    outcomes[0].extend([BAD["killed by signal 11"], BAD["did not end within"]])
    assert decoder_check.choose_decoding(0) is Decoding.CPU
    assert "images are decoded on the CPU and copied to CUDA device 0" in caplog.text


@pytest.mark.slow
def test_the_decoding_trial_runs(capfd):
    decoder_check.main("cpu", "cpu")
    assert json.loads(capfd.readouterr().out.strip().splitlines()[-1]) == {"worst_difference": 0.0}
