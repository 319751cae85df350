"""Table of calls with wrong arguments: each is one line with the argument's name, what was wanted and what was got."""
# pyright: reportArgumentType=false

import io
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mvlm import load_model
from mvlm.errors import ConfigError, RunError
from mvlm.inference.trained_model import TrainedModel
from support.models import micro_model
from support.scenes import png, scene

PIXELS = scene(3)[0]
IMAGE = png(PIXELS)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def model(tokenizer) -> TrainedModel:
    return TrainedModel(micro_model(seed=1, dtype=torch.float32), tokenizer, "fp32")


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch warn that such tensors will go
        return torch.quantize_per_tensor(CHW, 1 / 255, 0, torch.quint8)


CALLS: list[tuple[str, Callable[[TrainedModel], Any], type[ValueError], str]] = [
    ("a number as an array", lambda m: m.embed_images(np.array(5)), RunError, r"image 0: .*, got \(\)"),
    ("a number as a tensor", lambda m: m.embed_images(torch.tensor(5)), RunError, r"image 0: .*, got \(\)"),
    ("a sparse tensor", lambda m: m.embed_images(CHW.to_sparse()), RunError, "image 0: .*sparse"),
    ("a batch of sparse tensors", lambda m: m.embed_images(CHW[None].to_sparse()), RunError, "image 0: .*sparse"),
    ("a tensor without memory", lambda m: m.embed_images(CHW.to("meta")), RunError, "image 0: .*meta"),
    ("a quantized tensor", lambda m: m.embed_images(quantized()), RunError, "image 0: .*quantized"),
    ("no image", lambda m: m.embed_images(None), RunError, "images: .*, got None"),
    ("a dictionary", lambda m: m.embed_images({"a.png": 1}), RunError, "images: .*, got a dict"),
    ("an open file", lambda m: m.embed_images(io.BytesIO(IMAGE)), RunError, "images: .*, got an open file; read it"),
    ("an open text file", lambda m: m.embed_images(io.StringIO("a.png")), RunError, "images: .*, got an open file"),
    ("a list of numbers", lambda m: m.embed_images([5]), RunError, "image 0: .*, got 5"),
    ("a file in a list", lambda m: m.embed_images([io.BytesIO(IMAGE)]), RunError, "image 0: .*, got a BytesIO"),
    ("a text as batch", lambda m: m.embed_images(IMAGE, batch_size="a"), ConfigError, "batch_size: .*, got 'a'"),
    ("half a batch", lambda m: m.embed_images(IMAGE, batch_size=1.5), ConfigError, "batch_size: .*, got 1.5"),
    ("no batch", lambda m: m.embed_images(IMAGE, batch_size=0), ConfigError, "batch_size: .*, got 0"),
    ("a text as batch of texts", lambda m: m.embed_texts("a", batch_size="a"), ConfigError, "batch_size: .*, got 'a'"),
    ("half a batch of texts", lambda m: m.embed_texts("a", batch_size=1.5), ConfigError, "batch_size: .*, got 1.5"),
    ("half a batch of pairs", lambda m: m.match(IMAGE, "a", batch_size=1.5), ConfigError, "batch_size: .*, got 1.5"),
    ("bytes as texts", lambda m: m.embed_texts(b"a"), ConfigError, "texts: .*, got b'a'"),
    ("a dictionary as texts", lambda m: m.embed_texts({"a": 1}), ConfigError, "texts: .*, got a dict"),
    ("a list to fill", lambda m: m.fill(["a [MASK]"], IMAGE), ConfigError, "caption: .*, got a list"),
    ("bytes to fill", lambda m: m.fill(b"a [MASK]", IMAGE), ConfigError, r"caption: .*, got b'a \[MASK\]'"),
    ("a number to fill", lambda m: m.fill(5, IMAGE), ConfigError, "caption: .*, got 5"),
    ("a text as top", lambda m: m.fill("a [MASK]", IMAGE, top="x"), ConfigError, "top: .*, got 'x'"),
    ("half a guess", lambda m: m.fill("a [MASK]", IMAGE, top=1.5), ConfigError, "top: .*, got 1.5"),
    ("half a step", lambda m: m.fill("a [MASK]", IMAGE, steps=1.5), ConfigError, "steps: .*, got 1.5"),
    ("no guess", lambda m: m.fill("a [MASK]", IMAGE, top=0), ConfigError, "top: .*, got 0"),
    ("no labels", lambda m: m.classify(IMAGE, None), ConfigError, "labels: .*, got None"),
    ("numbers as labels", lambda m: m.classify(IMAGE, [1, 2]), ConfigError, "labels: .*, got 1 as number 0"),
    ("a number as template", lambda m: m.classify(IMAGE, ["a", "b"], [5]), ConfigError, "templates: .*, got 5 as"),
    ("half a step of patches", lambda m: m.reconstruct(IMAGE, "a", steps=1.5), ConfigError, "steps: .*, got 1.5"),
    ("a text as seed", lambda m: m.reconstruct(IMAGE, "a", seed="a"), ConfigError, "seed: .*, got 'a'"),
    ("attention of a list", lambda m: m.attention(IMAGE, ["a"]), ConfigError, "text: .*, got a list"),
    ("no path", lambda m: load_model(None), ConfigError, "path: .*, got None"),
    ("a number as path", lambda m: load_model(3), ConfigError, "path: .*, got 3"),
    ("bytes as path", lambda m: load_model(b"x"), ConfigError, "path: .*, got b'x'"),
]  # fmt: skip


@pytest.mark.parametrize("name, call, error, message", CALLS, ids=[case[0] for case in CALLS])
def test_a_wrong_argument_is_one_line_with_its_name(
    model: TrainedModel, name: str, call: Callable[[TrainedModel], Any], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}") as refused:
        call(model)
    assert "\n" not in str(refused.value)


def test_bytes_in_other_forms_are_an_encoded_image(model: TrainedModel) -> None:
    wanted = model.embed_images(IMAGE)
    for image in (bytearray(IMAGE), memoryview(IMAGE), [bytearray(IMAGE)]):
        assert torch.equal(model.embed_images(image), wanted)


def test_whole_numbers_of_numpy_and_torch_are_taken(model: TrainedModel) -> None:
    wanted = model.embed_images([IMAGE] * 3)
    assert torch.equal(model.embed_images([IMAGE] * 3, batch_size=np.int64(3)), wanted)
    assert model.fill("a [MASK]", IMAGE, top=np.int32(2)) == model.fill("a [MASK]", IMAGE, top=2)


def test_a_path_is_named_in_an_error_of_many_images(model: TrainedModel, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"gone\.png: wanted an image, found no such file"):
        model.embed_images([IMAGE, tmp_path / "gone.png"])


@pytest.mark.parametrize("text", ["[MASK]" * 10_000, "[MASK] " * 100_000, "a" * 10**7 + "[MASK]"])
def test_a_caption_that_is_far_too_long_is_refused_before_it_is_tokenized(model: TrainedModel, text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError, match="caption: wanted at most"):
        model.fill(text, IMAGE)
    assert time.process_time() - begin < 0.5
