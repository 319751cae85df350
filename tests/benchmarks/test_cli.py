"""Files that the commands `mvlm bench ...` write, which are checked before anything is timed."""

import shutil
from importlib import import_module
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.errors import ConfigError
from mvlm_benchmarks.results import MACHINE_COLUMNS, RowFile

BENCHES = ("kernels", "step", "data", "run")
RESULTS = Path(__file__).parents[3] / "benchmarks/results"


@pytest.fixture
def timed(monkeypatch):
    """Names of the benches that were reached, in place of the benches."""
    reached = []
    for name in BENCHES:

        def reach(*_, bench=name, **__):
            reached.append(bench)
            return []

        monkeypatch.setattr(import_module(f"mvlm_benchmarks.{name}.run"), "run", reach)
    return reached


@pytest.mark.parametrize(
    "bench, flag", [*((bench, "--json") for bench in BENCHES), ("step", "--csv"), ("run", "--csv")]
)
def test_a_bench_replaces_earlier_results_alone(timed, tmp_path, bench, flag):
    file = tmp_path / "precious"
    file.write_text('{"rows": [1, 2, 3]}\n' if flag == "--json" else "name,device\na,1\n")
    content = file.read_bytes()
    with pytest.raises(
        ConfigError, match=rf"{flag[2:]}: wanted a new file or .* of a bench, got another file, .*precious"
    ):
        cli.run_command(["bench", bench, flag, str(file)])
    with pytest.raises(ConfigError, match=f"{flag[2:]}: wanted a file, got the folder"):
        cli.run_command(["bench", bench, flag, str(tmp_path)])
    assert not timed
    assert file.read_bytes() == content
    for old in sorted(RESULTS.glob(f"{bench}-tiny-*.{flag[2:]}")):
        shutil.copy(old, file)
        cli.run_command(["bench", bench, flag, str(file)])
    file.write_bytes(b'{\n "machine": {\n  "devi' if flag == "--json" else b"")  # cut by a kill
    cli.run_command(["bench", bench, flag, str(file)])
    cli.run_command(["bench", bench, flag, str(tmp_path / "new")])
    assert set(timed) == {bench}


@pytest.mark.parametrize("name", ["chart.xyz", "chart", "svg", ".svg"])
def test_a_chart_of_no_known_kind_is_refused_before_the_bench(timed, tmp_path, name):
    with pytest.raises(ConfigError, match=r"plot: wanted a file that ends in \.svg, \.png or \.pdf, got"):
        cli.run_command(["bench", "step", "--plot", str(tmp_path / name)])
    assert not timed


def test_a_chart_in_place_of_a_folder_or_of_the_figures_is_refused(timed, tmp_path):
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(ConfigError, match="plot: wanted a file, got the folder"):
        cli.run_command(["bench", "step", "--plot", str(tmp_path / "a.svg")])
    with pytest.raises(ConfigError, match="plot: wanted another file than the others"):
        cli.run_command(["bench", "step", "--json", str(tmp_path / "b.svg"), "--plot", str(tmp_path / "b.svg")])
    assert not timed
    for name in ("new.svg", "new.PNG", "new.pdf"):
        cli.run_command(["bench", "step", "--plot", str(tmp_path / name)])
    assert timed == ["step"] * 3


@pytest.mark.parametrize("flag", ["--json", "--csv", "--plot"])
def test_a_result_below_a_file_is_refused_before_the_bench(timed, tmp_path, flag):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"wanted a file in a folder for the results, got .*/file/new/a\.svg"):
        cli.run_command(["bench", "step", flag, str(tmp_path / "file" / "new" / "a.svg")])
    assert not timed


def test_a_table_in_place_of_the_figures_or_of_other_rounds_is_refused(timed, tmp_path):
    with pytest.raises(ConfigError, match="csv: wanted another file than the others"):
        cli.run_command(["bench", "step", "--json", str(tmp_path / "a"), "--csv", str(tmp_path / "a")])
    (tmp_path / "a.rounds.csv").write_text("boxing,rounds\n1,12\n")
    with pytest.raises(
        ConfigError, match=r"csv: wanted a new file or .* of a bench, got another file, .*a\.rounds\.csv"
    ):
        cli.run_command(["bench", "step", "--csv", str(tmp_path / "a.csv")])
    assert not timed
    (tmp_path / "a.rounds.csv").unlink()
    about = dict.fromkeys(MACHINE_COLUMNS, "x") | {"versions": {}}
    RowFile(tmp_path / "a.rounds.csv", about, ("round", "seconds")).append([{"round": 0, "seconds": 1.5}])
    cli.run_command(["bench", "step", "--csv", str(tmp_path / "a.csv")])
    assert timed == ["step"]


@pytest.mark.parametrize("bench, flag", [("kernels", "--out"), ("data", "--out")])
def test_a_file_in_place_of_the_folder_of_results_is_refused(timed, tmp_path, bench, flag):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="wanted a folder for the results, got the file"):
        cli.run_command(["bench", bench, flag, str(tmp_path / "file")])
    assert not timed
