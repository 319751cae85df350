"""`mvlm bench data`: its data, the lead of our loader with a margin, and its output with contenders of known rates."""

import csv
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mvlm.errors import ConfigError
from mvlm_benchmarks.data import photos, run
from mvlm_benchmarks.data.process import LoaderProcess
from mvlm_dataloading import ShardWriter
from support.data import make_image

SETTINGS = {"rounds": 3, "batches": 8, "batch": 32, "size": 224}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "photos"
    photos.build(folder, 160)
    return folder


@pytest.mark.extended
@pytest.mark.parametrize(
    "recipe, least",
    # Measured: 2.6 and 1.7; 1.9. See benchmarks/results.
    [("crop", {"pil": 1.7, "decode_jpeg": 1.3}), ("crop+randaug", {"pil": 1.2})],
)
@pytest.mark.slow
def test_our_loader_takes_less_processor_time_than_the_others(photographs, recipe, least) -> None:
    """Processor time, because a busy machine distorts it least, in interleaved rounds."""
    rows = {row["contender"]: row for row in run.measure_recipe(["ours", *least], recipe, photographs, SETTINGS)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    for name, ratio in least.items():
        assert rows[name]["ours_over_cpu"] >= ratio, rows


class FakeProcess(LoaderProcess):
    """A contender whose name determines its fixed rate."""

    rates_of: ClassVar[dict[str, float]] = {
        "ours": 300, "pil": 100, "stage:read": 3000, "stage:decode": 1000, "stage:resize": 500, "stage:augment": 400,
        "stage:hand-over": 375,
    }  # fmt: skip
    resident: ClassVar[list[float]] = []

    def __init__(self, name: str, recipe: str, folder: Path, batch: int, size: int):
        self.name, self.recipe = name, recipe
        self.status, self.note = ("ok", "") if name in self.rates_of else ("missing", "not installed here")
        self.turns: list[int] = []
        self.rates: list[float] = []
        self.cpu_ms: list[float] = []

    def turn(self, batches: int) -> dict[str, Any]:
        self.turns.append(batches)
        self.rates.append(self.rates_of[self.name])
        self.cpu_ms.append(1e3 / self.rates_of[self.name])
        return {"rss_mb": self.resident.pop(0)} if self.recipe == "crop+randaug" else {}

    def close(self) -> None:
        pass


@pytest.mark.extended
@pytest.mark.slow
def test_run_prints_and_writes_every_measurement(tmp_path, photographs, monkeypatch, capsys) -> None:
    monkeypatch.setattr(run, "LoaderProcess", FakeProcess)
    monkeypatch.setattr(run, "START_UPS", 2)
    levels = [100.0, 110, 111, 112, 111, 110, 112, 113, 111, 112]
    monkeypatch.setattr(FakeProcess, "resident", [level for level in levels for _ in range(run.READINGS)])
    step = tmp_path / "step.json"
    step.write_text(json.dumps({"rows": [{"pairs_per_s": 200.0}, {"pairs_per_s": 600.0}, {"pairs_per_s": None}]}))
    names = ["ours", "pil", "webdataset+pil"]
    json_file = tmp_path / "sub" / "f.json"
    files = run.run(photographs, 1, tmp_path, names, ["crop"], 2, 1, 8, 64, 1000, 2000, step, json_file)
    assert "bottleneck: resize" in capsys.readouterr().out
    written = json.loads(files[1].read_text())
    rates = {row["contender"]: row["images_per_s"] for row in written["rows"]}
    assert rates == {"ours": 300, "pil": 100, "webdataset+pil": None}
    assert written["rows"][1]["ours_over"] == written["rows"][1]["ours_over_cpu"] == 3
    assert written["stages"]["crop"]["resize"] == {"images_per_s": 500, "adds_us": 1000}
    assert (written["step"]["step_pairs_per_s"], written["step"]["loader_over_step"]) == (600, 0.5)
    assert written["memory"]["growth"] == pytest.approx(113 / 110 - 1, abs=1e-4)
    assert (written["start"]["samples"], len(written["start"]["seconds"])) == (2000, 2)
    with files[0].open() as file:
        rows = list(csv.DictReader(file))
    stages = ["read", "decode", "resize", "augment", "hand-over"]
    assert [row["contender"] for row in rows] == [*names, *stages, "step", "start", "memory"]


@pytest.fixture
def few(tmp_path) -> Path:
    """A data set of one image."""
    with ShardWriter(tmp_path / "few", name="few", source="", licence="", attribution="", recipe={}) as writer:
        writer.add("0", make_image(0), ["words"])
    return tmp_path / "few"


def test_a_batch_of_more_images_than_there_are_is_refused(tmp_path, few) -> None:
    """PyTorch's DataLoader drops the last batch, so it would wait for ever."""
    with pytest.raises(ConfigError, match="batch: wanted at most 1"):
        run.run(few, 1, tmp_path, batch=4)


def test_a_loader_that_dies_has_no_figure_and_the_others_go_on(tmp_path, monkeypatch) -> None:
    """One ends before its first batch, one when it has made a turn that counts."""
    program = """#!/bin/sh
[ "$3" = ours ] && exit 1
echo '{"status": "ok", "note": "", "seconds": 1}'
read -r turn; echo '{"seconds": 0.5, "rss_mb": 1}'
read -r turn; echo '{"seconds": 0.5, "rss_mb": 1}'
[ "$3" = pil ] && exit 7
while read -r turn; do echo '{"seconds": 0.5, "rss_mb": 1}'; done
"""
    (tmp_path / "python").write_text(program)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    dead, dying, alive = run.measure_recipe(["ours", "pil", "decode_jpeg"], "crop", tmp_path, SETTINGS)
    assert (dead["status"], dead["note"], dead["images_per_s"]) == ("error", "ended with code 1", None)
    assert (dying["status"], dying["note"], dying["images_per_s"]) == ("error", "ended with code 7", None)
    assert alive["status"] == "ok"
    assert alive["images_per_s"] > 0
