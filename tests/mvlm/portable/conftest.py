"""Fixtures of the tests of portable models: a small model as a folder, and its programs in both formats."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch

from mvlm.model.pretrained import write_model
from mvlm.tasks.load import load_model
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
def programs(made_once, small) -> Callable[[Literal["pt2", "onnx"]], Path]:
    """The folder of the small model's export in a format, `pt2` or `onnx`."""

    def of(format: Literal["pt2", "onnx"]) -> Path:
        if format == "onnx":
            pytest.importorskip("onnxruntime")
        return made_once(f"programs-{format}", lambda out: load_model(small, "cpu").export(out, format))

    return of
