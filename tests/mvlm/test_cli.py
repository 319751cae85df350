"""The command line, in this process where that is enough: what it prints, its exit codes, and what it leaves alone."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm import cli
from mvlm.config.model import PRESETS
from mvlm.errors import ConfigError, RunError
from mvlm.model import fast
from mvlm.runs.folder import read_metrics
from mvlm.runs.load import load_model
from mvlm_dataloading import DataError, open_dataset
from support.folders import folder_hash
from support.scenes import overwrite, png, scene

MICRO = [
    "--model.image-size",
    "32",
    "--model.patch-size",
    "8",
    "--model.mask-block",
    "16",
    "--model.width",
    "16",
    "--model.heads",
    "2",
    "--model.image-layers",
    "2",
    "--model.text-layers",
    "2",
    "--model.cross-layers",
    "2",
    "--model.decoder-layers",
    "2",
    "--model.vocab-size",
    "300",
    "--model.text-length",
    "12",
    "--model.itc-width",
    "8",
    "--max-steps",
    "2",
    "--batch-size",
    "8",
    "--warmup-steps",
    "1",
    "--device",
    "cpu",
]


class Outcome:
    """What a command did: its exit code, the lines it printed, and those on the error stream, with what was logged."""

    def __init__(self, code: int, out: list[str], err: list[str]) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def mvlm(monkeypatch, capsys, caplog, without_tensorboard):
    """Runs `mvlm WORDS` in this process."""

    def run(*words: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mvlm", *map(str, words)])
        capsys.readouterr()
        caplog.clear()
        code = 0
        with caplog.at_level("INFO"):
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        shown = capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records]
        return Outcome(code, shown.out.splitlines(), logged + shown.err.splitlines())

    return run


def refused(outcome: Outcome, *words: str) -> None:
    """Exit code 2 and one line, which holds the words."""
    assert outcome.code == 2
    assert outcome.out == []
    assert len(outcome.err) == 1, outcome.err
    assert outcome.err[0].startswith("mvlm: ")
    for word in words:
        assert word in outcome.err[0]


@pytest.fixture
def data(scenes, tmp_path) -> Path:
    """A copy of the data set, to be broken."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


def missing_shard(data: Path, split: str) -> None:
    (data / f"{split}-000000.tar").unlink()


def empty_shard(data: Path, split: str) -> None:
    (data / f"{split}-000000.tar").write_bytes(b"")
    os.utime(data / f"{split}-000000.idx")


def unreadable_tar(data: Path, split: str) -> None:
    tar = data / f"{split}-000000.tar"
    tar.write_bytes(np.random.default_rng(0).bytes(tar.stat().st_size))
    os.utime(data / f"{split}-000000.idx")


def older_index(data: Path, split: str) -> None:
    os.utime(data / f"{split}-000000.idx", (1, 1))


def missing_index(data: Path, split: str) -> None:
    (data / f"{split}-000000.idx").unlink()


def blank_caption(data: Path, split: str) -> None:
    overwrite(open_dataset(data, split), "text", [2], b" ")


def missing_description(data: Path, split: str) -> None:
    (data / "dataset.json").unlink()


BROKEN = [
    (missing_shard, "000000.tar: wanted a shard that dataset.json names, found no such file; restore it"),
    (empty_shard, "found an empty file; restore it or build the data set again"),
    (unreadable_tar, "wanted a tar file, found something unreadable"),
    (older_index, "wanted an index at least as new as"),
    (missing_index, "000000.idx: wanted the index of"),
    (blank_caption, "wanted at least one caption, found none; remove the sample or write its captions"),
    (missing_description, "dataset.json: wanted the data set's description, found no such file"),
]


@pytest.mark.parametrize("damage, message", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_pretraining_on_broken_data(mvlm, data, tmp_path, damage, message):
    damage(data, "train")
    before = folder_hash(tmp_path)
    outcome = mvlm("pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *MICRO)
    refused(outcome, message)
    assert outcome.err[0].startswith(f"mvlm: {data}")  # what is wrong comes first, and it is the data
    assert folder_hash(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage, message", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_evaluating_on_broken_data(mvlm, data, tmp_path, run_copy, damage, message):
    damage(data, "test")
    (tmp_path / "test.json").write_text("an earlier evaluation")
    before = folder_hash(tmp_path)
    words = ("--checkpoint", run_copy, "--data", data, "--out", tmp_path / "test.json")
    refused(mvlm("eval", "retrieval", *words), message, str(data))
    assert folder_hash(tmp_path) == before


def test_evaluating_on_a_picture_that_cannot_be_decoded(mvlm, data, tmp_path, trained):
    overwrite(open_dataset(data, "test"), "image", [5])
    before = folder_hash(tmp_path)
    outcome = mvlm("eval", "retrieval", "--checkpoint", trained, "--data", data, "--out", tmp_path / "test.json")
    refused(outcome, "test-000000.tar offset", "test005: wanted an image, found one that cannot be decoded; remove the")
    assert folder_hash(tmp_path) == before


def test_pretraining_on_pictures_that_cannot_be_decoded(mvlm, data, tmp_path):
    """Each is named, and more than 5 % of them, two of 32, stop the run."""
    overwrite(open_dataset(data, "train"), "image", [4])
    outcome = mvlm("pretrain", "tiny", "--data", data, "--out", tmp_path / "one", *MICRO, "--max-steps", 5)
    assert outcome.code == 0
    assert [line.split(":")[0] for line in outcome.err] == ["skipped an image that cannot be decoded"]
    assert read_metrics(tmp_path / "one/metrics.jsonl")[-1]["skipped"] == 1

    overwrite(open_dataset(data, "train"), "image", [9])
    before = folder_hash(data)
    outcome = mvlm("pretrain", "tiny", "--data", data, "--out", tmp_path / "two", *MICRO, "--max-steps", 5)
    assert outcome.code == 2
    assert "wanted at most 5% undecodable images, found 2 of 32; build the data set again" in outcome.err[-1]
    assert all(line.startswith("skipped an image that cannot be decoded") for line in outcome.err[:-1])
    assert folder_hash(data) == before


def test_data_that_is_not_there(mvlm, tmp_path, trained):
    refused(
        mvlm("pretrain", "tiny", "--data", tmp_path / "none", "--out", tmp_path / "run", *MICRO),
        f"{tmp_path / 'none'}: wanted a data folder, found none; `mvlm data` writes one",
    )
    refused(
        mvlm("eval", "retrieval", "--checkpoint", trained, "--data", tmp_path / "none"), "wanted a data folder, found"
    )
    assert not list(tmp_path.iterdir())


def test_a_split_that_is_not_there(mvlm, scenes, trained):
    words = ("--checkpoint", trained, "--data", scenes, "--split", "tset")
    refused(mvlm("eval", "retrieval", *words), "wanted the split tset, found test, train, validation")


def test_an_out_folder_with_a_different_run(mvlm, scenes, run_copy):
    before = folder_hash(run_copy)
    for resume in ((), ("--resume",)):
        outcome = mvlm("pretrain", "tiny", "--data", scenes, "--out", run_copy, *MICRO, "--seed", 5, *resume)
        refused(outcome, f"{run_copy}: holds a different run", "seed: there 0, here 5", "choose another --out")
        assert folder_hash(run_copy) == before


def test_a_mistake_leaves_no_run_behind(mvlm, scenes, tmp_path):
    """Settings that are found wrong only when the run is put together; the corrected command is given then."""
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO)
    outcome = mvlm(*words, "--accumulate", 3)
    refused(outcome, "batch_size: wanted a multiple of 1 ranks x 3 microbatches = 3, got 8")
    assert not list(tmp_path.rglob("*.json*"))
    assert mvlm(*words, "--accumulate", 2).code == 0


def test_an_out_folder_with_this_run(mvlm, scenes, tmp_path):
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO)
    assert mvlm(*words).code == 0
    before = folder_hash(tmp_path)
    refused(mvlm(*words), "holds this run already; continue it with --resume, or choose another --out")
    assert folder_hash(tmp_path) == before
    outcome = mvlm(*words, "--resume")
    assert outcome.code == 0
    assert "is complete: 2 of 2 steps" in outcome.err[-1]
    assert folder_hash(tmp_path) == before


def test_an_out_folder_with_other_files(mvlm, scenes, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    before = folder_hash(tmp_path)
    refused(mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path, *MICRO), "found other files; choose another")
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize(
    "words, message",
    [
        (
            ["pretrain", "hgue", "--data", "d", "--out", "o"],
            "unknown preset: wanted one of tiny, small, base, got 'hgue'",
        ),
        (["pretrain"], "wanted a preset after `mvlm pretrain`: tiny, small, base, or --config FILE; got nothing"),
        (
            ["pretrain", "--data", "d"],
            "wanted a preset after `mvlm pretrain`: tiny, small, base, or --config FILE; got '--data'",
        ),
        (["pretrian", "tiny"], "unknown command 'pretrian'; did you mean `mvlm pretrain`?"),
        (["eval", "retreival"], "unknown command 'eval retreival'; did you mean `mvlm eval retrieval`?"),
        (["eval"], "unknown command 'eval'; "),
        (["data", "emjoi", "out"], "unknown command 'data emjoi'; did you mean `mvlm data emoji`?"),
        (["zzz"], "unknown command 'zzz'; wanted one of: data emoji, data coco"),
    ],
)
def test_mistyped_commands_and_presets(mvlm, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(mvlm(*words), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.heads", "0"], "heads must be at least 1, got 0"),
        (["--model.heads", "3"], "heads must divide width: wanted a divisor of 16, got 3"),
        (["--model.mask-block", "12"], "mask_block must divide image_size: wanted a divisor of 32, got 12"),
        (["--model.image-mask-ratio", "0"], "image_mask_ratio must hide 1 to 4 of 4 blocks, got 0"),
        (["--model.vocab-size", "100"], "model.vocab_size: wanted a vocabulary of at least 261"),
        (["--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["--lr-cross", "nan"], "lr_cross must be a finite number, got nan"),
        (["--clip-norm", "-1"], "clip_norm must be above 0, got -1.0"),
        (["--beta2", "1.5"], "beta2 must be in [0, 1), got 1.5"),
        (["--seed", "99999999999999999999"], "seed must be in [-2^63, 2^64), got 99999999999999999999"),
        (["--crop-scale", "0.5", "1.5"], "crop_scale must be 0 < smallest <= largest <= 1"),
        (["--tokenizer", "none.json"], "none.json: wanted a tokenizer.json, found no such file"),
    ],
)
def test_settings_that_cannot_be(mvlm, scenes, tmp_path, words, message):
    outcome = mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO, *words)
    assert outcome.code == 2
    assert message in " ".join(" ".join(outcome.err).split())  # a long message in a box is wrapped
    assert "Traceback" not in " ".join(outcome.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words, message",
    [
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--max-stpes", "3"], "max-steps"),
        (["pretrain", "tiny", "--data", "d"], "--out"),
        (["pretrain", "tiny", "--out", "o"], "--data"),
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--max-steps", "many"], "many"),
        (["pretrain", "tiny", "--data", "d", "--out", "o", "--precision", "fp8"], "fp8"),
        (["eval", "retrieval", "--chekpoint", "c", "--data", "d"], "checkpoint"),
        (["report"], "The run folder"),
    ],
)
def test_mistyped_flags(mvlm, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = mvlm(*words)
    assert outcome.code == 2
    assert message in "\n".join(outcome.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_there(mvlm, scenes, trained, tmp_path):
    words = ("--data", scenes, "--device", "cuda")
    refused(
        mvlm("pretrain", "tiny", "--out", tmp_path / "run", *MICRO, *words), "device: wanted cuda, but torch finds no"
    )
    refused(mvlm("eval", "retrieval", "--checkpoint", trained, *words), "device: wanted cuda, but torch finds no")
    words = ("--checkpoint", trained, "--data", scenes, "--device", "gpu")
    refused(mvlm("eval", "retrieval", *words), "device: wanted auto, cpu or cuda, got 'gpu'")
    assert not list(tmp_path.iterdir())


def another_architecture(run: Path) -> None:
    """Give the checkpoints of a run another model.json, with a manifest that fits."""
    from mvlm.runs.checkpoint import sha256

    for folder in (run / "checkpoints").iterdir():
        config = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(config | {"width": 24}))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["model.json"] = sha256(folder / "model.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("command", ["eval retrieval", "reconstruct", "fill", "report"])
def test_a_checkpoint_of_another_architecture(mvlm, scenes, run_copy, tmp_path, command):
    another_architecture(run_copy)
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    picture = ("--checkpoint", run_copy, "--image", tmp_path / "a.png", "--caption", "red [MASK]")
    words = {
        "eval retrieval": ("--checkpoint", run_copy, "--data", scenes, "--out", tmp_path / "test.json"),
        "reconstruct": (*picture, "--out", tmp_path / "b.png"),
        "fill": picture,
        "report": (run_copy,),
    }[command]
    before = folder_hash(tmp_path)
    refused(mvlm(*command.split(), *words), "model: a checkpoint of another architecture: ", "wanted (24,)")
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize("command", ["eval retrieval", "reconstruct", "fill"])
def test_a_checkpoint_that_is_not_there(mvlm, scenes, tmp_path, command):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = {
        "eval retrieval": ("--data", scenes),
        "reconstruct": ("--image", tmp_path / "a.png", "--caption", "red", "--out", tmp_path / "b.png"),
        "fill": ("--image", tmp_path / "a.png", "--caption", "red [MASK]"),
    }[command]
    outcome = mvlm(*command.split(), "--checkpoint", tmp_path / "none", *words)
    refused(outcome, "none: wanted a run, a checkpoint or an exported folder, found no such folder; check the path")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_run_that_is_no_run_folder_is_refused_by_what_is_there(mvlm, trained, tmp_path):
    """Nothing, a file, an empty folder: for every command that takes a run."""
    missing, file, empty, out = (tmp_path / name for name in ("missing", "file", "empty", "out"))
    file.write_text("a file")
    empty.mkdir()
    wanted = "wanted a run, a checkpoint or an exported folder, found"
    refused(mvlm("export", missing, out), f"{missing}: {wanted} no such folder; check the path")
    refused(mvlm("export", file, out), f"{file}: {wanted} a file; check the path")
    refused(
        mvlm("export", empty, out), f"{empty}: {wanted} no finished checkpoint (checkpoints/step_*), no manifest.json"
    )
    for words in ((), (trained,)):
        refused(
            mvlm("report", missing, *words), f"{missing}: wanted a run folder, found no such folder; check the path"
        )
        refused(mvlm("report", file, *words), f"{file}: wanted a run folder, found a file; check the path")
    refused(mvlm("report", empty), f"{empty}/config.json: wanted the configuration of a run, found no such file")
    refused(mvlm("report", empty, trained), f"{empty}/metrics.jsonl: wanted the metrics of a run, found none")
    outcome = mvlm("pretrain", "--config", missing, "--out", out)
    refused(outcome, f"{missing}: wanted the configuration of a run, found no such file; check the path")
    outcome = mvlm("pretrain", "--config", empty, "--out", out)
    refused(outcome, f"{empty}: wanted the configuration of a run, found a folder; name a config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("command", ["pretrain", "export", "report", "eval retrieval"])
def test_a_path_that_cannot_be(mvlm, scenes, trained, tmp_path, command):
    """A file where a folder would have to be."""
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file/x/y"
    words = {
        "pretrain": ("tiny", "--data", scenes, "--out", out, *MICRO),
        "export": (trained, out),
        "report": (made_up(tmp_path / "a"), made_up(tmp_path / "b"), "--out", out),
        "eval retrieval": ("--checkpoint", trained, "--data", scenes, "--out", out),
    }[command]
    outcome = mvlm(*command.split(), *words)
    assert outcome.code == 2
    told = r"could not be read or written \(Not a directory\); check the path and its permissions"
    assert re.fullmatch(rf"mvlm: {tmp_path}/file(/x|/x/y): {told}", outcome.err[-1])
    assert (tmp_path / "file").read_text() == "a file"


def made_up(run: Path) -> Path:
    """What a comparison needs of a run."""
    run.mkdir()
    (run / "config.json").write_text('{"format_version": 2}')
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1.5}\n')
    return run


def test_a_fault_of_the_system_without_a_path_keeps_its_traceback(mvlm, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(OSError, match="Input/output error"):
        mvlm("pretrain")


@pytest.mark.parametrize("text", ["{}", "", "no figures", "[1]", '{"split": "test"}', "[" * 100_000])
@pytest.mark.parametrize("others", [[], ["other"]])
def test_a_report_of_figures_that_are_none(mvlm, run_copy, tmp_path, text, others):
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text(text)
    outcome = mvlm("report", run_copy, *(made_up(tmp_path / name) for name in others))
    refused(outcome, f"{run_copy}/eval/test.json: wanted the figures that `mvlm eval retrieval` writes, got ")


def test_a_picture_that_does_not_open(mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_text("no picture")
    before = folder_hash(tmp_path)
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png", "--caption", "red [MASK]")
    refused(mvlm("reconstruct", *words, "--out", tmp_path / "b.png"), "a.png: wanted an image, could not read it")
    refused(mvlm("fill", *words), "a.png: wanted an image, could not read it")
    assert folder_hash(tmp_path) == before


def test_nothing_to_fill_in(mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png")
    refused(mvlm("fill", *words, "--caption", "red"), "caption: wanted at least one [MASK], got 'red'")
    late = "red " * 40 + "[MASK]"
    refused(mvlm("fill", *words, "--caption", late), "caption: wanted every [MASK] among the first")
    most = load_model(trained)[1].vocab_size
    for top in (0, most + 1):
        outcome = mvlm("fill", *words, "--caption", "a [MASK]", "--top", top)
        refused(outcome, f"top: wanted 1 to {most}, got {top}")


def test_nothing_to_re_rank(mvlm, trained, scenes):
    outcome = mvlm("eval", "retrieval", "--checkpoint", trained, "--data", scenes, "--rerank", 0)
    refused(outcome, "rerank: wanted at least 1, got 0")


def test_a_report_without_an_evaluation(mvlm, trained):
    before = folder_hash(trained)
    refused(mvlm("report", trained), "wanted the run's evaluation, found none; first run `mvlm eval retrieval")
    assert folder_hash(trained) == before


def test_a_loss_that_is_not_finite_stops_with_another_code(mvlm, scenes, tmp_path, monkeypatch):
    loss = fast.linear_pixel_loss
    monkeypatch.setattr(fast, "linear_pixel_loss", lambda *inputs, **more: loss(*inputs, **more) + float("nan"))
    outcome = mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO, "--max-bad-steps", 0)
    assert outcome.code == 1
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith("mvlm: step 1: mim is nan; the update was not made (1 in a row, ")


@pytest.mark.parametrize("kind", [ConfigError, RunError, DataError])
def test_a_message_of_several_lines_becomes_one(mvlm, monkeypatch, kind):
    def fail(_):
        raise kind("found a file:\n  line 3,\n  line 4")

    monkeypatch.setattr(cli, "run_command", fail)
    outcome = mvlm("pretrain")
    assert (outcome.code, outcome.err) == (2, ["mvlm: found a file: line 3, line 4"])


def test_a_fault_of_our_own_keeps_its_traceback(mvlm, monkeypatch):
    def fail(_):
        raise ValueError("not the user's doing")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(ValueError, match="not the user's doing"):
        mvlm("pretrain")


def test_an_interrupt(mvlm, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_command", interrupt)
    outcome = mvlm("pretrain")
    assert (outcome.code, outcome.err) == (130, ["mvlm: interrupted"])


def test_from_shards_to_a_report(mvlm, scenes, tmp_path):
    run = tmp_path / "run"
    outcome = mvlm("pretrain", "tiny", "--data", scenes, "--out", run, *MICRO, "--log-every", 2)
    assert outcome.code == 0
    assert [line.split("  ")[0] for line in outcome.out] == ["step 2/2"]
    assert all(
        re.fullmatch(r"step \d/2  mlm \S+  mim \S+  itc \S+  itm \S+  \d+ pairs/s", line) for line in outcome.out
    )
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [2]

    words = ("--checkpoint", run, "--data", scenes, "--split", "test", "--out", run / "eval/test.json", "--rerank", 4)
    outcome = mvlm("eval", "retrieval", *words)
    assert outcome.code == 0
    assert "all 8 images, 12 captions" in "\n".join(outcome.out)
    figures = json.loads((run / "eval/test.json").read_text())
    assert (figures["split"], figures["n_images"], figures["n_texts"], figures["reranked"]) == ("test", 8, 12, 4)
    assert list(figures["tr"]) == list(figures["ir"]) == ["r1", "r5", "r10"]
    assert {"itc", "unseen", "gain_text_nats", "gain_pixels_pct", "masked_l1"} < set(figures)

    outcome = mvlm("report", run)
    assert outcome.code == 0
    assert outcome.out == [str(run / "report.html")]
    assert (run / "report.html").read_text().startswith("<!doctype html>")

    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    picture = ("--checkpoint", run, "--image", tmp_path / "a.png")
    for out, message in ((tmp_path / "a.png", "another file than the image"), (tmp_path / "a.foo", "a .png file")):
        refused(mvlm("reconstruct", *picture, "--caption", "red", "--out", out), f"out: wanted {message}")
    for wrong, panels in ((), 3), (("--wrong-caption", "blue"), 4):
        out = tmp_path / f"new/{panels}.png"
        outcome = mvlm("reconstruct", *picture, "--caption", "red", "--out", out, *wrong)
        assert outcome.code == 0
        assert outcome.out[0].startswith(f"{out}: image, masked, rebuilt")
        with Image.open(out) as shown:
            assert shown.size == (32 * panels, 32)
            pixels = np.array(shown)
        assert (pixels[:, :32] == scene(0)[0]).all()
        grey = (pixels[:, 32:64] == 190).all(-1)
        assert grey.sum() == 32 * 32 / 2  # two of four blocks
        assert (pixels[:, 64:96][~grey] == pixels[:, :32][~grey]).all()

    outcome = mvlm("fill", *picture, "--caption", "red [MASK] left on [MASK]", "--top", 3)
    assert outcome.code == 0
    assert [line.split(":")[0] for line in outcome.out] == ["[MASK] 1", "[MASK] 2"]
    assert all(len(re.findall(r"\d+%", line)) == 3 for line in outcome.out)


def test_resuming_is_the_same_command_with_one_word_more(mvlm, scenes, tmp_path, monkeypatch):
    from mvlm.training.trainer import Trainer

    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO, "--max-steps", 4)
    one_step = Trainer.one_step

    def stop(run, batches):
        if run.step == 3:
            raise KeyboardInterrupt
        return one_step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop)
        assert mvlm(*words, "--checkpoint-every-steps", 2).code == 130
    outcome = mvlm(*words, "--resume")
    assert outcome.code == 0
    assert outcome.err == [
        "data resumed: same samples in the same order, same pixels, captions and masks",
        f"resuming from {tmp_path}/run/checkpoints/step_00000002",
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert load_model(tmp_path / "run")[0].config.width == 16


def test_building_the_emoji_data_set(mvlm, scenes, tmp_path, monkeypatch):
    import mvlm_dataloading

    asked = []

    def build(out, size, **_):
        asked.append((out, size))
        shutil.copytree(scenes, out)

    monkeypatch.setattr(mvlm_dataloading, "build_emoji", build)
    outcome = mvlm("data", "emoji", tmp_path / "emoji", "--size", 64)
    assert outcome.code == 0
    assert asked == [(tmp_path / "emoji", 64)]
    assert outcome.out == [f"{tmp_path / 'emoji'}: 32 train, 8 validation, 8 test"]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage(mvlm, words):
    outcome = mvlm(*words)
    assert outcome.code == 0
    for command in cli.COMMANDS:
        assert any(line.startswith(f"  mvlm {command} ") for line in outcome.out)


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_explains_itself(mvlm, command):
    outcome = mvlm(*command.split(), "--help")
    assert outcome.code == 0
    assert len(outcome.out) >= 2


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_explains_its_settings(mvlm, preset):
    outcome = mvlm("pretrain", preset, "--help")
    assert outcome.code == 0
    text = "\n".join(outcome.out)
    for flag in ("--data", "--out", "--max-steps", "--batch-size", "--checkpoint-every-steps", "--log-every", "--seed"):
        assert flag in text
    assert "--resume" in text


def run_process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)


def test_mistakes_are_answered_without_loading_torch():
    """In a process of its own, as a user meets it: one line, exit code 2, at once."""
    program = (
        "import sys, atexit, mvlm.cli\n"
        "atexit.register(lambda: print(sorted({'torch', 'nvidia.dali', 'tensorboard'} & set(sys.modules))))\n"
        "mvlm.cli.main()"
    )
    done = run_process("-c", program, "pretrain", "hgue", "--data", "d", "--out", "o")
    assert done.returncode == 2
    assert done.stderr == "mvlm: unknown preset: wanted one of tiny, small, base, got 'hgue'\n"
    assert done.stdout == "[]\n"


def test_the_module_is_the_program(data, tmp_path):
    """`python -m mvlm`, with broken data: nothing but one line is on the error stream, no warning either."""
    missing_shard(data, "train")
    before = folder_hash(tmp_path)
    done = run_process("-m", "mvlm", "pretrain", "tiny", "--data", data, "--out", tmp_path / "run", *MICRO)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(r"mvlm: \S+/train-000000.tar: wanted a shard that .*\n", done.stderr)
    assert folder_hash(tmp_path) == before


def test_a_run_is_repeated_from_its_configuration_and_exported(mvlm, run_copy, tmp_path):
    """The same run elsewhere, with every setting of the file but those that are given."""
    outcome = mvlm("pretrain", f"--config={run_copy / 'config.json'}", "--out", tmp_path / "again")
    assert outcome.code == 0
    names = ("step", "loss", "mlm", "mim", "itc", "itm", "grad_norm", "lr")
    mine, theirs = (
        [[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path / "again", run_copy)
    )
    assert mine == theirs
    outcome = mvlm("export", tmp_path / "again", tmp_path / "portable")
    assert (outcome.code, outcome.out) == (0, [str(tmp_path / "portable")])
    assert load_model(tmp_path / "portable")[0].config.width == 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bacth_size": 4}, "unknown setting 'bacth_size'; did you mean batch_size?"),
        ({"format_version": 1}, "wanted a configuration of version 2 or 3, got version 1"),
    ],
)
def test_a_configuration_that_is_refused(mvlm, run_copy, tmp_path, change, message):
    file = run_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(mvlm("pretrain", "--config", file, "--out", tmp_path / "again"), message)
    assert not (tmp_path / "again").exists()
