"""Maps of the patches that each word of a text attends to, and of their effect on what a model says about both; drawn.

Text attends to the image in every cross-attention layer of the text's cross-modality encoder. The weights are the
softmax of its scores. GradCAM weights them by their effect on a score of the pair (Selvaraju et al. 2017), as ITM's
log-odds (Li et al. 2021 show it for ALBEF's matching head) or the logit of a task's label:

    gradcam[layer, word, patch] = mean over heads of weight x max(0, d score / d weight)

The heads' outputs are weights times values, so the derivative by a weight is the product of the derivative by the
output with the value. It needs no second softmax.

Shape legend: B pairs, L tokens, M keys (1 + patches), C width, H heads, D head width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from mvlm.inference.images import ImageLike, load_image
from mvlm.model.encoders import CrossEncoder
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Tokenizer

COLOURS = np.array([(48, 18, 59), (70, 107, 227), (40, 187, 236), (49, 242, 153), (162, 252, 60), (237, 208, 58),
                    (251, 128, 34), (208, 48, 5), (122, 4, 3)], np.float32)  # fmt: skip
"""Colours of low to high weight, evenly spaced on matplotlib's `turbo`."""
LABEL = 18  # pixels below a panel


class AttentionMaps(NamedTuple):
    """Weights of words over patches. Tensors are float32, on the CPU."""

    words: list[str]
    """"[CLS]", which stands for the whole text, and the words of the text."""
    weights: Tensor
    """(layers, heads, words, rows, columns). The rest of a word's weight is on the image's [CLS]."""
    gradcam: Tensor
    """(layers, words, rows, columns), not negative. In the last layer only [CLS] has an effect on ITM."""
    log_odds: float
    """ITM's log-odds that image and text belong together."""

    @property
    def maps(self) -> Tensor:
        """Weights, mean over layers and heads: (words, rows, columns)."""
        return self.weights.mean((0, 1))

    @property
    def relevance(self) -> Tensor:
        """GradCAM of the last layer in which words have an effect, the last but one: (words, rows, columns)."""
        return self.gradcam[max(0, len(self.gradcam) - 2)]


class CrossAttention:
    """Attention of a text to its image in one block, as `recorded_attention` saw it."""

    q: Tensor
    """(B, H, L, D), queries of the text."""
    k: Tensor
    """(B, H, M, D), keys of the image."""
    values: Tensor
    """(B, H, M, D), values of the image."""
    output: Tensor
    """(B, L, C), outputs of all heads, in the autograd graph of the scores."""

    @property
    def weights(self) -> Tensor:
        """Softmax weights (B, H, L, M) of each token over the image's [CLS] and patches, detached from autograd."""
        return (self.q @ self.k.mT * self.q.shape[-1] ** -0.5).softmax(-1)

    def gradcam(self, gradient: Tensor | None) -> Tensor:
        """GradCAM (B, L, M), not negative.

        gradient: derivative (B, L, C) of a score by `output`; None if the score does not depend on it: then zeros.
        """
        weights = self.weights
        if gradient is None:
            return torch.zeros_like(weights[:, 0])
        effect = gradient.unflatten(-1, (self.q.shape[1], -1)).transpose(1, 2) @ self.values.mT  # (B, H, L, M)
        return (weights * effect.clamp(min=0)).mean(1)


@contextmanager
def recorded_attention(encoder: CrossEncoder) -> Iterator[list[CrossAttention]]:
    """Context that yields a list, to which each block's cross-attention is added as the encoder's forward runs."""
    blocks = [block.cross_attention for block in encoder.layers]
    layers = [CrossAttention() for _ in blocks]
    for attention, layer in zip(blocks, layers, strict=True):

        def attend(
            q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, attention=attention, layer=layer
        ) -> Tensor:
            output = type(attention).attend_heads(attention, q, k, v, key_mask)
            # There is a graph even if no parameter wants gradients.
            layer.output = output if output.requires_grad else output.requires_grad_()
            layer.q, layer.k, layer.values = (
                x.detach().unflatten(-1, (attention.heads, -1)).transpose(1, 2) for x in (q, k, v)
            )
            return layer.output

        attention.attend_heads = attend
    try:
        yield layers
    finally:
        for attention in blocks:
            del attention.attend_heads


def gradcam(layers: Sequence[CrossAttention], scores: Tensor) -> list[Tensor]:
    """GradCAM (B, L, M) of each cross-attention layer.

    scores: computed from the outputs of `layers`: (B,), each of which depends on its own pair alone; or one score.
    """
    # The derivatives of the sum are then those of each.
    outputs = [layer.output for layer in layers]
    gradients = torch.autograd.grad(scores.sum(), outputs, allow_unused=True)
    return [layer.gradcam(gradient) for layer, gradient in zip(layers, gradients, strict=True)]


def word_spans(tokenizer: Tokenizer, text: str) -> list[tuple[str, int, int]]:
    """Split a text into words: (word, position of its first token, position after its last); [CLS] is at position 0."""
    return [(word, 1 + start, 1 + stop) for word, start, stop in tokenizer.words(text)]


def word_maps(x: Tensor, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Maps float32 (..., words, rows, columns) of words over the grid of patches, from weights (..., L, M) of tokens.

    A word's map is the mean over its tokens. The image's [CLS], key 0, is left out. spans: (first token, the one after
    the last) of each word.
    """
    rows = torch.stack([x[..., start:stop, 1:].mean(-2) for start, stop in spans], dim=-2)
    side = round(rows.shape[-1] ** 0.5)
    return rows.detach().float().cpu().unflatten(-1, (side, side))


@torch.enable_grad()
def matching_gradcam(network: MaskVLM, v: Tensor, w: Tensor) -> tuple[Tensor, list[CrossAttention], list[Tensor]]:
    """ITM's log-odds (B,) that image and text belong together, the attention of each layer, and its GradCAM (B, L, M).

    Features v (B, M, C), [CLS] first, and w (B, L, C), without padding.
    """
    with recorded_attention(network.text_cross) as layers:
        text = network.text_cross(w, v)[:, 0]
    image = network.image_cross(v, w, first_row_only=True)[:, 0]
    logits = network.matching_logits(image, text)
    log_odds = logits[:, 1] - logits[:, 0]
    return log_odds.detach(), layers, gradcam(layers, log_odds)


def draw_overlay(image: ImageLike, heat: Tensor, *, side: int = 224) -> Image.Image:
    """One map over its image, scaled from its smallest to its largest weight.

    Args:
        heat: float (rows, columns), over the whole image.
        side: side of the square result, in pixels.
    """
    pixels = load_image(image, side).permute(1, 2, 0).numpy()
    return Image.fromarray(_blend(pixels, heat, side))


def draw_words(image: ImageLike, found: AttentionMaps, *, side: int = 160, columns: int = 6) -> Image.Image:
    """Draw an image, and beside it a panel for each word with the word's GradCAM over the image.

    Args:
        found: maps of a text over this image, from `TrainedModel.attention`.
        side: side of a panel in pixels.
        columns: panels in a row.
    """
    pixels = load_image(image, side).permute(1, 2, 0).numpy()
    panels = [pixels, *(_blend(pixels, heat, side) for heat in found.relevance)]
    columns = min(columns, len(panels))
    sheet = Image.new("RGB", (columns * side, -(-len(panels) // columns) * (side + LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (panel, label) in enumerate(zip(panels, ["image", *found.words], strict=True)):
        x, y = number % columns * side, number // columns * (side + LABEL)
        sheet.paste(Image.fromarray(panel), (x, y))
        draw.text((x + 3, y + side + 2), label[: max(1, side // 7)], fill="black")
    return sheet


def _blend(pixels: NDArray[np.uint8], heat: Tensor, side: int) -> NDArray[np.uint8]:
    low, high = heat.min(), heat.max()
    scaled = torch.zeros_like(heat) if high <= low else (heat - low) / (high - low)
    resized = F.interpolate(scaled[None, None].float(), (side, side), mode="bilinear", align_corners=False)[0, 0]
    level = resized.clamp(0, 1).numpy() * (len(COLOURS) - 1)  # (side, side)
    lower = np.minimum(level.astype(np.int64), len(COLOURS) - 2)
    share = (level - lower)[..., None]
    colours = COLOURS[lower] * (1 - share) + COLOURS[lower + 1] * share
    return np.round(0.5 * pixels + 0.5 * colours).astype(np.uint8)
