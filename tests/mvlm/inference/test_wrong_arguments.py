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
from support.scenes import png, scene

PIXELS = scene(3)[0]
IMAGE = png(PIXELS)
CHW = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch warn that such tensors will go
        return torch.quantize_per_tensor(CHW, 1 / 255, 0, torch.quint8)


LONG = "red " * 40
CALLS: list[tuple[str, type[ValueError], Callable[[TrainedModel], Any]]] = [
    ("image 0", RunError, lambda m: m.embed_images(np.array(5))),
    ("image 0", RunError, lambda m: m.embed_images(torch.tensor(5))),
    ("image 0", RunError, lambda m: m.embed_images([PIXELS.astype(int)])),
    ("image 0", RunError, lambda m: m.embed_images([PIXELS * 1.0])),
    ("image 0", RunError, lambda m: m.embed_images([PIXELS[..., :2]])),
    ("image 0", RunError, lambda m: m.embed_images(torch.zeros(4, 4, 3))),
    ("image 0: .*sparse", RunError, lambda m: m.embed_images(CHW.to_sparse())),
    ("image 0: .*sparse", RunError, lambda m: m.embed_images(CHW[None].to_sparse())),
    ("image 0: .*meta", RunError, lambda m: m.embed_images(CHW.to("meta"))),
    ("image 0: .*quantized", RunError, lambda m: m.embed_images(quantized())),
    ("images", RunError, lambda m: m.embed_images(None)),
    ("images", RunError, lambda m: m.embed_images({"a.png": 1})),
    ("images", RunError, lambda m: m.embed_images(io.BytesIO(IMAGE))),
    ("images", RunError, lambda m: m.embed_images(io.StringIO("a.png"))),
    ("image 0", RunError, lambda m: m.embed_images([5])),
    ("image 0", RunError, lambda m: m.embed_images([io.BytesIO(IMAGE)])),
    ("image 1", RunError, lambda m: m.embed_images([IMAGE, b"<svg/>"])),
    ("none.png", RunError, lambda m: m.embed_images("none.png")),
    ("none.png", RunError, lambda m: m.embed_images([IMAGE, Path("none.png")])),
    *(("batch_size", ConfigError, lambda m, n=n: m.embed_images(IMAGE, batch_size=n)) for n in ("a", 1.5, 0, True)),
    *(("batch_size", ConfigError, lambda m, n=n: m.embed_texts("a", batch_size=n)) for n in ("a", 1.5, 0, -1)),
    ("batch_size", ConfigError, lambda m: m.match(IMAGE, "a", batch_size=1.5)),
    ("texts", ConfigError, lambda m: m.embed_texts(b"a")),
    ("texts", ConfigError, lambda m: m.embed_texts({"a": 1})),
    ("texts", ConfigError, lambda m: m.embed_texts(7)),
    ("text 0", ConfigError, lambda m: m.embed_texts([None])),
    ("text 0", ConfigError, lambda m: m.embed_texts("a" * 10**7)),
    ("text 1", ConfigError, lambda m: m.embed_texts(["red", LONG])),
    ("text 1", ConfigError, lambda m: m.embed_texts(["red", " "])),
    ("text 1: .*Unicode", ConfigError, lambda m: m.embed_texts(["red", "caf\udce9"])),
    ("text 0", ConfigError, lambda m: m.match(IMAGE, LONG)),
    ("text 0", ConfigError, lambda m: m.rerank(LONG, [IMAGE])),
    ("text 0", ConfigError, lambda m: m.reconstruct(IMAGE, LONG)),
    ("text 0", ConfigError, lambda m: m.attention(IMAGE, LONG)),
    ("text 0", ConfigError, lambda m: m.attention(IMAGE, ["a"])),
    *(("caption", ConfigError, lambda m, x=x: m.fill(x, IMAGE)) for x in (["a [MASK]"], b"a [MASK]", 5, "red")),
    ("caption: .*Unicode", ConfigError, lambda m: m.fill("caf\udce9 [MASK]", IMAGE)),
    ("caption: .*tokens", ConfigError, lambda m: m.fill("a [MASK] red square on a green ground and a blue", IMAGE)),
    *(("top", ConfigError, lambda m, n=n: m.fill("a [MASK]", IMAGE, top=n)) for n in ("x", 1.5, 0, 10**6)),
    *(("steps", ConfigError, lambda m, n=n: m.fill("a [MASK]", IMAGE, steps=n)) for n in (1.5, 0)),
    *(("steps", ConfigError, lambda m, n=n: m.reconstruct(IMAGE, "a", steps=n)) for n in (1.5, 0)),
    ("seed", ConfigError, lambda m: m.reconstruct(IMAGE, "a", seed="a")),
    ("hide", ConfigError, lambda m: m.reconstruct(IMAGE, "red", np.zeros((4, 4), bool))),
    ("hide", ConfigError, lambda m: m.reconstruct(IMAGE, "red", np.ones(4, bool))),
    ("hide", ConfigError, lambda m: m.reconstruct(IMAGE, "red", np.ones((4, 4)))),
    *(("labels", ConfigError, lambda m, x=x: m.classify(IMAGE, x)) for x in (None, [1, 2], ["red"], ["a", "a"])),
    *(("templates", ConfigError, lambda m, x=x: m.classify(IMAGE, ["a", "b"], x)) for x in ([5], ["no"], [])),
    ("precision", ConfigError, lambda m: TrainedModel(m.network, m.tokenizer, "fp8")),
    *(("path", ConfigError, lambda m, x=x: load_model(x)) for x in (None, 3, b"x")),
]  # fmt: skip


@pytest.mark.parametrize("name, error, call", CALLS)
def test_a_wrong_argument_is_one_line_with_its_name(
    model: TrainedModel, name: str, error: type[ValueError], call: Callable[[TrainedModel], Any]
) -> None:
    with pytest.raises(error, match=f"^{name}") as refused:
        call(model)
    assert "\n" not in str(refused.value)


def test_whole_numbers_of_numpy_and_torch_are_taken(model: TrainedModel) -> None:
    wanted = model.embed_images([IMAGE] * 3)
    assert torch.equal(model.embed_images([IMAGE] * 3, batch_size=np.int64(3)), wanted)
    assert model.fill("a [MASK]", IMAGE, top=np.int32(2)) == model.fill("a [MASK]", IMAGE, top=2)


@pytest.mark.parametrize("text", ["[MASK]" * 10_000, "[MASK] " * 100_000, "a" * 10**7 + "[MASK]"])
def test_a_caption_that_is_far_too_long_is_refused_before_it_is_tokenized(model: TrainedModel, text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ConfigError, match="caption: wanted at most"):
        model.fill(text, IMAGE)
    assert time.process_time() - begin < 0.5
