"""Galleries of the app: where the images to search come from."""

import copy
from pathlib import Path

import pytest
import torch
from PIL import Image

from mvlm.app.answers import search
from mvlm.app.gallery import DatasetGallery, IndexGallery, data_of_run
from mvlm.errors import RunError
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import create_index
from mvlm.tasks.load import load_model
from mvlm_dataloading import open_dataset
from support.models import ALONE
from support.packages import needs
from support.scenes import png, scene


def test_a_run_knows_its_data_and_an_exported_folder_has_none(trained: Path, scenes: Path, tmp_path: Path) -> None:
    assert data_of_run(trained) == scenes
    assert data_of_run(next((trained / "checkpoints").glob("step_*"))) == scenes
    load_model(trained).save(tmp_path / "model")
    assert data_of_run(tmp_path / "model") is None


def test_answers_of_a_model_without_itm_are_those_of_itc(model: TrainedModel, heldout_split) -> None:
    """Its matching head has the bias that it was initialised with, zero."""
    untrained = TrainedModel(copy.deepcopy(model.network), model.tokenizer, "fp32")
    torch.nn.init.zeros_(untrained.network.matching_head.bias)
    similarity = untrained.similarity(heldout_split, "a red square")[:, 0]
    wanted = [heldout_split.image_bytes(i) for i in similarity.argsort(descending=True)]
    found = [one.image for one in DatasetGallery(untrained, heldout_split, "").search("a red square", None)]
    assert found == wanted
    reranked = [one.image for one in DatasetGallery(model, heldout_split, "").search("a red square", None)]
    assert reranked != wanted


@needs("lancedb")
def test_an_index_shows_images_of_urls_that_are_given(model, served, web, data_cache, tmp_path) -> None:
    embed(model, open_collection(web, ["train"]), tmp_path / "embedded", ALONE)
    index = create_index(tmp_path / "embedded", str(tmp_path / "index"))
    with pytest.raises(RunError, match="--source"):
        IndexGallery(model, index, "index").example()
    dataset = open_dataset(served, "train")
    images = {dataset.image_bytes(i) for i in range(len(dataset))}
    for text in ("a red square", None):  # re-ranked by ITM, or not
        found = IndexGallery(model, index, "index", [web]).search(text, None if text else Image.new("RGB", (32, 32)))
        assert found
        assert {each.image for each in found} <= images


@needs("lancedb")
def test_a_visitor_is_not_told_which_image_of_an_index_is_gone(model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # so that paths are short
    Path("pictures").mkdir()
    for number in range(3):
        Path(f"pictures/{number}.png").write_bytes(png(scene(number)[0]))
    embed(model, open_collection("pictures"), tmp_path / "embedded", ALONE)
    gallery = IndexGallery(model, create_index(tmp_path / "embedded", str(tmp_path / "index")), "index")
    assert len(search(gallery, "red", None)) == 3
    Path("pictures/1.png").unlink()
    with pytest.raises(RunError, match=r"^[^/]*changed[^/]*$"):
        search(gallery, "red", None)
