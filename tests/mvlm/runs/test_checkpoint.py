"""Format of a checkpoint: written, verified, read back, and refused when damaged."""

# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportCallIssue=false
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm.errors import RunError
from mvlm.model.maskvlm import MaskVLM
from mvlm.runs.checkpoint import (
    checkpoints,
    load_optimizer,
    newest_good_checkpoint,
    optimizer_tensors,
    read_state,
    read_tensors,
    set_generators,
    verify_checkpoint,
)
from mvlm.runs.checkpoint_writer import CheckpointWriter
from mvlm.runs.folder import find_checkpoint
from mvlm.runs.load import load_without_head
from mvlm.training.optimizer import make_optimizer
from mvlm_dataloading.files import sha256
from support.folders import forbid
from support.forgery import sign
from support.models import ALONE, micro_batch, micro_model, pretrain_config

SHARD = "shard-00001-model-00001-of-00001.safetensors"
FILES = (
    f"model/{SHARD}",
    f"optimizer/{SHARD}",
    "generators/rank_00000.safetensors",
    "model.json",
    "state.json",
    "tokenizer.json",
)


@pytest.fixture
def training():
    """A model and its optimizer after two updates."""
    model = micro_model(dtype=torch.float32)
    optimizer = make_optimizer(model, pretrain_config(Path(), Path()), torch.device("cpu"))
    for _ in range(2):
        update(model, optimizer)
    return model, optimizer


def update(model: MaskVLM, optimizer: torch.optim.Optimizer) -> None:
    batch, masks = micro_batch()
    model(batch, masks).total.backward()
    optimizer.step()
    optimizer.zero_grad()


def save(root: Path, step: int, training, tokenizer, state: dict[str, Any] | None = None, **more: Any) -> Path:
    """Write a checkpoint, with further parts, and wait for it."""
    model, optimizer = training
    writer = CheckpointWriter(root, ALONE, keep=100)
    parts = {"model": model.state_dict(), "optimizer": optimizer_tensors(model, optimizer), **more}
    writer.save(step, model, parts, state or {}, tokenizer)
    writer.wait()
    path = root / f"step_{step:08d}"
    assert writer.newest == path
    return path


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_checkpoint_has_the_documented_files(training, tokenizer, tmp_path):
    path = save(tmp_path, 1234, training, tokenizer, {"loader": {"position": 3}})
    assert path == tmp_path / "step_00001234"
    files = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())
    assert files == sorted([*FILES, "manifest.json"])
    assert [file.name for file in tmp_path.iterdir()] == ["step_00001234"]  # no temporary folder is left
    assert read_state(path) == {"step": 1234, "loader": {"position": 3}}
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format_version"], manifest["world_size"]) == (2, 1)
    assert sorted(manifest["sha256"]) == sorted(FILES)
    verify_checkpoint(path)
    for file in path.rglob("*.*"):  # no pickle
        start = file.read_bytes()[:9]
        assert start[8:9] == b"{" if file.suffix == ".safetensors" else start[:1] == b"{", file


def test_load_model_and_export_take_the_averaged_weights(training, tokenizer, tmp_path):
    average = {name: torch.full_like(p, 0.25) for name, p in training[0].named_parameters()}
    save(tmp_path / "checkpoints", 1, training, tokenizer, ema=average)
    assert all((p == 0.25).all() for p in load_without_head(tmp_path).network.parameters())
    load_without_head(tmp_path, "cpu").save(tmp_path / "out")
    assert all((t == 0.25).all() for t in load_file(tmp_path / "out/model.safetensors").values())


def test_optimizer_state_is_restored_to_the_bit(training, tokenizer, tmp_path):
    """All moments are restored, so the next update is the same. A parameter without moments has none afterwards."""
    model, optimizer = training
    del optimizer.state[model.log_scale]
    path = save(tmp_path, 2, training, tokenizer)
    other = micro_model(seed=1, dtype=torch.float32)
    other_optimizer = make_optimizer(other, pretrain_config(Path(), Path()), torch.device("cpu"))
    read_tensors(path / "model", other.state_dict())
    load_optimizer(path / "optimizer", other, other_optimizer)
    assert equal(other, model)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, yours = optimizer.state[a], other_optimizer.state[b]
        assert set(mine) == set(yours) == (set() if name == "log_scale" else {"step", "exp_avg", "exp_avg_sq"}), name
        assert all(torch.equal(mine[key], yours[key]) for key in mine), name
    for m, o in ((model, optimizer), (other, other_optimizer)):
        update(m, o)
    assert equal(other, model)


class Trap:
    """An object that makes a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("trapped",))


def write_a_pickle(file: Path) -> None:
    file.write_bytes(pickle.dumps(Trap()))


FOREIGN = ("model/.metadata", "model/extra.safetensors", "optimizer.pt", "model/__0_0.distcp")
DAMAGES = [
    (damage, name) for damage in (flip_a_byte, Path.unlink, write_a_pickle) for name in (*FILES, "manifest.json")
]


def test_generators_go_on_where_the_checkpoint_was_saved(training, tokenizer, tmp_path):
    """Torch's generators matter to a user's own task, whose dropout draws from them."""
    path = save(tmp_path, 1, training, tokenizer)
    wanted = torch.rand(3)
    torch.manual_seed(99)
    set_generators(path, 0, torch.device("cpu"))
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize("damage, name", [*DAMAGES, *((write_a_pickle, name) for name in FOREIGN)])
def test_damage_is_found_and_the_previous_checkpoint_is_used(run_copy, tmp_path, monkeypatch, damage, name, caplog):
    """A flipped bit, a missing file, a file that is none of the checkpoint's. No pickle is loaded."""
    monkeypatch.chdir(tmp_path)
    root = run_copy / "checkpoints"
    newest, older = root / "step_00000002", root / "step_00000001"
    assert newest_good_checkpoint(root) == newest
    damage(newest / name)
    for call in (verify_checkpoint, find_checkpoint, load_without_head):
        with pytest.raises(RunError, match="step_00000002" + ("" if name == "manifest.json" else f"/{name}")):
            call(newest)
    assert newest_good_checkpoint(root) == find_checkpoint(run_copy) == older
    assert str(newest) in caplog.text
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", FILES)
def test_pickle_in_the_place_of_a_file_is_never_loaded(run_copy, tmp_path, monkeypatch, name):
    """Even if the manifest has its hash."""
    monkeypatch.chdir(tmp_path)
    newest = run_copy / "checkpoints/step_00000002"
    (newest / name).write_bytes(pickle.dumps(Trap()))
    sign(newest)
    reads = {"model": load_without_head, "tokenizer.json": load_without_head, "model.json": load_without_head}
    if name.split("/")[0] in reads:
        with pytest.raises(RunError, match="step_00000002"):
            load_without_head(newest)
    else:
        with pytest.raises(RunError):
            read_state(newest) if name == "state.json" else read_tensors((newest / name).parent, {})
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_state_that_is_no_object_is_refused(run_copy, content):
    newest = run_copy / "checkpoints/step_00000002"
    (newest / "state.json").write_text(content)
    with pytest.raises(RunError, match=r"state\.json: wanted the state of a run, found"):
        read_state(newest)


def test_checkpoint_with_an_unreadable_file_is_damaged(run_copy, monkeypatch):
    """Reading /proc/self/mem from its beginning is an input/output error, like a bad sector."""
    root = run_copy / "checkpoints"
    file = root / "step_00000002" / "model" / SHARD
    file.unlink()
    file.symlink_to("/proc/self/mem")
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    with pytest.raises(RunError, match=rf"{SHARD}: cannot be read \(Input/output error\); use another checkpoint"):
        find_checkpoint(root / "step_00000002")
    assert find_checkpoint(run_copy) == root / "step_00000001"


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "manifest.json"])
def test_a_checkpoint_that_may_not_be_read_is_not_damaged(run_copy, monkeypatch, name):
    """Else a resumed run would go on from an older one, and rename this one."""
    forbid(monkeypatch, name)
    with pytest.raises(PermissionError, match=f"step_00000002.*{name}"):
        newest_good_checkpoint(run_copy / "checkpoints")


MANIFESTS: list[Any] = [
    *((text, "readable manifest") for text in ("", "{}", "[]", '{"format_version": 2, "sha256": 3}')),
    pytest.param("[" * 100_000, "readable manifest", id="deep"),
    ('{"format_version": 2, "sha256": {}}', "model.json"),
    ('{"format_version": 1, "sha256": {}}', "version"),
    ({"format_version": None}, "format_version"),
    *(({"world_size": value}, "world_size") for value in (-1, 0, "x", 1.5, True, None)),
    *(({name: ""}, "files of this folder") for name in ("../outside", "/etc/passwd", "model/../../outside")),
    ({"": ""}, "sha256"),
]
"""Texts of a manifest, or values of one that are changed: its own, or hashes by a path."""


@pytest.mark.parametrize("change, word", MANIFESTS)
def test_a_manifest_with_odd_values_or_of_another_version_is_refused(run_copy, change, word):
    newest = run_copy / "checkpoints/step_00000002"
    file = newest / "manifest.json"
    if isinstance(change, str):
        file.write_text(change)
    else:
        manifest = json.loads(file.read_text())
        if not change.keys() <= manifest.keys():  # a path that leaves the folder, with the right hash
            (run_copy / "checkpoints/outside").write_bytes(b"")
            hashes = {name: sha256(newest / name) if name else "0" * 64 for name in change}
            change = {"sha256": manifest["sha256"] | hashes}
        manifest |= change
        file.write_text(json.dumps(manifest))
    for read in (verify_checkpoint, load_without_head):
        with pytest.raises(RunError, match=re.escape(word) or "manifest"):
            read(newest)
    assert newest_good_checkpoint(run_copy / "checkpoints") == run_copy / "checkpoints/step_00000001"


def test_load_model_refuses_a_run_whose_checkpoints_are_all_damaged(run_copy):
    for name in ("step_00000001", "step_00000002"):
        (run_copy / "checkpoints" / name / "state.json").write_text("{}")
    with pytest.raises(RunError, match="wanted a good checkpoint, found 2 damaged, as listed above; use another run"):
        load_without_head(run_copy)


def test_tensors_of_another_architecture_are_refused_with_their_shapes(training, tokenizer, tmp_path):
    model, _ = training
    path = save(tmp_path, 1, training, tokenizer)
    other = micro_model(seed=1, width=24, cross_layers=3, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RunError, match=f"^{path}/model: "):
        read_tensors(path / "model", other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    # A single tensor of another shape is named with both shapes.
    file = path / "model" / SHARD
    tensors = load_file(file)
    tensors["matching_head.bias"] = torch.zeros(3)
    save_file(tensors, file)
    with pytest.raises(RunError, match=r"matching_head.bias wanted \(2,\), got \(3,\)"):
        read_tensors(path / "model", model.state_dict())
    tensors["extra"] = tensors.pop("matching_head.bias")
    save_file(tensors, file)
    with pytest.raises(RunError, match=r"matching_head\.bias missing; extra unexpected"):
        read_tensors(path / "model", model.state_dict())


def test_checkpoints_are_listed_in_order_of_their_steps(tmp_path):
    """In numerical order, without copies under other names."""
    steps = ["step_00000002", "step_00000010", "step_99999999", "step_100000000"]
    copies = ["step_00000011.tmp", "step_00000011.damaged1", "step_00000010.mine", "step_00000010_backup", "step_3"]
    for name in (*reversed(steps), *copies, "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000012").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == steps
