"""Network of MaskVLM: two encoders, two cross-modality encoders, an image decoder and heads (docs/explain/method.md).

Image features are (B, 1+N, C), [CLS] first. Text features are (B, L, C), [CLS] first and padded at the end, with a key
mask bool (B, L), True = a token.

Shape legend: B batch, N patches, K masked patches, T packed tokens, L tokens of the longest caption, M masked tokens,
C width, E contrastive width, V vocabulary, P patch side, S image side.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.config.model import ImageAttentionBackend, MaskVLMConfig, TextAttentionBackend
from mvlm.model.attention import Attention
from mvlm.model.encoders import (
    CrossEncoder,
    ImageEncoder,
    TextEncoder,
    masked_patches,
    patchify,
    visible_patches,
    visible_rows,
)
from mvlm.model.packing import PackedText, Packing
from mvlm.model.towers.text import TextTower
from mvlm.model.towers.timm_tower import TimmTower
from mvlm.objectives.losses import at_least_float32, patch_statistics
from mvlm_kernels.dispatch import without_autocast

PIXEL_MODULES = ("image_cross.", "image_decoder.", "pixel_head")
"""Name prefixes of the modules that reconstruct pixels. They have their own learning rate and initialisation."""

SIGMOID_BIAS = -10.0
"""Initial bias of the sigmoid loss, as in SigLIP: the log-odds of a match among 22,000 pairs. A pretraining run starts
with those of its own batch."""


class LanguageHead(nn.Module):
    """RoBERTa's LM head: linear, GELU, LayerNorm, vocabulary projection (not tied to the embedding)."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)
        self.vocabulary = nn.Linear(config.width, config.vocab_size)

    def transform(self, x: Tensor) -> Tensor:
        """The layers before the vocabulary projection: (..., C) -> (..., C)."""
        return self.norm(F.gelu(self.dense(x)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the vocabulary (..., V) from features (..., C)."""
        return self.vocabulary(self.transform(x))


class PixelHead(nn.Linear):
    """Linear layer from features (..., C) to MIM's predictions (..., 3*P*P): pixels, or pixels normalised by patch.

    With the latter (`mim_target`) a second layer predicts mean and standard deviation of each patch. It learns by their
    mean absolute error, from features without gradient, so it changes no other parameter.
    """

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__(config.width, config.patch_values)
        self.statistics = nn.Linear(config.width, 2) if config.mim_target == "normalized" else None

    def target(self, pixels: Tensor) -> Tensor:
        """Target of MIM's predictions, as `mim_target` says, from the true normalised pixels; both (..., 3*P*P)."""
        if self.statistics is None:
            return pixels
        mean, deviation = patch_statistics(pixels)
        return (pixels - mean) / deviation

    def pixels(self, predicted: Tensor, x: Tensor) -> Tensor:
        """Normalised pixels (..., 3*P*P) from the predictions (..., 3*P*P) of features x (..., C)."""
        if self.statistics is None:
            return predicted
        mean, deviation = at_least_float32(self.statistics(x)).split(1, dim=-1)
        return mean + deviation.clamp(min=0) * predicted

    def statistics_gradient(self, x: Tensor, pixels: Tensor) -> Tensor:
        """A scalar 0 whose gradient trains the layer of mean and standard deviation; a plain 0 without that layer.

        x (..., C) are features, pixels (..., 3*P*P) true normalised pixels of the same patches.
        """
        if self.statistics is None:
            return pixels.new_zeros(())
        predicted = at_least_float32(self.statistics(x.detach()))
        loss = (predicted - torch.cat(patch_statistics(pixels), dim=-1)).abs().mean()
        return loss - loss.detach()


class MaskVLMNetwork(nn.Module):
    """The network of MaskVLM: its modules, and methods to encode, embed, match and reconstruct."""

    def __init__(self, config: MaskVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.image_encoder = TimmTower(config) if config.image_tower else ImageEncoder(config)
        self.text_encoder = TextTower(config) if config.text_tower else TextEncoder(config)
        self.image_cross = CrossEncoder(config.width, config.heads, config.cross_layers, config.cross_norm)
        self.text_cross = CrossEncoder(config.width, config.heads, config.cross_layers, config.cross_norm)
        self.image_decoder = CrossEncoder(config.width, config.heads, config.decoder_layers, config.cross_norm)
        self.pixel_head = PixelHead(config)
        self.language_head = LanguageHead(config)
        self.image_projection = nn.Linear(config.width, config.itc_width)
        self.text_projection = nn.Linear(config.width, config.itc_width)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / config.temperature)]))  # (1,): FSDP2 splits no scalars
        self.logit_bias = (
            None if config.contrastive == "softmax" else nn.Parameter(torch.tensor([SIGMOID_BIAS]))
        )  # (1,)
        """Bias of the sigmoid loss's logits; None for InfoNCE, which does not change with it."""
        self.matching_head = nn.Linear(config.width, 2)
        self._initialize()

    def _initialize(self) -> None:
        """Initialise linear weights as configured, embeddings with trunc_normal(0.02), and biases with zero.

        Modules of towers keep the initial weights of their library.
        """
        towers = tuple(
            f"{name}." for name, module in self.named_children() if isinstance(module, TimmTower | TextTower)
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(towers):
                nn.init.zeros_(module.bias)
                # With Xavier the pixels stay at the constant image for hundreds of steps (docs/evidence/lab_log.md).
                if self.config.initialization == "xavier" and not name.startswith(PIXEL_MODULES):
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.trunc_normal_(module.weight, std=0.02)
        image, text = self.image_encoder, self.text_encoder
        embeddings = [image.mask_token]
        if isinstance(image, ImageEncoder):
            embeddings += [image.cls_token, image.position]
        if isinstance(text, TextEncoder):
            embeddings += [text.position, text.words.weight]
        for embedding in embeddings:
            nn.init.trunc_normal_(embedding, std=0.02)

    @contextmanager
    def at(self, config: MaskVLMConfig) -> Iterator[None]:
        """Context in which the model has the side of images and the masks of `config`, in which all else is its own.

        Positions are interpolated where they are read (`ImageEncoder.resize`). ValueError for an image tower.
        """
        own, encoder = self.config, self.image_encoder
        if config == own:
            yield
            return
        if not isinstance(encoder, ImageEncoder):
            raise ValueError(f"wanted an own image encoder for images of another side, got {own.image_tower}")
        self.config = config
        encoder.resize(config)
        try:
            yield
        finally:
            self.config = own
            encoder.resize(own)

    def encode_image(self, images: Tensor, masked: Tensor | None = None) -> Tensor:
        """Encode images (B, 3, S, S), uint8 or float in 0..1 -> (B, 1+N, C). masked bool (B, N), True = masked.

        ValueError for images of another shape.
        """
        side = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images: wanted (B, 3, {side}, {side}), got {tuple(images.shape)}")
        return self.image_encoder(images, masked)

    def encode_text_packed(self, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> PackedText:
        """Encode packed tokens int64 (T,); caption b is tokens cu_seqlens[b] to cu_seqlens[b+1], cu_seqlens int (B+1,).

        No caption has more than max_length tokens. ValueError for other shapes or a max_length above `text_length`.
        """
        self.check_captions(tokens, cu_seqlens, max_length)
        packing = Packing(cu_seqlens, max_length, len(tokens))
        return PackedText(self.text_encoder(tokens, packing), packing)

    def check_captions(self, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> None:
        """Raise ValueError unless tokens are (T,), cu_seqlens (B+1,), and no caption is longer than the model's."""
        if tokens.ndim != 1 or cu_seqlens.ndim != 1 or not 0 < max_length <= self.config.text_length:
            raise ValueError(
                f"tokens, cu_seqlens, max_length: wanted (T,), (B+1,) and at most {self.config.text_length}, "
                f"got {tuple(tokens.shape)}, {tuple(cu_seqlens.shape)} and {max_length}"
            )

    def encode_text(self, tokens: Tensor, cu_seqlens: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Encode packed tokens, as `encode_text_packed` does, and pad.

        Returns features (B, L, C), zeros for padding, and the key mask bool (B, L), True = a token.
        """
        return self.encode_text_packed(tokens, cu_seqlens, max_length).padded()

    def embed_image(self, v: Tensor) -> Tensor:
        """Contrastive embedding of image features: v (B, 1+N, C) -> (B, E) of unit length."""
        return F.normalize(at_least_float32(self.image_projection(v[:, 0])), dim=-1)

    def embed_text(self, w: Tensor) -> Tensor:
        """Contrastive embedding of text features: w (B, L, C) -> (B, E) of unit length."""
        return F.normalize(at_least_float32(self.text_projection(w[:, 0])), dim=-1)

    def fuse(self, v: Tensor, w: Tensor, key_mask: Tensor) -> tuple[Tensor, Tensor]:
        """[CLS] of both cross-modality encoders, image and text (B, C) each, from v (B, 1+N, C) and w (B, L, C)."""
        image = self.image_cross(v, w, None, key_mask, first_row_only=True)[:, 0]
        text = self.text_cross(w, v, key_mask, None, first_row_only=True)[:, 0]
        return image, text

    @property
    def matching_is_trained(self) -> bool:
        """False if no step has trained ITM's head: its bias still has the zeros that it was initialised with."""
        return bool(self.matching_head.bias.detach().any())

    def matching_logits(self, image: Tensor, text: Tensor) -> Tensor:
        """ITM logits (R, 2), column 1 = match, from both [CLS] of a pair, (R, C) each.

        The product and the head are computed in fp32 (float64) under autocast too.
        """
        # In bf16 captions of one image have equal log-odds now and then, and a tie counts as wrong.
        with without_autocast(image.device):
            return self.matching_head(at_least_float32(image) * at_least_float32(text))

    def fill_mask(self, v: Tensor, wm: Tensor, key_mask: Tensor, cu_seqlens: Tensor, token_ids: Tensor) -> Tensor:
        """LM logits (M, V) of the tokens token_ids int64 (M,), given as packed positions.

        v (B, 1+N, C) are features of the unmasked image, wm (B, L, C) of the masked text; cu_seqlens int32 (B+1,).
        """
        x = self.text_cross(wm, v, key_mask, None)  # (B, L, C)
        rows = x.flatten(0, 1)
        caption = torch.searchsorted(cu_seqlens[1:].long(), token_ids, right=True)
        return self.language_head(rows.index_select(0, caption * x.shape[1] + token_ids - cu_seqlens[caption]))

    def reconstruct(self, vm: Tensor, w: Tensor, key_mask: Tensor, patch_ids: Tensor) -> Tensor:
        """Predicted normalised pixels (B, K, 3*P*P) of the patches patch_ids int64 (B, K).

        vm (B, 1+N, C) are features of the masked image, w (B, L, C) of the unmasked text.
        """
        x = self.masked_features(vm, w, key_mask, patch_ids)
        return self.pixel_head.pixels(self.pixel_head(x), x)

    def encode_masked_image(self, images: Tensor, patch_ids: Tensor) -> Tensor:
        """Features (B, 1+N, C) of images uint8 (B, 3, S, S), of which the patches patch_ids int64 (B, K) are masked."""
        if not self.config.hides_by_dropping:
            return self.image_encoder(images, masked_patches(patch_ids, self.config.num_patches))
        visible = visible_patches(patch_ids, self.config.num_patches)
        return self.image_encoder.with_mask_tokens(self.image_encoder.forward_visible(images, visible), visible)

    def masked_features(
        self, vm: Tensor, w: Tensor, key_mask: Tensor, patch_ids: Tensor, rebuilt: Tensor | None = None
    ) -> Tensor:
        """Features (B, R, C) of masked patches, for the pixel head.

        Args:
            vm: (B, 1+N, C), features of the masked images.
            w, key_mask: (B, L, C), features of the unmasked texts, and bool (B, L), True = a token.
            patch_ids: int64 (B, K), the masked patches.
            rebuilt: int64 (B, R), some of them. Default: all.
        """
        rebuilt = patch_ids if rebuilt is None else rebuilt

        def rows_of(x: Tensor, rows: Tensor) -> Tensor:
            return x.gather(1, rows.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

        if self.config.mim_rows == "all":
            x = self.image_cross(vm, w, None, key_mask)
            x = self.image_decoder(x, w, None, key_mask)  # (B, 1+N, C)
            return rows_of(x, 1 + rebuilt)
        keys = rows_of(vm, visible_rows(patch_ids, self.config.num_patches))  # (B, 1+N-K, C)
        x = self.image_cross(rows_of(vm, 1 + rebuilt), w, None, key_mask, keys=keys)
        return self.image_decoder(x, w, None, key_mask, keys=keys)

    def patch_targets(self, images: Tensor, patch_ids: Tensor) -> Tensor:
        """Normalised pixels (B, K, 3*P*P) of the patches patch_ids int64 (B, K) of the images, as targets of MIM."""
        patches = patchify(self.image_encoder.normalize(images), self.config.patch_size)
        return patches.gather(1, patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))

    def set_attention(
        self, self_attention: ImageAttentionBackend = "auto", cross_attention: TextAttentionBackend = "auto"
    ) -> None:
        """Set the attention backends of the fast implementation.

        A backend that cannot run raises ConfigError, with the reason, when attention is computed.

        Args:
            self_attention: for attention between image patches.
            cross_attention: for attention with text on at least one side, so for the text encoder too.
        """
        for module in self.modules():
            if isinstance(module, TextTower):
                module.text_backend = cross_attention
            if isinstance(module, Attention):
                module.image_backend, module.text_backend = self_attention, cross_attention

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Clamp the temperature to [0.001, 0.5]. Call it after the optimizer's step, not in the forward pass."""
        self.log_scale.clamp_(math.log(1 / 0.5), math.log(1 / 0.001))
