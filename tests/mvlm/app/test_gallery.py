"""Galleries of the app: where the images to search come from."""

import copy
from pathlib import Path

import torch

from mvlm.app.gallery import DatasetGallery, data_of_run
from mvlm.inference.trained_model import TrainedModel
from mvlm.tasks.load import load_model


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
