"""from_pretrained and save_pretrained: folders, ids on the hub, no pickle, and no unwanted use of the network."""

import sys

import huggingface_hub
import pytest
import torch

from mvlm.errors import RunError
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


def test_a_hub_that_does_not_answer_is_an_error_with_its_reason(monkeypatch):
    def download(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(RunError, match=r"^a/b: .*OSError: no route to host"):
        MaskVLM.from_pretrained("a/b")


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
