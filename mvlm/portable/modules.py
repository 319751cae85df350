"""A trained network in three modules with plain tensors as inputs and outputs, for runtimes without mvlm.

They compute what `mvlm.model.plain` computes, with torch's own operators once exported. Texts are padded.

Shape legend: B batch, N patches, L tokens of the longest text, C width, E contrastive width, S image side.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.model.attention import Attention, Branch
from mvlm.model.network import MaskVLMNetwork


class ImageEmbedder(nn.Module):
    """The image encoder and its contrastive projection."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.encoder, self.projection = network.image_encoder, network.image_projection

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels uint8 (B, 3, S, S) -> embedding (B, E) of unit length, features (B, 1+N, C)."""
        features = self.encoder(pixels)
        return F.normalize(self.projection(features[:, 0]), dim=-1), features


class TextEmbedder(nn.Module):
    """The text encoder and its contrastive projection."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.encoder, self.projection = network.text_encoder, network.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """input_ids int64 (B, L), [CLS] first; attention_mask int64 (B, L), 1 = a token, 0 = padding.

        Returns embedding (B, E) of unit length, features (B, L, C). Features of padding have no meaning.
        """
        exists = attention_mask != 0
        position = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)

        def attend(attention: Attention, rows: Tensor) -> Branch:
            return attention(rows, rows, exists)

        features = self.encoder.run(input_ids, position, attend)
        return F.normalize(self.projection(features[:, 0]), dim=-1), features


class Matcher(nn.Module):
    """The cross-modality encoders and the matching head."""

    def __init__(self, network: MaskVLMNetwork) -> None:
        super().__init__()
        self.image_cross, self.text_cross, self.head = network.image_cross, network.text_cross, network.matching_head

    def forward(self, image_features: Tensor, text_features: Tensor, attention_mask: Tensor) -> Tensor:
        """image_features (B, 1+N, C), text_features (B, L, C), attention_mask int64 (B, L), as the embedders give them.

        Returns ITM's log-odds (B,) that image b and text b belong together.
        """
        exists = attention_mask != 0
        image = self.image_cross(image_features, text_features, None, exists, first_row_only=True)[:, 0]  # (B, C)
        text = self.text_cross(text_features, image_features, exists, None, first_row_only=True)[:, 0]
        logits = self.head(image * text)
        return logits[:, 1] - logits[:, 0]


class Part(NamedTuple):
    """One of the three modules, with all that its export needs."""

    name: str
    """Name of its file, without a suffix."""
    module: nn.Module
    inputs: dict[str, tuple[str, ...]]
    """Names of the inputs, with the names of their axes that vary: "batch", "length"; "" for the others."""
    outputs: dict[str, tuple[str, ...]]
    """The same for outputs."""


def parts(network: MaskVLMNetwork) -> list[Part]:
    """The three modules of a network."""
    image, text = ("batch", "", ""), ("batch", "length", "")
    ids = ("batch", "length")
    return [
        Part(
            "image_encoder",
            ImageEmbedder(network),
            {"pixels": ("batch", "", "", "")},
            {"image_embedding": ("batch", ""), "image_features": image},
        ),
        Part(
            "text_encoder",
            TextEmbedder(network),
            {"input_ids": ids, "attention_mask": ids},
            {"text_embedding": ("batch", ""), "text_features": text},
        ),
        Part(
            "matching_head",
            Matcher(network),
            {"image_features": image, "text_features": text, "attention_mask": ids},
            {"log_odds": ("batch",)},
        ),
    ]


def example_inputs(network: MaskVLMNetwork, batch: int, length: int, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Random inputs of each module by name, on the CPU: texts of 3 to `length` tokens, the first of `length`.

    The features of the matching head are those that the encoders compute for the other inputs.
    """
    config, generator = network.config, torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (batch, 3, config.image_size, config.image_size), generator=generator)
    lengths = torch.randint(3, length + 1, (batch,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator) * mask
    found: dict[str, dict[str, Tensor]] = {
        "image_encoder": {"pixels": pixels.to(torch.uint8)},
        "text_encoder": {"input_ids": ids, "attention_mask": mask},
    }
    with torch.no_grad():
        image: Any = ImageEmbedder(network)(**found["image_encoder"])
        text: Any = TextEmbedder(network)(**found["text_encoder"])
    found["matching_head"] = {"image_features": image[1], "text_features": text[1], "attention_mask": mask}
    return found
