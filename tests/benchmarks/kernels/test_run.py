"""`mvlm bench kernels`: wrong arguments, a run on a CPU, its files and its page."""

import csv
import os
import re
import shlex
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


@pytest.mark.parametrize(
    "changes, setting",
    [
        ({"ops": ["cross_atention"]}, "ops"),
        ({"peers": ["eager", "sdpa"]}, "peers"),
        ({"dtype": "int8"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"seconds": 0.0}, "seconds"),
        ({"device": "cuda"}, "TRITON_INTERPRET"),  # interpreted kernels on a GPU
    ],
)
def test_wrong_arguments_are_config_errors(changes, setting, monkeypatch, tmp_path) -> None:
    if changes == {"device": "cuda"}:
        monkeypatch.setattr(run, "choose_device", lambda wanted: torch.device("cuda"))
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=f"{setting}: wanted"):
        run.run(**({"ops": (), "peers": (), "out": tmp_path} | changes))


@pytest.mark.slow
def test_run_on_a_cpu_writes_csv_plot_and_json(capsys, tmp_path) -> None:
    words = ["--quick", "--device", "cpu", "--ops", "place_tokens", "gather_patches"]
    words += ["--peers", "eager", "gather-first", "liger", "--out", str(tmp_path), "--json", str(tmp_path / "f.json")]
    cli.run_command(["bench", "kernels", *words])
    out = capsys.readouterr().out
    assert "These are CPU timings of the torch references. No Triton kernel runs" in out
    assert "not applicable: liger: liger-kernel has no kernel that reads images" in out
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
        assert row["roofline_pct"] == row["graph_us"] == row["peak_mb"] == ""


def test_page_names_every_column_and_peer_and_its_commands_are_accepted(monkeypatch, capsys) -> None:
    for name in [*report.COLUMNS, *(peer.name for peer in PEERS)]:
        assert f"`{name}`" in PAGE, name
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("mvlm bench kernels")]
    reached = []
    monkeypatch.setattr(run, "run", lambda *arguments: reached.append(arguments) or [])
    for words in commands:
        cli.run_command(words)
    assert len(reached) == len(commands) >= 3


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
