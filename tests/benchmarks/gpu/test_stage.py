"""Stages: how they end, that a failure stays in its row, and that they need nothing but torch and Triton."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm_benchmarks.gpu import correct, kernels
from mvlm_benchmarks.gpu.processes import run_program
from mvlm_benchmarks.gpu.stage import running
from support.benchmarks import toy_case


def run_stage(module: Any, out: Path, seconds: float = 600.0) -> tuple[int, dict[str, Any]]:
    """Exit code and summary of a stage that is rehearsed in this process."""
    name = module.__name__.rsplit(".", 1)[1]
    code = 0
    try:
        with running(name, out, seconds, rehearse=True) as stage:
            module.run(stage)
    except SystemExit as end:
        code = int(end.code or 0)
    return code, json.loads((out / f"{name}.json").read_text())


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def toy(name: str, **changes):
    return toy_case(label=name, has_kernels=False, core=True, **changes)


GOOD = toy("good")
BAD = toy("bad", ours=lambda x, factor: x * 2.01)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    """No measurement of ceilings, and no test suite inside the test suite."""
    monkeypatch.setattr(correct, "ceiling_rows", lambda *_, **__: [{"name": "copy", "shape": "", "gb_per_s": 1.0}])
    monkeypatch.setattr(correct, "GPU_TESTS", ())
    small = [case for case in correct.small_cases(torch.float32) if case.label == "B2 H1 D64 37x19"]
    monkeypatch.setattr(correct, "small_cases", lambda dtype: small)


@pytest.mark.slow
def test_stage_says_whether_it_is_complete(tmp_path, monkeypatch) -> None:
    code, summary = run_stage(correct, tmp_path)
    assert (code, summary["ended"], summary["rehearsal"]) == (0, "incomplete: the GPU tests missing", True)
    assert summary["finished"] == ["ops", "ceilings", "SDPA's repeats"]
    rows = rows_of(tmp_path / "correct.csv")
    assert [(row["check"], row["status"]) for row in rows[:3]] == [
        ("values", "ok"), ("kept results", "ok"), ("repeats", "ok"),
    ]  # fmt: skip
    assert rows[0]["figures"].startswith("rehearsal on a CPU")
    monkeypatch.setattr(correct, "run_tests", lambda *_: {"status": "ok", "note": "8 passed"})
    code, summary = run_stage(correct, tmp_path)
    assert (code, summary["ended"], summary["without_result"]) == (0, "complete", {})
    code, summary = run_stage(correct, tmp_path, seconds=0.0)
    assert (code, summary["ended"]) == (0, "out of time, before cross_attention B2 H1 D64 37x19")
    assert rows_of(tmp_path / "correct.csv") == []


@pytest.mark.parametrize("module, cases", [(correct, "small_cases"), (kernels, "cases")])
@pytest.mark.slow
def test_a_wrong_value_of_ours_is_the_end_of_its_case_alone(module, cases, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, cases, lambda *_: [BAD, GOOD])
    monkeypatch.setattr(correct, "_further", lambda *_: None)
    code, summary = run_stage(module, tmp_path)
    assert code == 1
    assert summary["ended"].startswith("wrong value: toy bad")
    rows = rows_of(tmp_path / f"{summary['stage']}.csv")
    assert {row["shape"] for row in rows} == {"good", "bad"}
    if module is kernels:
        assert (tmp_path / "kernels.svg").stat().st_size > 0
        figures = json.loads((tmp_path / "kernels.figures.json").read_text())
        assert {row["shape"] for row in figures["rows"]} == {"good"}


@pytest.mark.slow
def test_sigterm_ends_a_stage_with_its_plots_written(tmp_path, monkeypatch) -> None:
    def kill(device, seed=0):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(kernels, "cases", lambda batch, dtype: [GOOD, toy("killed", make=kill)])
    code, summary = run_stage(kernels, tmp_path)
    assert (code, summary["ended"]) == (3, "stopped by SIGTERM")
    assert {row["shape"] for row in rows_of(tmp_path / "kernels.csv")} == {"good"}
    assert (tmp_path / "kernels.svg").stat().st_size > 0


@pytest.mark.slow
def test_a_program_and_what_it_started_end_when_its_time_is_over(tmp_path) -> None:
    path = tmp_path / "output"
    with path.open("w") as output:
        assert run_program(["sh", "-c", "echo $WORD; exit 5"], 60, output, {"WORD": "hello"}) == 5
        assert run_program([str(tmp_path / "absent")], 60, output) == 127
        assert run_program(["sh", "-c", f"sleep 50 & echo $! > {tmp_path}/child; wait"], 1.0, output) is None
    assert path.read_text().startswith("hello\nFileNotFoundError")
    child = Path("/proc") / (tmp_path / "child").read_text().strip()
    deadline = time.monotonic() + 10
    while child.exists() and "State:\tZ" not in (child / "status").read_text():  # ended, and nobody has asked how
        assert time.monotonic() < deadline, "what the program started still runs"
        time.sleep(0.01)


BLOCKED = (
    "timm", "transformers", "tyro", "matplotlib", "safetensors", "tokenizers", "nvidia", "pynvml", "huggingface_hub",
    "pytest", "PIL", "tensorboard", "rich",
)  # fmt: skip


@pytest.mark.extended
@pytest.mark.slow
def test_stages_need_nothing_but_torch_and_triton() -> None:
    program = f"""
import importlib, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
from mvlm_benchmarks.gpu.stages import PARTS, STAGES
for spec in (*STAGES.values(), *PARTS.values()):
    assert importlib.import_module(spec.module).run
import mvlm_benchmarks.gpu.small_calls
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
