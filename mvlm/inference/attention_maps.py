"""Maps of the patches that each word of a text attends to, in the pass that judges whether image and text match.

Text attends to the image in every cross-attention layer of the text's cross-modality encoder. The weights are the
softmax of its scores. GradCAM weights them by their effect on ITM's log-odds (Selvaraju et al. 2017; Li et al. 2021
show it for ALBEF's matching head):

    gradcam[layer, word, patch] = mean over heads of weight x max(0, d log-odds / d weight)

The heads' outputs are weights times values, so the derivative by a weight is the product of the derivative by the
output with the value. It needs no second softmax.

Shape legend: B pairs, L tokens, M keys (1 + patches), C width, H heads, D head width.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.inference.encode import image_features, text_features
from mvlm.inference.texts import checked_texts
from mvlm.model.attention import Attention, attend
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.residual import Branch, Residual
from mvlm_kernels import attention_probabilities
from mvlm_kernels.cross_attention import HEAD_WIDTHS

if TYPE_CHECKING:
    from mvlm.inference.trained_model import TrainedModel


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


class TextGradcam(NamedTuple):
    """Cross-attention of a batch of texts to their images, by layer, and its effect on ITM."""

    log_odds: Tensor
    """(B,), ITM's log-odds that image and text belong together."""
    weights: list[Tensor]
    """(B, H, L, M) of each layer."""
    gradcam: list[Tensor]
    """(B, L, M) of each layer, not negative: mean over heads of weight x max(0, derivative of the log-odds)."""


class _Layer(NamedTuple):
    """Cross-attention of one layer: its weights, and what their derivatives follow from."""

    weights: Tensor
    """(B, H, L, M)."""
    output: Tensor
    """(B, H, L, D), in the graph of the log-odds."""
    values: Tensor
    """(B, H, M, D)."""


def attention_maps(model: "TrainedModel", pixels: Tensor, text: str) -> AttentionMaps:
    """Maps of one image uint8 (3, S, S) and a text, in float32 whatever the model's precision.

    Raises:
        ConfigError: the text cannot be used.
    """
    network, config = model.network, model.network.config
    (text,) = checked_texts([text], model.tokenizer, config.text_length)
    v = image_features(network, pixels[None], "fp32").v
    w = text_features(network, [text], model.tokenizer, "fp32").w.rows[None]  # (1, L, C), no padding
    found = text_gradcam(network, v, w)
    spans = [("[CLS]", 0, 1), *((word, 1 + start, 1 + stop) for word, start, stop in model.tokenizer.words(text))]
    side = config.image_size // config.patch_size

    def of_words(x: Tensor) -> Tensor:
        """Rows of tokens (..., L, M) -> mean rows of words over patches (..., words, rows, columns)."""
        rows = torch.stack([x[..., start:stop, 1:].mean(-2) for _, start, stop in spans], dim=-2)
        return rows.detach().float().cpu().unflatten(-1, (side, side))

    return AttentionMaps(
        [word for word, _, _ in spans],
        of_words(torch.stack([layer[0] for layer in found.weights])),
        of_words(torch.stack([layer[0] for layer in found.gradcam])),
        found.log_odds.item(),
    )


def text_gradcam(network: MaskVLM, v: Tensor, w: Tensor, key_mask: Tensor | None = None) -> TextGradcam:
    """Attention weights and GradCAM of B pairs of an image and a text.

    Features v (B, M, C), [CLS] first, and w (B, L, C), padded; key_mask bool (B, L), True = a token, None = no padding.
    Rows of padding have no meaning.
    """
    log_odds, layers = _match_with_weights(network, v, w, key_mask)
    # A pair's log-odds depend on no other pair, so the derivatives of the sum are those of each.
    outputs = [layer.output for layer in layers]
    gradients = torch.autograd.grad(log_odds, outputs, torch.ones_like(log_odds), allow_unused=True)
    gradcam = []
    for layer, gradient in zip(layers, gradients, strict=True):
        effect = torch.zeros_like(layer.weights) if gradient is None else gradient @ layer.values.mT  # (B, H, L, M)
        gradcam.append((layer.weights * effect.clamp(min=0)).mean(1))
    return TextGradcam(log_odds.detach(), [layer.weights for layer in layers], gradcam)


@torch.enable_grad()
def _match_with_weights(network: MaskVLM, v: Tensor, w: Tensor, key_mask: Tensor | None) -> tuple[Tensor, list[_Layer]]:
    """ITM's log-odds (B,) with a graph, and each cross-attention layer of the text."""
    layers: list[_Layer] = []
    w = w.detach().requires_grad_()  # so that there is a graph even if no parameter wants gradients

    def attend_self(attention: Attention, y: Tensor) -> Branch:
        return attention(y, y, key_mask)

    def attend_cross(attention: Attention, y: Tensor) -> Branch:
        q, (k, values) = attention.queries(y), attention.keys_values(v)  # (B, L, H, D), (B, M, H, D)
        output = attend(q.transpose(1, 2), k.transpose(1, 2), values.transpose(1, 2))  # (B, H, L, D)
        layers.append(_Layer(_weights(q, k), output, values.transpose(1, 2).detach()))
        return attention.project_out(output.transpose(1, 2))

    rows = Residual(w)
    for block in network.text_cross.layers:
        rows = block(rows, attend_self, attend_cross)
    text = network.text_cross.finish(rows)[:, 0]
    image = network.image_cross(v, w, None, key_mask, first_row_only=True)[:, 0]
    logits = network.matching_logits(image, text)
    return logits[:, 1] - logits[:, 0], layers


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of the scores of q (B, L, H, D) and k (B, M, H, D): (B, H, L, M), without a graph."""
    width = q.shape[-1]
    padded = next((known for known in HEAD_WIDTHS if known >= width), None)
    if padded is None:  # wider than the kernels take
        return (q.detach().transpose(1, 2) @ k.detach().permute(0, 2, 3, 1) * width**-0.5).softmax(-1)
    rest = (0, padded - width)  # zeros add nothing to a score
    return attention_probabilities(F.pad(q, rest), F.pad(k, rest), scale=width**-0.5)


def resize_map(heat: Tensor, side: int) -> Tensor:
    """A map (rows, columns) at `side` x `side` pixels, bilinear."""
    return F.interpolate(heat[None, None].float(), size=(side, side), mode="bilinear", align_corners=False)[0, 0]
