"""Uploads to the hub, by its own client, to a stand-in on this machine."""

import json
import shutil

import pytest

from mvlm.errors import ConfigError, RunError
from mvlm.inference.trained_model import TrainedModel
from mvlm.portable.hub import upload
from mvlm.runs.load import load_model
from support.hub import serve_model_hub

# The client itself passes a file in a way that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.slow
def test_an_upload_is_one_commit_of_the_folder_and_loads_again(trained, tmp_path):
    with serve_model_hub() as hub:
        load_model(trained, "cpu").export(tmp_path / "out", "hub", hub_id="someone/demo")
        assert hub.asked == []
        address = upload(tmp_path / "out", "someone/demo", private=True)
    assert address == f"{hub.endpoint}/someone/demo"
    assert hub.private == {"someone/demo": True}
    assert len(hub.commits) == 1
    received = hub.repositories["someone/demo"]
    assert set(received) == FILES
    assert received == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    (tmp_path / "received").mkdir()
    for name, content in received.items():
        (tmp_path / "received" / name).write_bytes(content)
    assert load_model(tmp_path / "received", "cpu").sha256 == load_model(trained, "cpu").sha256
    assert 'mvlm.load_model("someone/demo")' in received["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("fail_at", ["repos/create", "preupload", "lfs/objects", "commit/main"])
def test_a_refusal_is_one_line_and_leaves_the_hub_unchanged(trained, tmp_path, fail_at):
    load_model(trained, "cpu").export(tmp_path / "out", "hub", hub_id="someone/demo")
    with serve_model_hub() as hub:
        hub.fail_at = fail_at
        with pytest.raises(RunError, match=r"someone/demo: wanted to upload .*, the hub did not take it") as caught:
            upload(tmp_path / "out", "someone/demo")
    assert "\n" not in str(caught.value)
    assert f"`hf upload someone/demo {tmp_path / 'out'}`" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert hub.repositories.get("someone/demo", {}) == {}
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
