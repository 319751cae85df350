"""A trained model behind open_clip's interface: `encode_image`, `encode_text`, a tokenizer, and a preprocess function.

    model, preprocess, tokenizer = create_clip_model("runs/demo")
    image = model.encode_image(preprocess(Image.open("cat.png"))[None])
    text = model.encode_text(tokenizer(["a cat", "a dog"]))

Code that is written for open_clip, such as CLIP_benchmark, runs with it. Embeddings are those of `TrainedModel`.

Shape legend: B batch, L tokens (the model's text length), E contrastive width, S image side.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from mvlm.device import autocast
from mvlm.errors import ConfigError
from mvlm.inference.encode import image_features
from mvlm.inference.images import load_image
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.fast import encode_tokens
from mvlm.runs.load import load_without_head
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.captions import clean_line


class ClipModel(nn.Module):
    """open_clip's interface of a trained model, for inference. Its precision is the trained model's, not autocast's."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.network, self.precision = trained.network, trained.precision
        self.pad_id = trained.tokenizer.pad_id
        self.image_size, self.context_length = trained.network.config.image_size, trained.network.config.text_length

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of 1 / temperature, a scalar without a gradient."""
        return self.network.log_scale[0].detach()

    def encode_image(self, image: Tensor, normalize: bool = True) -> Tensor:
        """Images uint8, or float in 0..1, (B, 3, S, S) -> embeddings float32 (B, E), of unit length in any case."""
        with torch.autocast(image.device.type, enabled=False):
            return image_features(self.network, image, self.precision).embedding

    @torch.no_grad()
    def encode_text(self, text: Tensor, normalize: bool = True) -> Tensor:
        """Ids int64 (B, L) of `ClipTokenizer` -> embeddings float32 (B, E), of unit length in any case.

        ConfigError for a row of padding alone.
        """
        exists = text != self.pad_id  # (B, L), True = a token
        lengths = exists.sum(1)
        if not len(text):
            return torch.zeros(0, self.network.config.itc_width, device=text.device)
        if not bool(lengths.all()):
            raise ConfigError("text: wanted tokens in each row, found a row of padding alone; leave it out")
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        with torch.autocast(text.device.type, enabled=False), autocast(text.device, self.precision):
            w = encode_tokens(self.network, text[exists], starts, int(lengths.max()))
            return self.network.embed_text(w.first())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings of images and of texts, (B, E) each, and 1 / temperature."""
        return self.encode_image(image), self.encode_text(text), self.logit_scale.exp()


class ClipTokenizer:
    """A tokenizer that gives all texts of a call in one tensor, padded to the model's text length."""

    def __init__(self, tokenizer: Tokenizer, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids int64 (B, context_length) of B texts, put on one line as captions are. Longer texts are truncated.

        ConfigError for a context_length that the model cannot take.
        """
        length = context_length or self.context_length
        if not 3 <= length <= self.context_length:
            raise ConfigError(f"context_length: wanted 3 to {self.context_length}, got {length}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = torch.full((len(texts), length), self.tokenizer.pad_id)
        for row, text in zip(ids, texts, strict=True):
            tokens = torch.from_numpy(self.tokenizer.encode([clean_line(text)], length)[0])
            row[: len(tokens)] = tokens
        return ids


class ClipParts(NamedTuple):
    """The three parts that code for open_clip asks for, in the order of `open_clip.create_model_from_pretrained`."""

    model: ClipModel
    preprocess: Callable[[Image.Image], Tensor]
    """Image -> pixels uint8 (3, S, S), as the loader of evaluation makes them. The network normalises them."""
    tokenizer: ClipTokenizer


def create_clip_model(
    source: Path | str | TrainedModel, device: torch.device | str = "auto", precision: str = "auto"
) -> ClipParts:
    """Load a trained model with open_clip's interface. The arguments and errors are those of `mvlm.load_model`."""
    trained = source if isinstance(source, TrainedModel) else load_without_head(source, device, precision)
    config = trained.network.config
    tokenizer = ClipTokenizer(trained.tokenizer, config.text_length)
    return ClipParts(ClipModel(trained).eval(), partial(load_image, side=config.image_size), tokenizer)
