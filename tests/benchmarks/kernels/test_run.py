"""`mvlm bench kernels`: wrong arguments, a run on a CPU, its files and its page."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mvlm import cli
from mvlm.errors import ConfigError
from mvlm_benchmarks.kernels import report, run
from mvlm_benchmarks.kernels.peers import PEERS

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "evidence" / "kernels.md").read_text()


@pytest.mark.slow
def test_run_on_a_cpu_writes_csv_plot_and_json(capsys, tmp_path) -> None:
    words = ["--quick", "--device", "cpu", "--ops", "place_tokens", "gather_patches"]
    words += ["--peers", "eager", "gather-first", "liger", "--out", str(tmp_path), "--json", str(tmp_path / "f.json")]
    cli.find_command(["bench", "kernels", *words])()
    out = capsys.readouterr().out
    paths = [Path(line) for line in out.splitlines() if line.startswith(str(tmp_path))]
    assert sorted(path.suffix for path in paths) == [".csv", ".json", ".svg"]
    assert all(path.stat().st_size > 0 for path in paths)
    with next(path for path in paths if path.suffix == ".csv").open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert reader.fieldnames == list(report.COLUMNS)
    assert {row["op"] for row in rows} == {"gather_patches", "place_tokens"}
    assert {row["contender"] for row in rows} == {"ours", "eager", "gather-first", "liger"}
    for row in rows:
        assert (row["figures"].split(":")[0], row["dtype"]) == ("CPU", "float32")
        if row["status"] == "ok":
            assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
            assert float(row["gb_per_s"]) > 0
            assert float(row["cpu_us"]) > 0
        assert row["roofline_pct"] == row["graph_us"] == row["peak_mb"] == ""


def test_a_run_says_first_what_runs_and_writes_nothing_unasked(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "time_cases", lambda *_: iter(()))
    cli.find_command(["bench", "kernels", "--quick", "--device", "cpu", "--ops", "place_tokens"])()
    assert "No Triton kernel" in capsys.readouterr().out.splitlines()[0]
    assert not list(tmp_path.iterdir())


def test_page_names_every_column_and_peer() -> None:
    for name in [*report.COLUMNS, *(peer.name for peer in PEERS)]:
        assert f"`{name}`" in PAGE, name


def test_interpreted_kernels_on_a_gpu_are_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(run, "choose_device", lambda wanted: torch.device("cuda"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        run.run((), (), tmp_path, device="cuda")


@pytest.mark.slow
def test_seconds_that_end_in_a_compilation_do_not_end_the_run() -> None:
    """In a process of its own, in which torch.compile has not been used."""
    script = """
import torch, mvlm_benchmarks.kernels.run
from mvlm_benchmarks.budget import Budget, OutOfTime
budget = Budget(60)
try:
    with budget.until(budget.used + 0.3):
        torch.compile(torch.sin, dynamic=False)(torch.ones(2))
except OutOfTime:
    pass
torch.compiler.reset()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
