"""`mvlm bench step` at a micro size: checks before timing, files, command line."""

import csv
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mvlm.config.model import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model.maskvlm import MaskVLM
from mvlm.objectives.losses import Losses
from mvlm_benchmarks.captions import caption_lengths
from mvlm_benchmarks.step import contenders, run, timing
from support.benchmarks import micro_config

MICRO = micro_config()
EAGER = ("timm+roberta", "timm+decoder-layer", "timm+roberta-math", "plain", "fast", "drop_masked")


@pytest.fixture
def micro(monkeypatch) -> None:
    monkeypatch.setattr(MaskVLMConfig, "preset", classmethod(lambda cls, name, **changes: MICRO))


@dataclass
class FinishedRun:
    """The result of a run, and the files that it wrote."""

    result: dict[str, Any]
    json: Path
    csv: Path
    plot: Path


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> FinishedRun:
    """One run of the eager contenders that writes every file."""
    folder = tmp_path_factory.mktemp("step")
    files = {"json": folder / "new/s.json", "csv": folder / "s.csv", "plot": folder / "s.svg"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskVLMConfig, "preset", classmethod(lambda cls, name, **changes: MICRO))
        result = run.run("tiny", 4, 3, EAGER, precision="fp32", device="cpu", **files)
    return FinishedRun(result, **files)


@pytest.mark.slow
def test_json_holds_figures_of_every_contender(finished: FinishedRun) -> None:
    found = json.loads(finished.json.read_text())
    assert found == finished.result
    assert {"device", "commit", "torch", "versions"} <= found["machine"].keys()
    assert found["gflop_per_pair"].keys() == {"baseline", *contenders.IMPLEMENTATIONS}
    assert found["gflop_per_pair"]["plain"] < found["gflop_per_pair"]["baseline"]
    assert [row["contender"] for row in found["rows"]] == list(EAGER)
    for row in found["rows"]:
        if row["contender"] != "drop_masked":
            assert row["loss"] == pytest.approx(found["rows"][0]["loss"], rel=1e-5)
        assert 0 < row["pairs_per_s_p20"] <= row["pairs_per_s"] <= row["pairs_per_s_p80"]
        assert row["peak_mb"] > 0
    baselines = [row for row in found["rows"] if row["contender"] in contenders.BASELINES]
    assert max(baselines, key=lambda row: row["pairs_per_s"])["vs_eager"] == 1
    assert found["rows"][0]["vs_compiled"] is None


@pytest.mark.slow
def test_csv_and_plot_name_every_contender(finished: FinishedRun) -> None:
    rows = list(csv.DictReader(finished.csv.read_text().splitlines()))
    assert [row["contender"] for row in rows] == list(EAGER)
    assert float(rows[2]["pairs_per_s"]) == finished.result["rows"][2]["pairs_per_s"]
    assert rows[0]["commit"] == finished.result["machine"]["commit"]
    text = finished.plot.read_text()
    assert all(name in text for name in EAGER)


@pytest.mark.slow
def test_every_timed_step_has_a_row_of_its_own(finished: FinishedRun) -> None:
    file = finished.csv.with_name("s.rounds.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["round"] for row in rows] == [str(n) for n in range(3) for _ in EAGER]
    assert {row["contender"] for row in rows[: len(EAGER)]} == set(EAGER)
    fast = [4 / float(row["seconds"]) for row in rows if row["contender"] == "fast"]
    assert sorted(fast)[1] == pytest.approx(finished.result["rows"][EAGER.index("fast")]["pairs_per_s"])


@pytest.mark.slow
def test_ratio_to_the_baseline_has_an_interval_and_a_verdict(finished: FinishedRun) -> None:
    rows = finished.result["rows"]
    for row in rows:
        assert row["vs_eager_low"] <= row["vs_eager"] <= row["vs_eager_high"]
    baselines = [row for row in rows if row["contender"] in contenders.BASELINES]
    (fastest,) = [row for row in baselines if row["vs_eager_low"] == row["vs_eager_high"] == 1]
    assert fastest["verdict"] == ""
    assert all(row["verdict"] in ("faster", "slower", "no difference") for row in rows if row is not fastest)


@pytest.mark.slow
def test_step_changes_no_weight_and_leaves_no_gradient() -> None:
    torch.manual_seed(0)
    model = MaskVLM(MICRO)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = contenders.make_inputs(model, caption_lengths(3, 12, 8), torch.device("cpu"))
    for contender in contenders.make_contenders(EAGER, model, True):
        first, second = (timing.time_step(contender, inputs)[2] for _ in range(2))
        assert first == second
        assert all(p.grad is None for p in contender.module.parameters())
        assert contender.optimizer is not None
        assert len(contender.optimizer.state) == len(list(contender.module.parameters()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_only_the_fast_implementation_gets_rounded_totals() -> None:
    """As in training in bf16 on a CPU."""
    torch.manual_seed(0)
    model = MaskVLM(MICRO)
    seen: dict[str, int] = {}

    def record(name: str) -> Losses:
        def module(batch, masks, **settings) -> Losses:
            seen[name] = len(batch.tokens)
            return model(batch, masks, **settings)

        return contenders.compute_losses(name, module, inputs)

    inputs = contenders.make_inputs(model, caption_lengths(3, 12, 8), torch.device("cpu"), buckets=64)
    losses = {name: record(name) for name in (*contenders.IMPLEMENTATIONS, "fast-compiled")}
    total = len(inputs.batch.tokens)
    rounded = -(-(total + 1) // 16) * 16
    assert seen == {"plain": total, "fast": rounded, "drop_masked": rounded, "fast-compiled": rounded}
    for found, wanted in zip(losses["fast"], losses["plain"], strict=True):
        assert abs(found - wanted) <= 1e-5 * abs(wanted)


@pytest.mark.parametrize(("precision", "buckets"), [("fp32", 0), ("bf16", 64)])
def test_totals_are_rounded_in_bf16_on_a_cpu(micro, monkeypatch, precision, buckets) -> None:
    class Stop(Exception):
        pass

    def stop(model, lengths, device, buckets) -> None:
        raise Stop(buckets)

    monkeypatch.setattr(run, "make_inputs", stop)
    with pytest.raises(Stop, match=f"^{buckets}$"):
        run.run("tiny", 4, 1, ("fast",), precision=precision, device="cpu")


def test_contender_with_wrong_losses_is_not_timed(micro, monkeypatch) -> None:
    compute_losses = contenders.compute_losses

    def wrong(name, module, inputs) -> Losses:
        losses = compute_losses(name, module, inputs)
        return losses._replace(mim=losses.mim * 1.01) if name == "timm+decoder-layer" else losses

    monkeypatch.setattr(run, "compute_losses", wrong)
    monkeypatch.setattr(run, "measure_rounds", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=r"timm\+decoder-layer: mim is .*, wanted .*; nothing was timed"):
        run.run("tiny", 4, 1, EAGER, precision="fp32", device="cpu")


@pytest.mark.slow
def test_contender_that_cannot_be_compiled_is_reported_and_not_timed(micro, monkeypatch, capsys) -> None:
    def compiled(module):
        def call(*_, **__):
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    names = ("timm+roberta-compiled", "timm+roberta", "plain")
    result = run.run("tiny", 4, 1, names, precision="fp32", device="cpu", optimizer=False)
    assert [row["contender"] for row in result["rows"]] == ["timm+roberta", "plain"]
    assert result["not_timed"] == [{"contender": "timm+roberta-compiled", "note": "RuntimeError: no compiler here"}]
    assert "timm+roberta-compiled: RuntimeError: no compiler here" in capsys.readouterr().out


def test_compiled_losses_are_compared_with_eager_ones(micro, monkeypatch) -> None:
    def compiled(module):
        def call(*args, **kwargs):
            losses = module(*args, **kwargs)
            return losses._replace(itm=losses.itm * 1.01)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(AssertionError, match=r"timm\+roberta-compiled: itm is"):
        run.run("tiny", 4, 1, ("timm+roberta-compiled",), precision="fp32", device="cpu", optimizer=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 1}, "batch: wanted at least 2, got 1"),
        ({"rounds": 0}, "rounds: wanted at least 1, got 0"),
        ({"contenders": ("timm",)}, "contenders: wanted some of timm.roberta, .* got 'timm'"),
        ({"precision": "fp8"}, "precision: wanted auto, bf16, fp32, got 'fp8'"),
        ({"preset": "huge"}, "unknown preset: wanted one of tiny, small, base, got 'huge'"),
        ({"seconds": 0.0}, "seconds: wanted a number above 0, got 0"),
        ({"device": "tpu"}, "device: wanted auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_wrong_arguments_are_config_errors(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        run.run(**({"preset": "tiny", "batch": 4, "rounds": 1} | changes))


def test_command_passes_its_flags(monkeypatch, tmp_path) -> None:
    from mvlm import cli

    seen = {}
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    monkeypatch.setattr(
        sys, "argv",
        ["mvlm", "bench", "step", "--preset", "base", "--batch", "4", "--rounds", "2", "--contenders", "plain",
         "--no-optimizer", "--threads", "1", "--precision", "fp32", "--json", str(tmp_path / "s.json")],
    )  # fmt: skip
    cli.main()
    assert seen["args"] == ("base", 4, 2, ("plain",))
    assert (seen["optimizer"], seen["threads"], seen["precision"]) == (False, 1, "fp32")
    assert seen["json"] == tmp_path / "s.json"


def test_commands_of_the_page_are_accepted(monkeypatch) -> None:
    from mvlm import cli

    page = Path(__file__).parents[3] / "docs" / "evidence" / "step.md"
    (block,) = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    checked = []

    def check(preset, batch, rounds, names, *, precision, threads, **_) -> None:
        checked.append(run.check_arguments(batch, rounds, threads, names, precision))
        MaskVLMConfig.preset(preset)

    monkeypatch.setattr(run, "run", check)
    for line in block.splitlines():
        words = line.split()
        assert words[0] == "mvlm"
        cli.run_command(words[1:])
    assert checked[0] == contenders.CONTENDERS
    assert len(checked) == 3
