"""`mvlm bench step` at a micro size: checks before it times, ratios, files, profile."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvlm.config import MaskVLMConfig
from mvlm.errors import ConfigError
from mvlm.model import MaskVLM
from mvlm.objectives import Losses
from mvlm_benchmarks import contenders, step, step_profile, step_report
from mvlm_kernels.hardware import GPUS

MICRO = MaskVLMConfig(
    image_size=32, patch_size=8, mask_block=16, width=32, heads=2, image_layers=1, text_layers=1, cross_layers=1,
    decoder_layers=1, vocab_size=300, mask_token_id=4, text_length=12, itc_width=8,
)  # fmt: skip
EAGER = ("timm+roberta", "timm+decoder-layer", "plain", "fast", "drop_masked")


@pytest.fixture
def micro(monkeypatch) -> None:
    monkeypatch.setattr(MaskVLMConfig, "preset", classmethod(lambda cls, name, **changes: MICRO))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of the eager contenders with every file it can write."""
    folder = tmp_path_factory.mktemp("step")
    files = {"json": folder / "new/s.json", "csv": folder / "s.csv", "plot": folder / "s.svg", "profile": folder / "p"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskVLMConfig, "preset", classmethod(lambda cls, name, **changes: MICRO))
        result = step.run("tiny", 4, 3, EAGER, precision="fp32", device="cpu", **files)
    return SimpleNamespace(result=result, **files)


def test_the_json_is_the_contract(ran) -> None:
    found = json.loads(ran.json.read_text())
    assert found == ran.result
    assert {"device", "commit", "torch", "versions"} <= found["machine"].keys()
    assert found["gflop_per_pair"].keys() == {"baseline", *contenders.PLANS}
    assert found["gflop_per_pair"]["plain"] < found["gflop_per_pair"]["baseline"]
    assert [row["contender"] for row in found["rows"]] == list(EAGER)
    for row in found["rows"]:
        if row["contender"] != "drop_masked":
            assert row["loss"] == pytest.approx(found["rows"][0]["loss"], rel=1e-5)
        assert 0 < row["pairs_per_s_p20"] <= row["pairs_per_s"] <= row["pairs_per_s_p80"]
        assert row["peak_mb"] > 0
    assert max(row["vs_eager"] for row in found["rows"][:2]) >= 1
    assert min(abs(row["vs_eager"] - 1) for row in found["rows"][:2]) == 0
    assert found["rows"][0]["vs_compiled"] is None
    for name, parts in found["gflop_by_part"].items():
        assert sum(parts.values()) == pytest.approx(found["gflop_per_pair"][name])


def test_csv_and_plot(ran) -> None:
    rows = list(csv.DictReader(ran.csv.read_text().splitlines()))
    assert [row["contender"] for row in rows] == list(EAGER)
    assert float(rows[2]["pairs_per_s"]) == ran.result["rows"][2]["pairs_per_s"]
    assert rows[0]["commit"] == ran.result["machine"]["commit"]
    text = ran.plot.read_text()
    assert all(name in text for name in EAGER)


def test_the_profile_has_every_part_and_traces(ran) -> None:
    assert (ran.profile / "breakdown.png").stat().st_size > 5000
    for name in EAGER:
        events = json.loads((ran.profile / f"{name}.trace.json").read_text())["traceEvents"]
        ranges = {e["name"] for e in events if str(e.get("name", "")).startswith("part:")}
        assert ranges >= {f"part:{part}" for part in (*step_profile.PARTS, "backward", "optimizer")}


def test_the_optimizer_moves_nothing_and_no_gradient_is_left() -> None:
    torch.manual_seed(0)
    model = MaskVLM(MICRO)
    before = {name: p.clone() for name, p in model.named_parameters()}
    inputs = contenders.make_inputs(model, step.caption_lengths(3, 12, 8), torch.device("cpu"))
    for contender in contenders.make_contenders(EAGER, model, True):
        first, second = (step.time_step(contender, inputs)[2] for _ in range(2))
        assert first == second
        assert all(p.grad is None for p in contender.module.parameters())
        assert contender.optimizer is not None
        assert len(contender.optimizer.state) == len(list(contender.module.parameters()))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_a_contender_with_other_losses_is_not_timed(micro, monkeypatch) -> None:
    honest = contenders.losses_of

    def wrong(name, module, inputs) -> Losses:
        losses = honest(name, module, inputs)
        return losses._replace(mim=losses.mim * 1.01) if name == "timm+decoder-layer" else losses

    monkeypatch.setattr(step, "losses_of", wrong)
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(AssertionError, match=r"timm\+decoder-layer: mim is .*, wanted .*; nothing was timed"):
        step.run("tiny", 4, 1, EAGER, precision="fp32", device="cpu")


def test_what_cannot_be_compiled_is_named_and_the_rest_goes_on(micro, monkeypatch, capsys) -> None:
    def compiled(module):
        def call(*_, **__):
            raise RuntimeError("no compiler\nhere")

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    names = ("timm+roberta-compiled", "timm+roberta", "plain")
    result = step.run("tiny", 4, 1, names, precision="fp32", device="cpu", optimizer=False)
    assert [row["contender"] for row in result["rows"]] == ["timm+roberta", "plain"]
    assert result["not_timed"] == [{"contender": "timm+roberta-compiled", "note": "RuntimeError: no compiler here"}]
    assert "timm+roberta-compiled: RuntimeError: no compiler here" in capsys.readouterr().out


def test_compiled_losses_are_held_against_eager_ones(micro, monkeypatch) -> None:
    def compiled(module):
        def call(*args, **kwargs):
            losses = module(*args, **kwargs)
            return losses._replace(itm=losses.itm * 1.01)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(AssertionError, match=r"timm\+roberta-compiled: itm is"):
        step.run("tiny", 4, 1, ("timm+roberta-compiled",), precision="fp32", device="cpu", optimizer=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 1}, "batch: wanted at least 2, got 1"),
        ({"rounds": 0}, "rounds: wanted at least 1, got 0"),
        ({"contenders": ("timm",)}, "contenders: wanted some of timm.roberta, .* got 'timm'"),
        ({"precision": "fp8"}, "precision: wanted auto, bf16, fp32, got 'fp8'"),
        ({"preset": "huge"}, "unknown preset: wanted one of tiny, small, base, got 'huge'"),
        ({"device": "tpu"}, "device: wanted auto, cpu or cuda, got 'tpu'"),
    ],
)
def test_settings_that_cannot_be(changes, message) -> None:
    with pytest.raises(ConfigError, match=message):
        step.run(**({"preset": "tiny", "batch": 4, "rounds": 1} | changes))


def test_ratios_are_medians_over_rounds_against_the_fastest_baseline() -> None:
    """The machine is ten times as slow in the second round: a ratio of medians would not see through it."""
    rows = [
        {"contender": "timm+roberta", "seconds": [2.0, 20.0, 2.0]},
        {"contender": "timm+decoder-layer", "seconds": [3.0, 30.0, 3.0]},
        {"contender": "timm+roberta-compiled", "seconds": [1.5, 15.0, 1.5]},
        {"contender": "plain", "seconds": [1.0, 10.0, 1.0]},
    ]
    for number, row in enumerate(rows):
        row |= {"note": "", "cpu_seconds": row["seconds"], "peak_mb": 10.0 * (number + 1)}
    counts = {"timm+roberta": ({"ITM": 2.0}, 4.0), "plain": ({"ITM": 1.0}, 2.0)}
    step_report.compare(rows, counts, 8, GPUS["H100"])
    assert [row["vs_eager"] for row in rows] == pytest.approx([1, 2 / 3, 4 / 3, 2])
    assert [row["vs_compiled"] for row in rows] == pytest.approx([0.75, 0.5, 1, 1.5])
    assert [row["peak_vs_eager"] for row in rows] == pytest.approx([1, 2, 3, 4])
    assert [row["pairs_per_s"] for row in rows] == pytest.approx([4, 8 / 3, 16 / 3, 8])
    # 3 GFLOP of its own, 6 of the baseline's, at 8 pairs a second.
    assert rows[3]["mfu_pct"] == pytest.approx(100 * 24e9 / 989e12)
    assert rows[3]["mfu_baseline_pct"] == pytest.approx(100 * 48e9 / 989e12)
    assert "-" in step_report.table(rows)


def test_ratios_without_a_baseline_are_not_there() -> None:
    rows = [{"contender": "plain", "note": "", "seconds": [1.0], "cpu_seconds": [1.0], "peak_mb": 5.0}]
    step_report.compare(rows, {"timm+roberta": ({}, 1.0)}, 8, None)
    assert rows[0]["vs_eager"] is rows[0]["vs_compiled"] is rows[0]["peak_vs_eager"] is None
    assert "mfu_pct" not in rows[0]


@pytest.mark.parametrize("limit, found", [(3, 0), (4, 4), (7, 7), (100, range(88, 101))])
def test_the_largest_batch(limit, found) -> None:
    tried = []

    def fits(number: int) -> bool:
        tried.append(number)
        return number <= limit

    got = step.largest(fits, 4)
    assert got in found if isinstance(found, range) else got == found
    assert len(tried) <= 10


@pytest.mark.parametrize(
    "error, beyond, found, note",
    [
        (torch.OutOfMemoryError("no room"), 40, 40, ""),
        (RuntimeError("invalid configuration argument"), 40, 40, "a batch of 44 ends with"),
        (RuntimeError("the device is lost"), 0, None, "the largest batch was not found"),
    ],
)
def test_what_ends_the_search_for_the_largest_batch_keeps_the_figures(monkeypatch, error, beyond, found, note) -> None:
    model = MaskVLM(MaskVLMConfig.preset("tiny", text_length=8))
    monkeypatch.setattr(step, "make_inputs", lambda _, lengths, device: len(lengths))

    def time_step(_, batch: int) -> None:
        if batch > beyond:
            raise error

    def empty_cache() -> None:
        if not beyond:
            raise error

    monkeypatch.setattr(step, "time_step", time_step)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    row: dict = {"contender": "fast", "note": ""}
    step._largest_batches([row], [SimpleNamespace(module=model)], model, 8)  # pyright: ignore[reportArgumentType]
    assert row["note"].startswith(note)
    assert bool(row["note"]) == bool(note)
    assert row.get("largest_batch") == (None if found is None else pytest.approx(found, rel=1 / 8))


def node(name: str, start: float, end: float, number: int = -1):
    span = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(
        name=name, time_range=span, sequence_nr=number, device_type="DeviceType.CPU", cpu_time_total=end - start
    )


def test_a_breakdown_books_the_backward_to_the_part_that_made_it() -> None:
    engine = step_profile.NODE
    events = [
        node("part:ITM", 0, 1000),
        node("part:MIM cross", 100, 300),  # inside ITM
        node("aten::mm", 150, 250, number=5),
        node("aten::t", 1500, 1600, number=6),  # between parts, made no node
        node("part:ITC", 2000, 2400),
        node("aten::mm", 2100, 2200, number=6),
        node("part:MIM cross", 2500, 2900),
        node("part:decoder", 2600, 2700),  # inside another part
        node("part:backward", 3000, 6000),
        node(f"{engine}: MmBackward0", 3000, 3500, number=6),
        node(f"{engine}: MmBackward0", 3500, 5500, number=5),
        node(f"{engine}: torch::autograd::AccumulateGrad", 5500, 5700),
        node("part:optimizer", 6000, 7000),
    ]
    assert step_profile.breakdown(events, "cpu_time_total") == {
        "ITM": {"forward": 1.0, "backward": 2.0},
        "ITC": {"forward": 0.4, "backward": 0.5},
        "MIM cross": {"forward": pytest.approx(0.3), "backward": 0.0},
        "decoder": {"forward": 0.1, "backward": 0.0},
        "other": {"forward": pytest.approx(1.2), "backward": pytest.approx(0.5)},
        "optimizer": {"forward": 1.0, "backward": 0.0},
    }


def test_the_command_hands_its_flags_on(monkeypatch, tmp_path) -> None:
    from mvlm import cli

    seen = {}
    monkeypatch.setattr(step, "run", lambda *args, **kwargs: seen.update(args=args, **kwargs))
    monkeypatch.setattr(
        sys, "argv",
        ["mvlm", "bench", "step", "--preset", "base", "--batch", "4", "--rounds", "2", "--contenders", "plain",
         "--no-optimizer", "--threads", "1", "--precision", "fp32", "--json", str(tmp_path / "s.json")],
    )  # fmt: skip
    cli.main()
    assert seen["args"] == ("base", 4, 2, ("plain",))
    assert (seen["optimizer"], seen["threads"], seen["precision"]) == (False, 1, "fp32")
    assert seen["json"] == tmp_path / "s.json"


def test_every_command_of_the_page_is_one(monkeypatch) -> None:
    from mvlm import cli

    page = Path(__file__).parents[2] / "docs" / "step.md"
    (block,) = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    checked = []

    def run(preset, batch, rounds, names, *, precision, threads, **_) -> None:
        checked.append(step._names(batch, rounds, threads, names, precision))
        MaskVLMConfig.preset(preset)

    monkeypatch.setattr(step, "run", run)
    for line in block.splitlines():
        words = line.split()
        assert words[0] == "mvlm"
        cli.run_command(words[1:])
    assert checked[0] == contenders.CONTENDERS
    assert len(checked) == 4
