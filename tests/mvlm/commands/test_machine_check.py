"""Findings of `mvlm doctor`, on this machine and on shards and disks that are broken on purpose."""

import errno
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mvlm_kernels
from mvlm import cli
from mvlm.commands import machine_check
from mvlm.commands.machine_check import Finding
from mvlm.config.pretrain import PretrainConfig
from mvlm.errors import ConfigError
from mvlm.tasks import cost
from mvlm_dataloading.errors import MissingPackageError
from mvlm_kernels.dispatch import ON_CPU
from support.models import pretrain_config
from support.scenes import write_scenes
from support.web_server import serve


@pytest.fixture
def micro_preset(monkeypatch):
    """The micro model instead of a preset."""
    monkeypatch.setattr(PretrainConfig, "preset", lambda preset, data, out: pretrain_config(data, out, max_steps=36000))


def examine(data, out, **changes) -> dict[str, Finding]:
    settings = {"preset": "tiny", "data": data, "out": out, "batch_size": 8, "device": "cpu"} | changes
    return {finding.name: finding for finding in machine_check.examine(**settings)}


@pytest.mark.slow
def test_doctor_finds_a_working_machine_green_or_amber(micro_preset, scenes, tmp_path):
    found = examine(scenes, tmp_path / "not/there/yet")
    assert {finding.state for finding in found.values()} <= {"green", "amber"}
    assert "torch 2." in found["packages"].text
    assert "DALI 2." in found["packages"].text
    assert found["cross_attention"].text == f"torch: {ON_CPU}"
    assert found["linear_pixel_loss"].text == f"torch: {ON_CPU}"
    assert found["image attention"].text.startswith(("math (not triton: the ten", "sdpa (not triton: the ten"))
    assert "not flash-attn: the tensors are on cpu, not on a GPU" in found["text attention"].text
    assert found["shards"].text.startswith("32 train, 8 validation pairs")
    assert re.search(r"MB of it weights and moments \(.* at 8 pairs$", found["memory"].text)
    figures = re.match(r"loader alone (\d+) pairs/s, model alone (\d+) .* about ([\d.]+) h", found["speed"].text)
    assert figures is not None
    loader, model, hours = map(float, figures.groups())
    assert ("the loader is the limit" in found["speed"].text) == (loader < model)
    assert hours == pytest.approx(36000 * 8 / min(loader, model) / 3600, rel=0.05, abs=0.06)
    assert not list(tmp_path.iterdir())


def test_doctor_names_the_backend_of_every_fused_op():
    ops = {name for name in mvlm_kernels.__all__ if name.islower()} - {
        "attention_probabilities", "explain", "pack_key_mask", "use_backend"
    }  # fmt: skip
    found = list(machine_check.kernels(torch.device("cpu")))
    assert {finding.name for finding in found} == ops
    assert {finding.text for finding in found} == {f"torch: {ON_CPU}"}


def test_doctor_without_shards_tries_no_speed(tmp_path):
    found = examine(None, tmp_path)
    assert found["shards"].state == "amber"
    assert "speed" not in found


@pytest.mark.slow
def test_doctor_needs_no_validation_split(micro_preset, tmp_path):
    """Training needs it only for evaluations. Without `train` the shards are red."""
    found = examine(write_scenes(tmp_path / "data", {"train": 16}), tmp_path)
    assert found["shards"] == Finding(
        "green", "shards", "16 train pairs; the first shard's sha256 is that of dataset.json"
    )
    assert "speed" in found
    found = machine_check.shards(write_scenes(tmp_path / "other", {"test": 4}))
    assert found.state == "red"
    assert "wanted the split train, found test" in found.text


def test_doctor_fetches_the_first_shard_of_remote_data(scenes, tmp_path, monkeypatch):
    monkeypatch.setenv("MVLM_CACHE", str(tmp_path / "cache"))
    with serve(scenes) as url:
        found = machine_check.shards(url)
    assert found == Finding(
        "green", "shards", "32 train, 8 validation pairs; the first shard's sha256 is that of dataset.json"
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["--image-size", "64"], "wanted --checkpoint and --image-size with --task alone"),
        (["--checkpoint", "runs/x"], "wanted --checkpoint and --image-size with --task alone"),
        (["--batch-size", "8"], "wanted --batch-size with --data alone"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        cli.run_command(["doctor", *words])


def test_doctor_finds_damaged_shards_red(micro_preset, tmp_path):
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


def test_doctor_finds_a_missing_package_red(monkeypatch):
    version = machine_check.package_version
    monkeypatch.setattr(machine_check, "package_version", lambda name: None if "dali" in name else version(name))
    finding = machine_check.versions()
    assert finding.state == "red"
    assert finding.text == "DALI not installed: pip install 'mvlm[data,train]'"


def test_doctor_finds_an_unwritable_folder_red(tmp_path, monkeypatch):
    def fail(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine_check.tempfile, "TemporaryFile", fail)
    finding = machine_check.disk(tmp_path / "new")
    assert finding.state == "red"
    assert finding.text == f"{tmp_path}: cannot be written to: [Errno 28] No space left on device"


def test_doctor_finds_a_folder_that_may_not_be_searched_red(tmp_path, monkeypatch):
    """Root may search every folder, so the system's answer is made up."""
    out = tmp_path / "locked/runs"
    exists = Path.exists

    def refuse(path):
        if path == out:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return exists(path)

    monkeypatch.setattr(Path, "exists", refuse)
    finding = machine_check.disk(out)
    assert (finding.state, finding.text) == (
        "red", f"{out}: cannot be written to: [Errno 13] Permission denied: '{out}'"
    )  # fmt: skip


@pytest.mark.parametrize("states, code", [(("green", "amber"), 0), (("green", "red", "amber"), 1)])
def test_exit_code_of_doctor(monkeypatch, capsys, states, code):
    monkeypatch.setattr(machine_check, "examine", lambda *_: (Finding(state, "name", "text") for state in states))
    if code:
        with pytest.raises(SystemExit) as caught:
            cli.run_command(["doctor"])
        assert caught.value.code == code
    else:
        cli.run_command(["doctor"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(states)


def test_doctor_finds_a_file_in_the_place_of_a_folder_red(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file/run"):
        found = machine_check.disk(out)
        assert (found.state, found.text) == ("red", f"{tmp_path}/file: wanted a folder for runs, found a file")
    assert machine_check.disk(tmp_path / "new/run").state != "red"


@pytest.mark.slow
def test_doctor_takes_no_empty_batch_and_goes_on_without_a_package(micro_preset, scenes, tmp_path, monkeypatch):
    assert examine(scenes, tmp_path, batch_size=0)["trial"].text == "batch_size must be at least 1, got 0"

    def without(*_):
        raise MissingPackageError("tokenizers is needed here and is not installed: pip install 'mvlm[data]'")

    monkeypatch.setattr(machine_check, "choose_tokenizer", without)
    assert examine(scenes, tmp_path)["trial"].state == "red"


def too_much():
    torch.empty(2**50)


def lack_of_room():
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def lack_on_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    "place, ask", [("autocast", too_much), ("autocast", lack_on_gpu), ("make_loader", lack_of_room)]
)
def test_doctor_finds_a_batch_that_has_no_room_red(micro_preset, scenes, tmp_path, monkeypatch, place, ask):
    """In the step on a CPU and on a GPU, and in the loader."""
    monkeypatch.setattr(machine_check, place, lambda *_: ask())
    found = examine(scenes, tmp_path)
    assert found["memory"] == Finding("red", "memory", "a batch of 8 does not fit; lower --batch-size")
    assert "speed" not in found


def test_doctor_finds_a_batch_of_finetuning_that_has_no_room_red(micro_preset, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "try_steps", lambda *_: too_much())
    found = examine(scenes, tmp_path, batch_size=None, finetuning=SimpleNamespace(batch_size=24))
    assert found["memory"] == Finding("red", "memory", "a batch of 24 does not fit; lower --batch-size")


def test_doctor_does_not_take_another_error_for_a_lack_of_memory(micro_preset, scenes, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(machine_check, "make_loader", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        examine(scenes, tmp_path)
