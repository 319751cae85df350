"""Paths given to commands: missing data, runs and devices, wrong kinds, other architectures."""

import json
import re
from pathlib import Path

import pytest
import torch

from mvlm.runs.checkpoint import sha256
from support.commands import MICRO_FLAGS, assert_refused
from support.folders import folder_hash
from support.scenes import made_up_run, png, scene


@pytest.mark.slow
def test_a_missing_data_folder_is_refused(run_mvlm, tmp_path, trained):
    assert_refused(
        run_mvlm("pretrain", "tiny", "--data", tmp_path / "none", "--out", tmp_path / "run", *MICRO_FLAGS),
        f"{tmp_path / 'none'}: wanted a data folder, found none; `mvlm data` writes one",
    )
    assert_refused(
        run_mvlm("eval", "retrieval", "--checkpoint", trained, "--data", tmp_path / "none"),
        "wanted a data folder, found",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_device_is_refused(run_mvlm, scenes, trained, tmp_path):
    words = ("--data", scenes, "--device", "cuda")
    assert_refused(
        run_mvlm("pretrain", "tiny", "--out", tmp_path / "run", *MICRO_FLAGS, *words),
        "device: wanted cuda, but torch finds no",
    )
    assert_refused(
        run_mvlm("eval", "retrieval", "--checkpoint", trained, *words), "device: wanted cuda, but torch finds no"
    )
    words = ("--checkpoint", trained, "--data", scenes, "--device", "gpu")
    assert_refused(run_mvlm("eval", "retrieval", *words), "device: wanted auto, cpu or cuda, got 'gpu'")
    assert not list(tmp_path.iterdir())


def another_architecture(run: Path) -> None:
    """Give the checkpoints of a run another model.json, with a manifest that fits."""
    for folder in (run / "checkpoints").iterdir():
        config = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(config | {"width": 24}))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["model.json"] = sha256(folder / "model.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["eval retrieval", "reconstruct", "fill", "report"])
def test_a_checkpoint_of_another_architecture_is_refused(run_mvlm, scenes, run_copy, tmp_path, command):
    another_architecture(run_copy)
    (run_copy / "eval").mkdir()
    (run_copy / "eval/test.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    image = ("--checkpoint", run_copy, "--image", tmp_path / "a.png", "--caption", "red [MASK]")
    words = {
        "eval retrieval": ("--checkpoint", run_copy, "--data", scenes, "--out", tmp_path / "test.json"),
        "reconstruct": (*image, "--out", tmp_path / "b.png"),
        "fill": image,
        "report": (run_copy,),
    }[command]
    before = folder_hash(tmp_path)
    assert_refused(
        run_mvlm(*command.split(), *words),
        "model.json",
        "24",
    )
    assert folder_hash(tmp_path) == before


@pytest.mark.parametrize("command", ["eval retrieval", "reconstruct", "fill"])
def test_a_missing_checkpoint_is_refused(run_mvlm, scenes, tmp_path, command):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = {
        "eval retrieval": ("--data", scenes),
        "reconstruct": ("--image", tmp_path / "a.png", "--caption", "red", "--out", tmp_path / "b.png"),
        "fill": ("--image", tmp_path / "a.png", "--caption", "red [MASK]"),
    }[command]
    outcome = run_mvlm(*command.split(), "--checkpoint", tmp_path / "none", *words)
    assert_refused(
        outcome, "none: wanted a run, a checkpoint or an exported folder, found no such folder; check the path"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_path_that_is_not_a_run_is_refused_by_what_is_there(run_mvlm, trained, tmp_path):
    """Nothing, a file, an empty folder: for every command that takes a run."""
    missing, file, empty, out = (tmp_path / name for name in ("missing", "file", "empty", "out"))
    file.write_text("a file")
    empty.mkdir()
    wanted = "wanted a run, a checkpoint or an exported folder, found"
    assert_refused(run_mvlm("export", missing, out), f"{missing}: {wanted} no such folder; check the path")
    assert_refused(run_mvlm("export", file, out), f"{file}: {wanted} a file; check the path")
    assert_refused(
        run_mvlm("export", empty, out),
        f"{empty}: {wanted} no finished checkpoint (checkpoints/step_*), no manifest.json",
    )
    for words in ((), (trained,)):
        assert_refused(
            run_mvlm("report", missing, *words), f"{missing}: wanted a run folder, found no such folder; check the path"
        )
        assert_refused(run_mvlm("report", file, *words), f"{file}: wanted a run folder, found a file; check the path")
    assert_refused(
        run_mvlm("report", empty), f"{empty}/config.json: wanted the configuration of a run, found no such file"
    )
    assert_refused(
        run_mvlm("report", empty, trained), f"{empty}/metrics.jsonl: wanted the metrics of a run, found none"
    )
    outcome = run_mvlm("pretrain", "--config", missing, "--out", out)
    assert_refused(outcome, f"{missing}: wanted the configuration of a run, found no such file; check the path")
    outcome = run_mvlm("pretrain", "--config", empty, "--out", out)
    assert_refused(outcome, f"{empty}: wanted the configuration of a run, found a folder; name a config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


@pytest.mark.parametrize("command", ["pretrain", "export", "report", "eval retrieval"])
def test_an_output_below_a_file_is_refused(run_mvlm, scenes, trained, tmp_path, command):
    """A file where a folder would have to be."""
    (tmp_path / "file").write_text("a file")
    out = tmp_path / "file/x/y"
    words = {
        "pretrain": ("tiny", "--data", scenes, "--out", out, *MICRO_FLAGS),
        "export": (trained, out),
        "report": (made_up_run(tmp_path / "a"), made_up_run(tmp_path / "b"), "--out", out),
        "eval retrieval": ("--checkpoint", trained, "--data", scenes, "--out", out),
    }[command]
    outcome = run_mvlm(*command.split(), *words)
    assert outcome.code == 2
    message = r"could not be read or written \(Not a directory\); check the path and its permissions"
    assert re.fullmatch(
        rf"mvlm: {tmp_path}/file(/x|/x/y|/x/y\.parts|/x/\.y\.[0-9a-f]+\.partial): {message}", outcome.err[-1]
    )
    assert (tmp_path / "file").read_text() == "a file"
