"""Trained models loaded from every kind of place."""

import logging
import shutil
from pathlib import Path

import huggingface_hub
import pytest

import mvlm
from mvlm.errors import RunError
from mvlm.model import pretrained
from mvlm.runs import checkpoint
from mvlm.runs.load import load_without_head, read_architecture_of
from mvlm_dataloading.files import sha256


@pytest.mark.slow
def test_a_run_a_checkpoint_a_folder_and_its_file_are_one_model(trained, portable):
    newest = trained / "checkpoints/step_00000002"
    hashes = {
        load_without_head(path, "cpu").sha256 for path in (trained, newest, portable, portable / "model.safetensors")
    }
    assert len(hashes) == 1
    assert load_without_head(trained / "checkpoints/step_00000001", "cpu").sha256 not in hashes


def test_a_model_without_itm_is_known_by_its_head(trained, portable, without_itm, tmp_path, caplog):
    """Wherever it was saved: a run and an exported folder warn that a match means nothing."""
    assert load_without_head(trained, "cpu").network.matching_is_trained
    assert load_without_head(portable, "cpu").network.matching_is_trained
    assert "trained without ITM" not in caplog.text
    load_without_head(without_itm, "cpu").save(tmp_path / "folder")
    for place in (without_itm, tmp_path / "folder"):
        caplog.clear()
        assert not load_without_head(place, "cpu").network.matching_is_trained
        assert f"{place}: trained without ITM, so its matches and re-rankings mean nothing" in caplog.text


def test_the_files_of_a_checkpoint_are_hashed_once(trained, monkeypatch):
    hashed = []
    monkeypatch.setattr(checkpoint, "sha256", lambda file: hashed.append(file) or sha256(file))
    mvlm.load_model(trained, "cpu")
    assert len(hashed) == len(set(hashed)) > 3


def test_an_unfinished_run_says_how_far_it_is(trained, run_copy, caplog):
    load_without_head(trained, "cpu")
    shutil.rmtree(run_copy / "checkpoints/step_00000002")
    load_without_head(run_copy / "checkpoints/step_00000001", "cpu")
    load_without_head(run_copy, "cpu")
    (run_copy / "config.json").write_text("{")  # not needed for a model
    load_without_head(run_copy, "cpu")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"{run_copy}: the run has not finished; this is its step 1 of 2"]


def test_a_tokenizer_is_loaded_without_the_weights(trained, portable, tmp_path):
    wanted = load_without_head(trained, "cpu").tokenizer.fingerprint
    assert read_architecture_of(trained)[1].fingerprint == wanted
    shutil.copytree(portable, tmp_path / "copy")
    (tmp_path / "copy/model.safetensors").write_bytes(b"")  # not read
    assert read_architecture_of(tmp_path / "copy")[1].fingerprint == wanted
    (tmp_path / "copy/tokenizer.json").write_text("{}")
    with pytest.raises(RunError, match=r"copy/tokenizer\.json: wanted a tokenizer"):
        read_architecture_of(tmp_path / "copy")
    with pytest.raises(RunError, match="no: wanted a run, a checkpoint or an exported folder"):
        read_architecture_of(tmp_path / "no")


def test_a_model_saved_without_a_tokenizer_is_loaded_once_it_has_one(trained, tmp_path):
    loaded = load_without_head(trained, "cpu")
    network, tokenizer = loaded.network, loaded.tokenizer
    network.save_pretrained(tmp_path / "own")
    advice = r'own: wanted a tokenizer.json .*, found none; .*: `tokenizer.save\(folder / "tokenizer.json"\)`'
    for load in (load_without_head, read_architecture_of):
        with pytest.raises(RunError, match=advice):
            load(tmp_path / "own")
    tokenizer.save(tmp_path / "own/tokenizer.json")
    assert load_without_head(tmp_path / "own", "cpu").sha256 == load_without_head(trained, "cpu").sha256


def test_an_id_of_the_hub_is_downloaded_with_its_tokenizer(portable, monkeypatch, tmp_path):
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name))
        return str(portable / name)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(pretrained, "ask_hub", lambda: None)
    assert load_without_head("owner/name", "cpu").sha256 == load_without_head(portable, "cpu").sha256
    assert asked == [("owner/name", name) for name in ("config.json", "model.safetensors", "tokenizer.json")]
    shutil.copytree(portable, tmp_path / "owner/name")  # a folder here comes first
    load_without_head("owner/name", "cpu")
    with pytest.raises(RunError, match="a/b: wanted a run, a checkpoint or an exported folder, found no such folder"):
        load_without_head(Path("a/b"), "cpu")  # a path is never an id
    assert len(asked) == 3


def test_a_mistyped_run_is_not_looked_for_on_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    (tmp_path / "runs/demo").mkdir(parents=True)
    with pytest.raises(RunError, match="runs/dmeo: wanted a run, a checkpoint or an exported folder, found no such f"):
        load_without_head("runs/dmeo", "cpu")


def test_other_places_are_refused(portable, tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    with pytest.raises(RunError, match=r"weights.bin: wanted a run, a checkpoint or an exported folder, found a file"):
        load_without_head(tmp_path / "weights.bin")
    alone = tmp_path / "model.safetensors"
    shutil.copy(portable / "model.safetensors", alone)
    with pytest.raises(
        RunError, match=f"{tmp_path}: wanted a run, a checkpoint or an exported folder, found no finish"
    ):
        load_without_head(alone)
