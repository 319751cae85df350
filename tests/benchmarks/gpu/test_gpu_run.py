"""The launcher of the stages: environment, exit codes, and the hard limit of time."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

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


def launch(launcher, monkeypatch, program: str, *words: str) -> tuple[int, list[str]]:
    """Exit code of the launcher, and the command that it gave. `program` runs in place of the stage."""
    commands = []
    popen = subprocess.Popen

    def start(command, **options):
        commands.append(command)
        return popen([sys.executable, "-c", program], **options)

    monkeypatch.setattr(launcher.subprocess, "Popen", start)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["gpu_run.py", *words])
    return launcher.main(), commands[0]


def test_stage_gets_its_budget_its_folder_and_kept_caches(launcher, monkeypatch, tmp_path) -> None:
    program = "import os; open(os.environ['OUT'] + '/env', 'w').write(repr(dict(os.environ)))"
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code, command = launch(launcher, monkeypatch, program, "sweep", "--cache", str(tmp_path / "cache"))
    assert code == 0
    assert command[1:] == ["-m", "mvlm_benchmarks.gpu", "sweep", "--out", str(tmp_path), "--seconds", "240"]
    found = eval((tmp_path / "env").read_text())
    assert found["TRITON_CACHE_DIR"] == str(tmp_path / "cache" / "triton")
    assert found["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache" / "inductor")
    assert found["TRITON_INTERPRET"] == "0"
    assert found["PYTHONPATH"].split(os.pathsep)[:4] == [str(ROOT), *(str(ROOT / n) for n in ("kernels", "dataloading",
                                                                                            "benchmarks"))]  # fmt: skip


def test_rehearsal_interprets_kernels(launcher) -> None:
    assert launcher.environment(Path("/c"), True)["TRITON_INTERPRET"] == "1"


def test_exit_code_of_the_stage_is_that_of_the_launcher(launcher, monkeypatch, tmp_path) -> None:
    code, command = launch(launcher, monkeypatch, "raise SystemExit(7)", "step", "--rehearse", "--out", str(tmp_path))
    assert code == 7
    assert command[-1] == "--rehearse"


@pytest.mark.slow
def test_stage_that_ignores_its_budget_is_killed(launcher, monkeypatch, tmp_path, capsys) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(100)"
    monkeypatch.setattr(launcher, "GRACE", 0.5)
    code, _ = launch(launcher, monkeypatch, program, "correct", "--seconds", "0.5", "--out", str(tmp_path))
    assert code != 0
    out = capsys.readouterr().out
    assert "it is asked to end" in out
    assert "killed; its rows are in" in out


@pytest.mark.slow
def test_stage_without_a_gpu_says_what_to_do(tmp_path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_run.py"), "correct", "--out", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--rehearse runs small shapes on this CPU")


def test_commands_of_the_page_are_accepted(launcher, monkeypatch, tmp_path) -> None:
    page = (ROOT / "docs" / "guides" / "gpu_run.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for line in block.splitlines():
        program, script, *words = line.split()
        assert (program, ROOT / script) == ("python", ROOT / "benchmarks" / "gpu_run.py")
        code, command = launch(launcher, monkeypatch, "", *words)
        assert (code, command[3]) == (0, words[0])
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
    for name, plan in STAGES.items():
        assert f"| `{name}` | {plan.seconds:.0f} |" in page
