"""Uploads to the hub."""

import json
import shutil
from unittest.mock import create_autospec

import huggingface_hub
import pytest

from mvlm.errors import ConfigError, RunError
from mvlm.inference.trained_model import TrainedModel
from mvlm.portable.hub import upload
from mvlm.tasks.load import load_model

FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture
def api(monkeypatch):
    """The hub's client, whose calls are checked against its signatures and sent nowhere."""
    made = create_autospec(huggingface_hub.HfApi, instance=True)
    made.create_commit.return_value.repo_url = "https://hub/someone/demo"
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


def test_an_upload_is_one_commit_of_the_folder_and_loads_again(trained, tmp_path, api):
    load_model(trained, "cpu").export(tmp_path / "out", "hub", hub_id="someone/demo")
    assert not api.mock_calls
    assert upload(tmp_path / "out", "someone/demo", private=True) == "https://hub/someone/demo"
    api.create_repo.assert_called_once_with("someone/demo", private=True, exist_ok=True)
    api.create_commit.assert_called_once()
    name, additions = api.create_commit.call_args.args
    (tmp_path / "received").mkdir()
    for addition in additions:
        shutil.copy(addition.path_or_fileobj, tmp_path / "received" / addition.path_in_repo)
    assert name == "someone/demo"
    assert {path.name for path in (tmp_path / "received").iterdir()} == FILES
    assert load_model(tmp_path / "received", "cpu").sha256 == load_model(trained, "cpu").sha256
    assert 'mvlm.load_model("someone/demo")' in (tmp_path / "received/README.md").read_text()


@pytest.mark.parametrize("call", ["create_repo", "create_commit"])
def test_a_refusal_is_one_line_and_leaves_the_folder(trained, tmp_path, api, call):
    load_model(trained, "cpu").export(tmp_path / "out", "hub", hub_id="someone/demo")
    getattr(api, call).side_effect = OSError("403 Forbidden:\nyou may not write here")
    with pytest.raises(RunError, match=r"someone/demo: .*403 Forbidden: you may not write here") as caught:
        upload(tmp_path / "out", "someone/demo")
    assert f"`hf upload someone/demo {tmp_path / 'out'}`" in str(caught.value)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES  # the folder that the line speaks of


def test_mistakes_are_refused_before_anything_is_written(trained, tmp_path):
    out, model = tmp_path / "out", load_model(trained, "cpu")
    for wrong in ("demo", "a/b/c", "../x", "https://hub/x"):
        with pytest.raises(ConfigError, match="push-to: wanted an id OWNER/NAME on the hub, got"):
            model.export(out, "hub", hub_id=wrong)
    with pytest.raises(RunError, match="wanted a run or one of its checkpoints"):
        TrainedModel(model.network, model.tokenizer).export(out, "hub")
    model.export(tmp_path / "written", "hub")
    (tmp_path / "written/README.md").unlink()
    with pytest.raises(RunError, match=r"found no README.md in it"):
        upload(tmp_path / "written", "a/b")
    with pytest.raises(RunError, match="written: wanted a run or one of its checkpoints, found another folder"):
        load_model(tmp_path / "written", "cpu").export(out, "hub")
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"data": str(tmp_path / "gone")}))
    with pytest.raises(
        RunError, match=r"gone: wanted the data that the run was trained on.*name its folder with --data"
    ):
        load_model(run, "cpu").export(out, "hub")
    assert not out.exists()
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]
