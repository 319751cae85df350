"""The launcher of the stages takes the commands of its page."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from mvlm_benchmarks.gpu.stages import GRACE, PARTS, STAGES

ROOT = Path(__file__).parents[2]


@pytest.fixture
def launcher(monkeypatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "benchmarks" / "gpu_run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_commands_of_the_page_are_accepted(launcher, monkeypatch, tmp_path) -> None:
    page = (ROOT / "docs" / "guides" / "gpu_run.md").read_text()
    (block,) = re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    started = []
    ended = SimpleNamespace(wait=lambda *_: 0, pid=0)
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda command, **_: started.append(command) or ended)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    for line in block.splitlines():
        program, script, *words = line.split()
        assert (program, script) == ("python", "benchmarks/gpu_run.py")
        monkeypatch.setattr(sys, "argv", ["gpu_run.py", *words])
        assert (launcher.main(), started[-1][3]) == (0, words[0])
    for name, spec in STAGES.items():
        assert f"| `{name}` | {spec.seconds:.0f} |" in page
        assert spec.seconds < 600
    for name, spec in PARTS.items():
        assert f"| `{name}` | {spec.seconds:.0f} |" in page


def test_the_first_stage_fits_even_if_each_part_takes_its_whole_time() -> None:
    assert sum(spec.seconds + GRACE for spec in PARTS.values()) <= STAGES["first"].seconds
