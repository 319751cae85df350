"""`mvlm bench kernels`: wrong arguments, a run on a CPU, its page, and the pytest-benchmark entries."""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from mvlm import cli
from mvlm.errors import ConfigError
from mvlm_benchmarks.kernels import report, run
from mvlm_benchmarks.kernels.peers import PEERS

ROOT = Path(__file__).parents[3]


def run_command(monkeypatch, capsys, *words: str) -> tuple[int, str, list[str]]:
    monkeypatch.setattr(sys, "argv", ["mvlm", "bench", "kernels", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err.splitlines()


@pytest.mark.parametrize(
    "words, said",
    [
        (["--ops", "cross_atention"], "ops: wanted some of cross_attention, gather_patches"),
        (["--peers", "eager", "sdpa"], "got 'sdpa'"),
        (["--dtype", "int8"], "dtype: wanted auto, bf16, fp16, fp32, got 'int8'"),
        (["--device", "tpu"], "device: wanted auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, words, said) -> None:
    code, out, err = run_command(monkeypatch, capsys, *words)
    assert (code, out, len(err)) == (2, "", 1), err
    assert err[0].startswith("mvlm: ")
    assert said in err[0]


def test_command_without_the_bench_extra_names_the_package(monkeypatch, capsys) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    code, _, err = run_command(monkeypatch, capsys)
    assert code == 2
    assert err == ["mvlm: bench: wanted matplotlib, which is not installed; pip install 'mvlm[bench]'"]


def test_interpreted_kernels_are_refused_on_a_gpu(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(run, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET: wanted unset on a GPU"):
        run.run((), (), tmp_path)


@pytest.mark.slow
def test_run_on_a_cpu_writes_csv_plot_and_json(monkeypatch, capsys, tmp_path) -> None:
    words = ["--quick", "--device", "cpu", "--ops", "place_tokens", "gather_patches"]
    words += ["--peers", "eager", "gather-first", "liger", "--out", str(tmp_path), "--json", str(tmp_path / "f.json")]
    code, out, _ = run_command(monkeypatch, capsys, *words)
    assert code == 0
    assert "These are CPU timings of the torch references. No Triton kernel runs" in out
    assert "not applicable: liger: liger-kernel has no kernel that reads images" in out
    paths = [Path(line) for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert sorted(path.suffix for path in paths) == [".csv", ".json", ".svg"]
    assert all(path.stat().st_size > 0 for path in paths)
    with next(path for path in paths if path.suffix == ".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"gather_patches", "place_tokens"}
    assert {row["contender"] for row in rows} == {"ours", "eager", "gather-first", "liger"}
    for row in rows:
        assert row["figures"].startswith("CPU")
        assert row["dtype"] == "float32"
        if row["status"] == "ok":
            assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
            assert float(row["gb_per_s"]) > 0
        assert row["roofline_pct"] == row["graph_us"] == row["peak_mb"] == ""


def test_commands_of_the_page_are_accepted(monkeypatch, capsys) -> None:
    """Each command of docs/evidence/kernels.md parses and reaches `run`; other tests check what that does."""
    page = (ROOT / "docs" / "evidence" / "kernels.md").read_text()
    lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    commands = [shlex.split(line)[3:] for line in lines if line.startswith("mvlm bench kernels")]
    assert len(commands) >= 3
    assert set(lines) >= {"pytest benchmarks/bench_kernels.py"}
    reached = []
    monkeypatch.setattr(run, "run", lambda *arguments: reached.append(arguments) or [])
    for words in commands:
        assert run_command(monkeypatch, capsys, *words)[0] == 0
    assert len(reached) == len(commands)


def test_page_names_every_column_and_peer() -> None:
    page = (ROOT / "docs" / "evidence" / "kernels.md").read_text()
    for name in [*report.COLUMNS, *(peer.name for peer in PEERS)]:
        assert f"`{name}`" in page, name


def test_plain_pytest_does_not_collect_the_benchmark_entries() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert settings["testpaths"] == ["tests"]
    assert "python_files" not in settings


@pytest.mark.slow
def test_benchmark_entries_run() -> None:
    words = ["-q", "-p", "no:cacheprovider", "-k", "place_tokens and forward and (eager or liger or ours)"]
    # Under xdist pytest-benchmark times nothing.
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET" and not n.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/bench_kernels.py", *words],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'place_tokens B2 width 768, half of 196 masked forward': 2 tests" in done.stdout
