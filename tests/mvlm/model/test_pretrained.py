"""from_pretrained and save_pretrained: folders, ids on the hub, no pickle, and no unwanted use of the network."""

import socket
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch

from mvlm.errors import RunError
from mvlm.model import pretrained
from mvlm.model.maskvlm import MaskVLM
from support.models import micro_batch, micro_model


@pytest.fixture
def no_network(monkeypatch):
    """A request to the hub fails the test."""
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))


def same_weights(one: MaskVLM, other: MaskVLM) -> bool:
    names = one.state_dict()
    return names.keys() == other.state_dict().keys() and all(
        torch.equal(t, other.state_dict()[n]) for n, t in names.items()
    )


def test_a_saved_model_loads_from_its_folder(tmp_path, no_network):
    model = micro_model(1, dtype=torch.float32, image_mask_ratio=0.25)
    model.save_pretrained(tmp_path / "saved")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "saved").iterdir()}
    assert not list(tmp_path.rglob("*.bin"))
    found = MaskVLM.from_pretrained(tmp_path / "saved")
    assert same_weights(found, model)
    assert found.config == model.config
    assert found.training is False
    batch, masks = micro_batch(config=model.config)
    assert torch.equal(found(batch, masks).total, model(batch, masks).total)


def test_an_id_loads_from_the_hub(tmp_path, monkeypatch):
    micro_model(1, dtype=torch.float32).save_pretrained(tmp_path / "cache")
    asked = []

    def download(repo, name, **options):
        asked.append((repo, name, options["revision"], options["local_files_only"]))
        return str(tmp_path / "cache" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    found = MaskVLM.from_pretrained("someone/maskvlm", revision="v1", local_files_only=True)
    assert same_weights(found, micro_model(1, dtype=torch.float32))
    assert asked == [("someone/maskvlm", name, "v1", True) for name in ("config.json", "model.safetensors")]


def test_a_hub_that_is_not_there_is_an_error_at_once(no_hub, caplog):
    began = time.monotonic()
    with pytest.raises(RunError, match=r"^a/b: .*ConnectError"):
        MaskVLM.from_pretrained("a/b")
    assert time.monotonic() - began < 5
    assert not caplog.records


def test_a_hub_that_does_not_answer_is_an_error_after_a_while(monkeypatch, no_hub):
    monkeypatch.setattr(pretrained, "ANSWER_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(RunError, match=r"^a/b: .*Timeout"):
            MaskVLM.from_pretrained("a/b")


def test_cached_files_are_read_where_no_hub_is_there(tmp_path, monkeypatch, no_hub):
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--a--b/snapshots" / ("0" * 40)
    micro_model(1, dtype=torch.float32).save_pretrained(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("0" * 40)
    assert same_weights(MaskVLM.from_pretrained("a/b"), micro_model(1, dtype=torch.float32))


@pytest.mark.parametrize("name", ["none", "./a/b", "/a/b", "a/b/c", "a/b/", "../b", "a b/c", ""])
def test_neither_a_folder_nor_an_id_is_refused(tmp_path, monkeypatch, no_network, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError):
        MaskVLM.from_pretrained(name)


def test_folders_load_and_save_without_huggingface_hub(tmp_path, monkeypatch):
    """The hub needs the package, and the error says so."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    micro_model(1, dtype=torch.float32).save_pretrained(tmp_path / "saved")
    assert MaskVLM.from_pretrained(tmp_path / "saved").config == micro_model().config
    with pytest.raises(ValueError, match="huggingface_hub"):
        MaskVLM.from_pretrained("a/b")
