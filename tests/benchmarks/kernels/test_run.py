"""`mvlm bench kernels`: wrong arguments, a run on a CPU, its files and its page."""

import csv
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from mvlm import cli
from mvlm.errors import ConfigError
from mvlm_benchmarks import machine
from mvlm_benchmarks.kernels import report, run
from mvlm_benchmarks.kernels.compare import bench_case, rows_of
from mvlm_benchmarks.kernels.peers import PEERS, Peer
from mvlm_benchmarks.results import heading
from support.benchmarks import FakeClock, toy_case

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


def test_report_has_the_figures_and_the_reasons_for_those_that_are_missing(tmp_path) -> None:
    def absent(inputs):
        raise ImportError("No module named 'nothing'")

    peers = [Peer("good", {"toy": lambda inputs: lambda x: x + x}), Peer("gone", {"toy": absent})]
    peers.append(Peer("liar", {"toy": lambda inputs: lambda x: x * 3}))
    toy, about = toy_case(), machine.describe("cpu", ["torch"])
    rows = rows_of(toy, bench_case(toy, "cpu", peers, FakeClock([10, 20, 30, 40, 50, 60]), 1))
    report.write_figures(rows, about, tmp_path / "deep" / "figures.json")
    written = json.loads((tmp_path / "deep" / "figures.json").read_text())
    assert [(row["contender"], row["us"], row["vs_ours"]) for row in written["rows"][3:]] == [
        ("good", 40, 4.0), ("good", 50, 2.5), ("good", 60, 2.0),
    ]  # fmt: skip
    assert {row["verdict"] for row in written["rows"][3:]} == {"one call says nothing"}
    assert {(row["contender"], row["status"]) for row in written["not_timed"]} == {
        ("gone", "missing"), ("liar", "WRONG"),
    }  # fmt: skip
    shown = report.table(rows)
    for name in ("good", "liar", "gone"):
        assert name in shown
    end = report.footer(rows, about)
    assert "missing: gone: No module named 'nothing'" in end
    assert "WRONG: liar" in end
    gpu = about | {"figures": machine.GPU_FIGURES}
    assert "CPU timings" in heading(about) + end
    assert "CPU timings" not in heading(gpu) + report.footer(rows, gpu)
    for name in ("a.svg", "b.svg"):
        report.plot(rows, about, tmp_path / name)
    drawing = (tmp_path / "a.svg").read_text()
    assert (tmp_path / "b.svg").read_text() == drawing
    assert "good" in drawing
    assert "4.00x" in drawing
    assert "gone" not in drawing
    report.plot([], about, tmp_path / "empty.png")


def test_page_names_every_column_and_peer_and_its_commands_are_accepted(monkeypatch, capsys) -> None:
    for name in [*report.COLUMNS, *(peer.name for peer in PEERS)]:
        assert f"`{name}`" in PAGE, name
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    commands = [shlex.split(line)[1:] for line in "".join(blocks).splitlines()]
    reached = []
    monkeypatch.setattr(run, "run", lambda *arguments: reached.append(arguments) or [])
    for words in commands:
        cli.run_command(words)
    assert len(reached) == len(commands) >= 3
