"""This tree's loader beside a copy of itself, as beside an earlier checkout."""

import shutil
from pathlib import Path

import pytest

from mvlm.errors import ConfigError
from mvlm_benchmarks.data.before import TREE, environment_of, measure

SETTINGS = {"rounds": 2, "batches": 1, "batch": 20, "size": 32}


@pytest.mark.extended
def test_a_loader_is_timed_beside_that_of_another_checkout(waves: Path, tmp_path: Path) -> None:
    """The other one's packages run, here a copy that is made slower."""
    other = tmp_path / "other"
    for folder in ("mvlm", "kernels", "dataloading", "benchmarks/mvlm_benchmarks"):
        shutil.copytree(TREE / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    module = other / "dataloading/mvlm_dataloading/loader/reader.py"
    source = module.read_text()
    begin = "    def next(self) -> RawBatch | None:\n"
    assert source.count(begin) == 1
    module.write_text(source.replace(begin, f"{begin}        sum(range(20_000_000))\n"))
    (row,) = measure(waves, other, ("crop",), SETTINGS)
    for name in ("by_clock", "by_processor"):
        assert len(row[name]["of_rounds"]) == 2
        assert row[name]["low"] <= row[name]["ratio"] <= row[name]["high"]
        assert row[name]["ratio"] > 1.5
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="checkout"):
        environment_of(tmp_path / "none")
