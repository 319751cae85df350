"""Findings of `mvlm doctor`, on this machine and on shards and disks that are broken on purpose."""

import errno
import json
import re

import pytest
import torch

import mvlm_kernels
from mvlm.commands import machine_check
from mvlm.commands.machine_check import Finding
from mvlm.training import run as training
from support.models import pretrain_config
from support.scenes import write_scenes
from support.web_server import serve


def examine(data, out) -> dict[str, Finding]:
    run = None if data is None else pretrain_config(data, out, max_steps=36000, batch_size=8)
    return {finding.name: finding for finding in machine_check.examine("tiny", run, out, torch.device("cpu"))}


@pytest.mark.slow
def test_doctor_finds_a_working_machine_green_or_amber(scenes, tmp_path):
    found = examine(scenes, tmp_path / "not/there/yet")
    assert {finding.state for finding in found.values()} <= {"green", "amber"}
    figures = re.match(r"loader alone (\d+) pairs/s, model alone (\d+) .* about ([\d.]+) h", found["speed"].text)
    assert figures is not None
    loader, model, hours = map(float, figures.groups())
    assert hours == pytest.approx(36000 * 8 / min(loader, model) / 3600, rel=0.05, abs=0.06)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_doctor_needs_no_validation_split(run_mvlm, tmp_path, monkeypatch):
    """Training needs it only for evaluations. Without `train` the shards are red."""
    model = pretrain_config(tmp_path, tmp_path).model
    monkeypatch.setattr("mvlm.config.model.MaskVLMConfig.preset", lambda _: model)
    data = write_scenes(tmp_path / "data", {"train": 16})
    done = run_mvlm("doctor", "--data", data, "--out", tmp_path, "--device", "cpu", "--batch-size", 8)
    found = {line.split()[1]: line for line in done.out}
    assert done.code == 0
    assert found["shards"].startswith("green")
    assert "speed" in found
    assert "16 pairs: mvlm pretrain tiny" in found["recipe"]
    done = run_mvlm("doctor", "--data", write_scenes(tmp_path / "other", {"test": 4}), "--out", tmp_path)
    assert done.code == 1
    assert done.out[-1].startswith("red    shards")


def test_every_fused_op_has_a_row():
    """`contrastive_terms` is computed within the loss."""
    helpers = {"explain", "explain_model", "use_backend", "pack_key_mask", "contrastive_terms"}
    rows = {finding.name for finding in machine_check.kernels(torch.device("cpu")) if finding.state == "green"}
    assert rows == {name for name in mvlm_kernels.__all__ if name.islower()} - helpers


def test_doctor_suggests_a_preset_by_the_number_of_pairs():
    """29,300 steps of 4,096 pairs pass 5 million 24 times."""
    found = machine_check.recipe(5_000_000)
    assert found.state == "green"
    assert "mvlm pretrain clip-3m, 29,300 steps of 4,096 pairs, 24 epochs" in found.text


LEARNING = [
    ({}, 1000, None),
    ({"initial_model": "run", "lr_encoder": 1e-4, "lr_cross": 1e-3}, 10**6, "green"),
    ({"initial_model": "run", "lr_encoder": 1e-4, "lr_cross": 1e-3}, 1000, "--train-image full with 1,000 pairs"),
    ({"initial_model": "run", "lr_encoder": 1e-4, "lr_text": 1e-3, "lr_cross": 1e-3}, 10**6, "--lr-text 0.001, not"),
    ({"initial_model": "run", "train_image": "frozen", "train_text": "lora"}, 1000, "green"),
    ({"text_tower": "bert", "train_text": "frozen"}, 1000, "green"),
    ({"image_weights": "vit", "lr_encoder": 1e-4, "lr_cross": 1e-3, "optimizer": "muon"}, 10**6, "--optimizer muon"),
]


@pytest.mark.parametrize("changes, pairs, wanted", LEARNING)
def test_doctor_warns_of_pretrained_encoders_that_learn_too_fast(tmp_path, changes, pairs, wanted):
    found = machine_check.learning(pretrain_config(tmp_path, tmp_path, **changes), pairs)
    assert (found is None) == (wanted is None)
    assert found is None or (found.state == "green") == (wanted == "green")
    assert found is None or wanted in found.state + found.text


@pytest.mark.slow
def test_doctor_tries_the_run_of_a_file(trained, tmp_path, run_mvlm):
    values = json.loads((trained / "config.json").read_text()) | {"initial_model": str(trained)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    done = run_mvlm("doctor", "--config", tmp_path / "config.json", "--out", tmp_path, "--device", "cpu")
    assert done.code == 0
    assert [line.split()[0] for line in done.out if " learning " in line] == ["amber"]
    assert done.out[-1].split()[1] == "speed"


def test_doctor_fetches_the_first_shard_of_remote_data(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("MVLM_CACHE", str(tmp_path / "cache"))
    with serve(scenes) as url:
        found = machine_check.shards(url)
    assert found.state == "green"


def test_doctor_finds_damaged_shards_red(tmp_path):
    data = write_scenes(tmp_path / "data", {"train": 9, "validation": 2})
    tar = next(data.glob("train-*.tar"))
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    (data / "train.index").touch()
    found = examine(data, tmp_path)
    assert found["shards"].state == "red"
    assert f"{tar}: damaged" in found["shards"].text
    assert "speed" not in found


def test_doctor_finds_a_place_where_no_run_can_be_written_red(tmp_path, monkeypatch):
    """A file in place of a folder, and a full disk."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        assert machine_check.disk(out).state == "red"
    assert machine_check.disk(tmp_path / "new/run").state != "red"
    monkeypatch.setattr(machine_check.tempfile, "TemporaryFile", lack(OSError(errno.ENOSPC, "No space left on device")))
    assert machine_check.disk(tmp_path / "new").state == "red"


def lack(error: BaseException):
    def ask(*_: object, **__: object) -> None:
        raise error

    return ask


@pytest.mark.parametrize(
    "place, error", [(training.Trainer, torch.OutOfMemoryError("CUDA")), (training, MemoryError())]
)
def test_doctor_finds_a_trial_without_memory_red(scenes, tmp_path, monkeypatch, place, error):
    """In the step and in the loader."""
    monkeypatch.setattr(place, "forward_backward" if place is training.Trainer else "make_loader", lack(error))
    found = examine(scenes, tmp_path)
    assert found["memory"].state == "red"
    assert "speed" not in found
