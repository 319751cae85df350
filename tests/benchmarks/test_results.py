"""Result files that all benchmarks share."""

import csv

import pytest
from matplotlib.figure import Figure

from mvlm_benchmarks import machine
from mvlm_benchmarks.results import MACHINE_COLUMNS, RowFile, file_stem, heading, save_figure, write_csv

ABOUT = dict.fromkeys(MACHINE_COLUMNS, "") | {
    "figures": machine.GPU_FIGURES, "device": "NVIDIA H100", "torch": "2.13", "commit": "abc", "dirty": True,
    "date": "today", "versions": {"timm": "1.0", "xformers": ""},
}  # fmt: skip


def test_heading_of_a_gpu_is_one_line_of_known_facts() -> None:
    assert heading(ABOUT) == "NVIDIA H100, torch 2.13, commit abc with changes, today"


def test_heading_of_a_cpu_says_that_no_kernel_ran() -> None:
    lines = heading(ABOUT | {"figures": machine.CPU_FIGURES}).splitlines()
    assert len(lines) == 2
    assert "No Triton kernel runs" in lines[1]


def test_every_csv_line_describes_the_machine(tmp_path) -> None:
    write_csv([{"us": 1}, {"us": 2}], ABOUT, tmp_path / "new" / "f.csv", ("us", "device"))
    with (tmp_path / "new" / "f.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["us"], row["device"], row["versions"]) for row in rows] == [
        ("1", "NVIDIA H100", "timm 1.0"),
        ("2", "NVIDIA H100", "timm 1.0"),
    ]


def test_rows_are_in_the_file_when_append_returns(tmp_path) -> None:
    file = RowFile(tmp_path / "f.csv", ABOUT, ("us", "note"))
    for count in range(3):
        file.append([{"us": count}])
        rows = list(csv.DictReader((tmp_path / "f.csv").read_text().splitlines()))
        assert [row["us"] for row in rows] == [str(n) for n in range(count + 1)]
        assert rows[-1]["note"] == ""
    with pytest.raises(ValueError, match="fields not in fieldnames"):
        file.append([{"other": 1}])


def test_file_stem_has_lower_case_words_and_hyphens() -> None:
    assert file_stem("data", "My Photos", "AMD EPYC (2)") == "data-my-photos-amd-epyc-2"


def test_equal_figures_give_equal_svg_files(tmp_path) -> None:
    for name in ("a.svg", "b.svg"):
        figure = Figure()
        figure.subplots().plot([1, 2])
        save_figure(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
