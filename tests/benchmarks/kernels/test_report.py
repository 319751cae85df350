"""The report of `mvlm bench kernels`: CSV with every column, plot, JSON and tables."""

import csv
import json

import pytest

from mvlm_benchmarks import machine
from mvlm_benchmarks.kernels import report
from mvlm_benchmarks.kernels.compare import bench_case, rows_of
from mvlm_benchmarks.kernels.peers import Peer
from mvlm_benchmarks.results import RowFile, heading
from support.benchmarks import FakeClock, toy_case


@pytest.fixture
def rows():
    def absent(inputs):
        raise ImportError("No module named 'nothing'")

    def broken(inputs):
        return lambda x: x * 3

    peers = [Peer("good", {"toy": lambda inputs: lambda x: x + x}), Peer("gone", {"toy": absent})]
    peers.append(Peer("liar", {"toy": broken}))
    toy = toy_case()
    return rows_of(toy, bench_case(toy, "cpu", peers, FakeClock([10, 20, 30, 40, 50, 60]), 1))


@pytest.fixture
def about():
    return machine.describe("cpu", ["torch", "pytest", "no-such-package"])


def test_csv_has_every_column_and_says_cpu(rows, about, tmp_path) -> None:
    path = report.file_names(about, "float32", tmp_path / "results")[0]
    RowFile(path, about, report.COLUMNS).append(rows)
    with path.open() as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == list(report.COLUMNS)
        found = list(reader)
    assert len(found) == len(rows) == 4 * 3
    for line in found:
        assert line["figures"] == "CPU: torch references, no Triton kernel"
        assert line["torch"]
        assert line["device"].endswith("threads")
        assert line["date"].endswith("+00:00")
        assert "pytest 9" in line["versions"] or "pytest " in line["versions"]
        assert "no-such-package" not in line["versions"]
    good = [line for line in found if line["contender"] == "good"]
    assert [line["us"] for line in good] == ["40", "50", "60"]
    assert {line["repeats"] for line in good} == {"5 of 5 equal"}
    assert {line["verdict"] for line in good} == {"one call says nothing"}
    assert [line["vs_ours"] for line in good] == ["4.0", "2.5", "2.0"]
    assert {line["note"] for line in found if line["contender"] == "gone"} == {"No module named 'nothing'"}


@pytest.mark.slow
def test_plot_shows_ratios_and_is_reproducible(rows, about, tmp_path) -> None:
    path = report.file_names(about, "float32", tmp_path)[1]
    report.plot(rows, about, path)
    drawing = path.read_text()
    assert path.suffix == ".svg"
    assert drawing.rstrip().endswith("</svg>")
    for word in ("toy", "ours", "good", "4.00x", "forward", "CPU: torch references"):
        assert word in drawing
    assert "gone" not in drawing
    again = tmp_path / "again.svg"
    report.plot(rows, about, again)
    assert again.read_text() == drawing


def test_plot_of_no_rows_is_written(about, tmp_path) -> None:
    report.plot([], about, tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_json_has_timed_rows_and_reasons_for_the_others(rows, about, tmp_path) -> None:
    path = tmp_path / "deep" / "figures.json"
    report.write_figures(rows, about, path)
    written = json.loads(path.read_text())
    assert written["machine"]["figures"].startswith("CPU")
    wanted = {"op", "pass", "shape", "dtype", "contender", "us", "gb_per_s", "roofline_pct", "peak_mb"}
    assert len(written["rows"]) == 6
    assert all(wanted <= set(row) for row in written["rows"])
    assert {(row["contender"], row["status"]) for row in written["not_timed"]} == {
        ("gone", "missing"),
        ("liar", "WRONG"),
    }


def test_tables_name_contenders_without_figures(rows, about) -> None:
    shown = report.table(rows).splitlines()
    assert any(line.startswith("good") and "40.00" in line and "4.00" in line for line in shown)
    assert any("WRONG" in line and line.strip().startswith("liar") for line in shown)
    assert any("not available" in line and "gone" in line for line in shown)
    end = report.footer(rows, about)
    assert "missing: gone: No module named 'nothing'" in end
    assert "WRONG: liar" in end
    assert "No Triton kernel ran" in end
    assert "CPU timings of the torch references" in heading(about)


def test_report_of_a_gpu_does_not_mention_cpus(rows, about) -> None:
    about = {**about, "figures": machine.GPU_FIGURES}
    assert "CPU timings" not in heading(about) + report.footer(rows, about)
