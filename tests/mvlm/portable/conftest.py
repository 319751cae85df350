"""Fixtures of the tests of portable models: a small model as a folder, and its programs in both formats."""

from pathlib import Path

import pytest
import torch

from mvlm.model.pretrained import write_model
from mvlm.runs.load import load_model
from support.models import micro_model


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer) -> Path:
    """An exported folder of a model with one layer of each kind. Every weight is random, so every weight matters."""
    folder = tmp_path_factory.mktemp("small")
    layers = dict.fromkeys(("image_layers", "text_layers", "cross_layers", "decoder_layers"), 1)
    write_model(micro_model(dtype=torch.float32, cross_norm="pre", **layers), folder)
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def programs(tmp_path_factory, small) -> Path:
    """Folder with the exports `pt2` and `onnx` of the small model."""
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("programs")
    for format in ("pt2", "onnx"):
        load_model(small, "cpu").export(folder / format, format)
    return folder
