"""A micro model and the images that its page searches."""

import pytest
import torch

from mvlm.app.gallery import DatasetGallery
from mvlm.inference.trained_model import TrainedModel
from support.models import micro_model


@pytest.fixture(scope="session")
def model(tokenizer) -> TrainedModel:
    return TrainedModel(micro_model(dtype=torch.float32), tokenizer, "fp32")


@pytest.fixture(scope="session")
def gallery(model, heldout_split) -> DatasetGallery:
    return DatasetGallery(model, heldout_split, "scenes")
