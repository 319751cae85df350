"""`mvlm bench step` at a micro size: checks before timing, files, command line."""

import csv
import json

import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.objectives.losses import Losses
from mvlm_benchmarks.step import contenders, run
from support.benchmarks import micro_config

MICRO = micro_config()
EAGER = ("timm+roberta", "timm+decoder-layer", "fast", *contenders.OTHER_METHODS)


@pytest.fixture
def micro(monkeypatch) -> None:
    monkeypatch.setattr(MaskVLMConfig, "preset", classmethod(lambda cls, name, **changes: MICRO))


@pytest.mark.extended
@pytest.mark.slow
def test_run_writes_figures_of_every_contender(micro, tmp_path) -> None:
    files = {"json": tmp_path / "new/s.json", "csv": tmp_path / "s.csv", "plot": tmp_path / "s.svg"}
    result = run.run("tiny", 4, 3, EAGER, precision="fp32", device="cpu", **files)
    found = json.loads(files["json"].read_text())
    assert found == result
    assert {"device", "commit", "torch", "versions"} <= found["machine"].keys()
    assert found["gflop_per_pair"].keys() == {"baseline", *contenders.IMPLEMENTATIONS}
    assert found["gflop_per_pair"]["plain"] < found["gflop_per_pair"]["baseline"]
    rows = found["rows"]
    assert [row["contender"] for row in rows] == list(EAGER)
    for row in rows:
        if row["contender"] not in contenders.OTHER_METHODS:
            assert row["loss"] == pytest.approx(rows[0]["loss"], rel=1e-5)
        assert 0 < row["pairs_per_s_p20"] <= row["pairs_per_s"] <= row["pairs_per_s_p80"]
        assert row["peak_mb"] > 0
        assert row["vs_eager_low"] <= row["vs_eager"] <= row["vs_eager_high"]
        assert row["vs_compiled"] is None
    table = list(csv.DictReader(files["csv"].read_text().splitlines()))
    assert [(row["contender"], float(row["pairs_per_s"])) for row in table] == [
        (row["contender"], row["pairs_per_s"]) for row in rows
    ]
    assert all(name in files["plot"].read_text() for name in EAGER)
    assert (tmp_path / "s.rounds.csv").exists()


def off_by_one_per_cent(losses: Losses, term: str) -> Losses:
    return Losses(losses | {term: 1.01 * losses[term]})


def test_contender_with_wrong_losses_is_not_timed(micro, monkeypatch) -> None:
    """An eager one against `plain`, a compiled one against its eager form."""
    compute = contenders.compute_losses

    def wrong(name, module, inputs) -> Losses:
        losses = compute(name, module, inputs)
        return off_by_one_per_cent(losses, "mim") if name == "timm+decoder-layer" else losses

    monkeypatch.setattr(run, "measure_rounds", lambda *_: pytest.fail("it was timed"))
    with monkeypatch.context() as patch:
        patch.setattr(run, "compute_losses", wrong)
        with pytest.raises(AssertionError, match=r"timm\+decoder-layer: mim is .*; nothing was timed"):
            run.run("tiny", 4, 1, EAGER, precision="fp32", device="cpu")
    compiled = lambda module: lambda *words, **more: off_by_one_per_cent(module(*words, **more), "itm")  # noqa: E731
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(AssertionError, match=r"timm\+roberta-compiled: itm is .*; nothing was timed"):
        run.run("tiny", 4, 1, ("timm+roberta-compiled",), precision="fp32", device="cpu", optimizer=False)
