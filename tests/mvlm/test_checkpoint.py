# Arguments are unpacked from tables of cases, whose types pyright cannot follow.
# pyright: reportCallIssue=false
import contextlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvlm import checkpoint as checkpoints_module
from mvlm.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_model,
    load_training_state,
    load_weights,
    newest_good_checkpoint,
    remove_old_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from mvlm.errors import RunError
from mvlm.model import MaskVLM
from mvlm.train import make_optimizer

FILES = ("model.safetensors", "optimizer.safetensors", "model.json", "state.json", "tokenizer.json")


@pytest.fixture
def training(toys, tokenizer):
    """A model and its optimizer after two updates, and a function that makes one more."""
    model = toys.model(dtype=torch.float32)
    optimizer = make_optimizer(model, toys.pretrain_config(Path(), Path()), torch.device("cpu"))
    for _ in range(2):
        update(toys, model, optimizer)
    return model, optimizer


def update(toys, model: MaskVLM, optimizer: torch.optim.Optimizer) -> None:
    batch, masks = toys.batch()
    model(batch, masks).total.backward()
    optimizer.step()
    optimizer.zero_grad()


def equal(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def sign_again(folder: Path) -> None:
    """Make the manifest fit the files, as if they had been written like that."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = {name: checkpoints_module._sha256(folder / name) for name in FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_files_and_names(training, tokenizer, tmp_path):
    path = save_checkpoint(tmp_path, 1234, *training, {"loader": {"position": 3}}, tokenizer)
    assert path == tmp_path / "step_00001234"
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "manifest.json"])
    assert [file.name for file in tmp_path.iterdir()] == ["step_00001234"]  # nothing is left beside it
    assert json.loads((path / "state.json").read_text()) == {"step": 1234, "loader": {"position": 3}}
    verify_checkpoint(path)


def test_model_and_tokenizer_come_back(training, tokenizer, tmp_path):
    model, optimizer = training
    save_checkpoint(tmp_path / "checkpoints", 5, model, optimizer, {}, tokenizer)
    for folder in (tmp_path, tmp_path / "checkpoints/step_00000005"):
        found, words = load_model(folder)
        assert found.config == model.config
        assert equal(found, model)
        assert not found.training
        assert words.fingerprint == tokenizer.fingerprint


def test_training_goes_on_to_the_bit(toys, training, tokenizer, tmp_path):
    """Every moment of the optimizer comes back, so the next update is the same."""
    model, optimizer = training
    path = save_checkpoint(tmp_path, 2, model, optimizer, {"loader": {"position": 8}}, tokenizer)
    other = toys.model(seed=1, dtype=torch.float32)
    other_optimizer = make_optimizer(other, toys.pretrain_config(Path(), Path()), torch.device("cpu"))
    assert load_training_state(path, other, other_optimizer) == {"step": 2, "loader": {"position": 8}}
    assert equal(other, model)
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        mine, yours = optimizer.state[a], other_optimizer.state[b]
        assert set(mine) == set(yours) == {"step", "exp_avg", "exp_avg_sq"}, name
        assert all(torch.equal(mine[key], yours[key]) for key in mine), name
    for m, o in ((model, optimizer), (other, other_optimizer)):
        update(toys, m, o)
    assert equal(other, model)


def test_nothing_is_pickled(toys, training, tokenizer, tmp_path, monkeypatch):
    """Neither on the way out nor on the way in."""

    def refuse(*_, **__):
        raise AssertionError("a pickle was asked for")

    for module, names in ((pickle, ("dump", "dumps", "load", "loads")), (torch, ("save", "load"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    model, optimizer = training
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, tokenizer)
    load_model(path)
    load_training_state(path, model, optimizer)
    for file in path.iterdir():
        start = file.read_bytes()[:9]
        assert start[8:9] == b"{" if file.suffix == ".safetensors" else start[:1] == b"{", file
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


class Killed(BaseException):
    """What the process sees of a kill: nothing after it runs."""


# What a checkpoint is made by, in order: two files of tensors, two of JSON, the tokenizer and the manifest; these six
# and their folder forced to the disk; the rename; the folder above forced to the disk.
OPERATIONS = 2 + 2 + 1 + 1 + 7 + 1 + 1


@pytest.mark.parametrize("survived", range(OPERATIONS + 1))
def test_a_kill_leaves_no_half_checkpoint_to_be_seen(training, tokenizer, tmp_path, monkeypatch, survived):
    """A kill before each of them in turn: the earlier checkpoint stands, and saving again works."""
    model, optimizer = training
    first = save_checkpoint(tmp_path, 1, model, optimizer, {}, tokenizer)
    left = survived

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("save_file", "_write_json", "_sync"):
            patch.setattr(checkpoints_module, name, mortal(getattr(checkpoints_module, name)))
        patch.setattr(type(tokenizer), "save", mortal(type(tokenizer).save))
        patch.setattr(Path, "rename", mortal(Path.rename))
        with contextlib.nullcontext() if survived == OPERATIONS else pytest.raises(Killed):
            save_checkpoint(tmp_path, 2, model, optimizer, {}, tokenizer)
    assert left == 0
    renamed = survived >= OPERATIONS - 1
    second = tmp_path / "step_00000002"
    assert checkpoints(tmp_path) == ([first, second] if renamed else [first])
    assert newest_good_checkpoint(tmp_path) == (second if renamed else first)
    assert save_checkpoint(tmp_path, 2, model, optimizer, {}, tokenizer) == newest_good_checkpoint(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found_and_the_previous_checkpoint_used(run_copy, name, caplog):
    root = run_copy / "checkpoints"
    newest, older = root / "step_00000002", root / "step_00000001"
    assert newest_good_checkpoint(root) == newest
    flip_a_byte(newest / name)
    with pytest.raises(RunError, match=rf"step_00000002/{name}: damaged, its sha256 is not the manifest's"):
        find_checkpoint(newest)
    assert newest_good_checkpoint(root) == find_checkpoint(run_copy) == older
    warning = next(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert str(newest / name) in warning
    assert "looking for an older checkpoint" in warning
    model, _ = load_model(run_copy)
    wanted = load_file(older / "model.safetensors")
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def test_a_flipped_bit_in_the_manifest_is_found(run_copy):
    root = run_copy / "checkpoints"
    flip_a_byte(root / "step_00000002/manifest.json")
    with pytest.raises(RunError, match="step_00000002"):
        find_checkpoint(root / "step_00000002")
    assert newest_good_checkpoint(root) == root / "step_00000001"


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_found(run_copy, name):
    root = run_copy / "checkpoints"
    (root / "step_00000002" / name).unlink()
    with pytest.raises(RunError, match=rf"{name}: (missing|wanted a readable manifest)"):
        verify_checkpoint(root / "step_00000002")
    assert newest_good_checkpoint(root) == root / "step_00000001"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"sha256": 3}', '{"sha256": {}}'])
def test_a_manifest_that_says_nothing(run_copy, text):
    newest = run_copy / "checkpoints/step_00000002"
    (newest / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest.json: wanted a readable manifest|model.safetensors: missing"):
        verify_checkpoint(newest)
    assert newest_good_checkpoint(run_copy / "checkpoints") == run_copy / "checkpoints/step_00000001"


def test_no_checkpoint_at_all(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match="wanted a run or a checkpoint folder, found no good checkpoint there"):
            load_model(folder)


def test_another_architecture_is_refused_with_the_shapes(toys, training, tokenizer, tmp_path):
    model, optimizer = training
    path = save_checkpoint(tmp_path, 1, model, optimizer, {}, tokenizer)
    other = toys.model(seed=1, width=24, cross_layers=3, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(RunError) as caught:
        load_weights(other, path)
    message = str(caught.value)
    assert "\n" not in message
    assert f"{path}/model.safetensors: a checkpoint of another architecture: " in message
    assert " and " in message
    assert message.endswith(" more")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())

    # One tensor of another shape alone is named with both.
    tensors = load_file(path / "model.safetensors")
    tensors["matching_head.bias"] = torch.zeros(3)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(RunError, match=r"another architecture: matching_head.bias wanted \(2,\), got \(3,\)$"):
        load_weights(model, path)
    tensors["extra"] = tensors.pop("matching_head.bias")
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(RunError, match=r"another architecture: matching_head\.bias missing; extra unexpected$"):
        load_weights(model, path)


def test_files_that_fit_the_manifest_and_are_no_checkpoint(run_copy):
    folder = run_copy / "checkpoints/step_00000002"
    original = shutil.copytree(folder, run_copy / "kept")

    def restore(name: str, text: str) -> None:
        for file in FILES:
            shutil.copy(original / file, folder / file)
        (folder / name).write_text(text)
        sign_again(folder)

    restore("model.safetensors", "not tensors")
    with pytest.raises(RunError, match=r"model\.safetensors: not readable as safetensors"):
        load_model(folder)
    config = json.loads((original / "model.json").read_text())
    restore("model.json", json.dumps(config | {"widht": 3}))
    with pytest.raises(RunError, match=r"model.json: unknown model setting 'widht'; did you mean width\?"):
        load_model(folder)
    restore("model.json", json.dumps(config | {"heads": 3}))
    with pytest.raises(RunError, match="heads must divide width"):
        load_model(folder)
    for text in ("{", "[]", "3", "[1]", '"text"'):
        restore("model.json", text)
        with pytest.raises(RunError, match="step_00000002: "):
            load_model(folder)
    restore("tokenizer.json", "{}")
    with pytest.raises(RunError, match=r"tokenizer\.json: wanted a tokenizer\.json"):
        load_model(folder)


def test_the_newest_are_kept(training, tokenizer, tmp_path):
    for step in (1, 2, 10, 3):
        save_checkpoint(tmp_path, step, *training, {}, tokenizer)
    (tmp_path / "step_00000011.tmp").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == [f"step_{step:08d}" for step in (1, 2, 3, 10)]
    remove_old_checkpoints(tmp_path, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000003", "step_00000010"]
    remove_old_checkpoints(tmp_path, 5)
    assert len(checkpoints(tmp_path)) == 2


def test_a_folder_that_cannot_be_removed_is_warned_about(training, tokenizer, tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, *training, {}, tokenizer)
    remove = shutil.rmtree

    def stubborn(path, *args, **kwargs):
        if path.name.endswith("1"):
            raise OSError("busy")
        return remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", stubborn)
    remove_old_checkpoints(tmp_path, 1)
    assert "could not remove the old checkpoint" in caplog.text
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]
