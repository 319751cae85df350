"""The launcher of the stages: environment, exit codes, and the hard limit of time."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mvlm_benchmarks.gpu.__main__ import main
from mvlm_benchmarks.gpu.stages import STAGES

ROOT = Path(__file__).parents[3]


@pytest.fixture
def launcher(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(launcher, monkeypatch, script: str, *words: str) -> tuple[int, list[str]]:
    """Exit code of the launcher, and the command that it gave. A shell script runs in place of the stage."""
    commands = []
    popen = subprocess.Popen

    def start(command, **options):
        commands.append(command)
        return popen(["sh", "-c", script], **options)

    with monkeypatch.context() as patch:
        patch.setattr(launcher.subprocess, "Popen", start)
        patch.setattr(launcher.signal, "signal", lambda *_: None)
        patch.setattr(sys, "argv", ["gpu_run.py", *words])
        return launcher.main(), commands[0]


def test_stage_gets_its_budget_its_folder_and_kept_caches(launcher, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, command = launch(launcher, monkeypatch, "env > $OUT/env; exit 7", "sweep", "--cache", str(tmp_path / "cache"))
    assert code == 7
    assert command[1:] == ["-m", "mvlm_benchmarks.gpu", "sweep", "--out", str(tmp_path), "--seconds", "240"]
    found = dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")
    assert found["TRITON_INTERPRET"] == "0"
    folders = [ROOT, *(ROOT / name for name in ("kernels", "dataloading", "benchmarks"))]
    assert found["PYTHONPATH"].split(os.pathsep)[:4] == list(map(str, folders))
    assert launcher.environment(Path("/c"), True)["TRITON_INTERPRET"] == "1"  # in a rehearsal


@pytest.mark.slow
def test_stage_that_ignores_its_budget_is_killed(launcher, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    script = "trap '' TERM; sleep 100 & wait; wait"
    code, _ = launch(launcher, monkeypatch, script, "correct", "--seconds", "0.5", "--out", str(tmp_path))
    assert code != 0
    assert "killed; its rows are in" in capsys.readouterr().out


def test_stage_without_a_gpu_says_what_to_do(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "correct", "--out", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.splitlines()[-1].endswith("--rehearse runs small shapes on this CPU")


def test_commands_of_the_page_are_accepted(launcher, monkeypatch, tmp_path) -> None:
    page = (ROOT / "docs" / "guides" / "gpu_run.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        program, script, *words = line.split()
        assert (program, script) == ("python", "benchmarks/gpu_run.py")
        code, command = launch(launcher, monkeypatch, "", *words)
        assert (code, command[3]) == (0, words[0])
    for name, plan in STAGES.items():
        assert f"| `{name}` | {plan.seconds:.0f} |" in page
        assert plan.seconds < 600
