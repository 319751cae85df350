# timm and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false
"""Baselines: a MaskVLM step as a user would write it with timm, transformers and torch.

There are two, with different cross-modality blocks: transformers' RobertaLayer with cross-attention, and torch's
nn.TransformerDecoderLayer. Both blocks apply self-attention, cross-attention and feed-forward in this order, with
post-norm. They can therefore use the weights of a MaskVLM with cross_norm="post", and then give the same losses.

Shape legend: B pairs, N patches, L tokens of the longest caption, C width, P patch side, S image side.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaLMHead

from mvlm.config.model import MaskVLMConfig
from mvlm.objectives.losses import Losses
from mvlm_benchmarks.step.inputs import PAD, PaddedBatch

Cross = Literal["roberta", "decoder-layer"]


def roberta_config(config: MaskVLMConfig, **changes: Any) -> RobertaConfig:
    settings = RobertaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.width,
        num_hidden_layers=config.text_layers,
        num_attention_heads=config.heads,
        intermediate_size=4 * config.width,
        max_position_embeddings=config.text_length + PAD + 1,  # RoBERTa numbers positions from PAD + 1
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        **changes,
    )
    settings._attn_implementation = "sdpa"
    return settings


class RobertaCross(nn.Module):
    """A stack of transformers' RobertaLayer with cross-attention, made bidirectional."""

    def __init__(self, config: MaskVLMConfig, layers: int) -> None:
        super().__init__()
        settings = roberta_config(config, is_decoder=True, add_cross_attention=True)
        self.layers = nn.ModuleList(RobertaLayer(settings) for _ in range(layers))
        for layer in self.layers:
            # NOTE: transformers requires is_decoder for cross-attention. A decoder's self-attention is silently causal
            # without a mask, which would be a different model with less work.
            layer.attention.self.is_causal = False

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor | None, memory_keys: Tensor | None) -> Tensor:
        """Self-attention of x (B, L, C), and cross-attention to memory (B, M, C).

        keys bool (B, L) and memory_keys bool (B, M): True = a token, False = padding; None without padding.
        """
        mask, memory_mask = (None if m is None else m[:, None, None, :] for m in (keys, memory_keys))
        for layer in self.layers:
            x = layer(x, mask, memory, memory_mask)
        return x


class DecoderLayerCross(nn.Module):
    """A stack of torch's nn.TransformerDecoderLayer, which is bidirectional without a mask."""

    def __init__(self, config: MaskVLMConfig, layers: int) -> None:
        super().__init__()
        width = config.width
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(width, config.heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True)
            for _ in range(layers)
        )

    def forward(self, x: Tensor, memory: Tensor, keys: Tensor | None, memory_keys: Tensor | None) -> Tensor:
        """Same arguments as `RobertaCross.forward`."""
        # torch's key padding masks have the opposite polarity: True = padding.
        padding, memory_padding = (None if m is None else ~m for m in (keys, memory_keys))
        for layer in self.layers:
            x = layer(x, memory, tgt_key_padding_mask=padding, memory_key_padding_mask=memory_padding)
        return x


class Baseline(nn.Module):
    """MaskVLM built from timm's ViT, transformers' RoBERTa and the chosen cross-modality blocks.

    Heads run on all positions, masked or not.
    """

    def __init__(self, config: MaskVLMConfig, cross: Cross) -> None:
        super().__init__()
        assert config.cross_norm == "post"
        width = config.width
        self.vit = VisionTransformer(
            img_size=config.image_size, patch_size=config.patch_size, embed_dim=width, depth=config.image_layers,
            num_heads=config.heads, num_classes=0, global_pool="",
        )  # fmt: skip
        self.text = RobertaModel(roberta_config(config), add_pooling_layer=False)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        blocks = RobertaCross if cross == "roberta" else DecoderLayerCross
        self.image_cross, self.text_cross, self.decoder = (
            blocks(config, layers) for layers in (config.cross_layers, config.cross_layers, config.decoder_layers)
        )
        self.pixels = nn.Linear(width, config.patch_values)
        self.words = RobertaLMHead(roberta_config(config))
        del self.words.bias  # unused, because the decoder has a bias
        self.image_projection = nn.Linear(width, config.itc_width)
        self.text_projection = nn.Linear(width, config.itc_width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        self.matching = nn.Linear(width, 2)
        self.patch_size = config.patch_size
        self.register_buffer("mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)

    def encode_image(self, pixels: Tensor, masked: Tensor | None = None) -> Tensor:
        """Encode normalised pixels: (B, 3, S, S) -> (B, 1+N, C).

        masked, bool (B, N): True = replaced by the mask token.
        """
        vit = self.vit
        x = vit.patch_embed(pixels)  # (B, N, C)
        if masked is not None:
            x = torch.where(masked.unsqueeze(-1), self.mask_token.to(x.dtype), x)
        return vit.norm(vit.blocks(vit.norm_pre(vit.patch_drop(vit._pos_embed(x)))))

    def patches(self, pixels: Tensor) -> Tensor:
        """Cut pixels into patches: (B, 3, S, S) -> (B, N, 3*P*P)."""
        batch, channels, side, _ = pixels.shape
        p, grid = self.patch_size, side // self.patch_size
        return pixels.reshape(batch, channels, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def forward(self, batch: PaddedBatch) -> Losses:
        """The four losses of one batch."""
        keys = batch.attention_mask.bool()  # (B, L), True = a token
        masked = batch.masked_patches
        pixels = (batch.images.to(self.mean.dtype) / 255 - self.mean) / self.std
        v, vm = self.encode_image(pixels), self.encode_image(pixels, masked)  # (B, 1+N, C)
        w, wm = (
            self.text(input_ids=ids, attention_mask=batch.attention_mask).last_hidden_state
            for ids in (batch.ids, batch.masked_ids)
        )  # (B, L, C)

        x = self.text_cross(wm, v, keys, None)
        mlm = F.cross_entropy(self.words(x).flatten(0, 1), batch.labels.flatten(), ignore_index=-100)
        x = self.image_cross(vm, w, None, keys)
        x = self.decoder(x, w, None, keys)
        distance = (self.pixels(x[:, 1:]) - self.patches(pixels)).abs().mean(-1)  # (B, N)
        mim = (distance * masked).sum() / masked.sum()

        image = F.normalize(self.image_projection(v[:, 0]), dim=-1)  # (B, E)
        text = F.normalize(self.text_projection(w[:, 0]), dim=-1)
        logits = image @ text.T * self.log_scale.exp()
        own = torch.arange(len(v), device=v.device)
        itc = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        images = torch.cat([own, own, batch.negative_images])  # (3B,)
        texts = torch.cat([own, batch.negative_texts, own])
        # index_select, because the backward of indexing is slower, and not deterministic on a CPU.
        vi, wi, ki = v.index_select(0, images), w.index_select(0, texts), keys.index_select(0, texts)
        match = self.image_cross(vi, wi, None, ki)[:, 0] * self.text_cross(wi, vi, ki, None)[:, 0]
        labels = (torch.arange(3 * len(v), device=v.device) < len(v)).long()
        itm = F.cross_entropy(self.matching(match), labels)
        # Our model also computes three accuracies, a cost that the baseline does not have.
        return Losses(mlm=mlm, mim=mim, itc=itc, itm=itm, total=mlm + mim + itc + itm)


@torch.no_grad()
def check_bidirectional(model: Baseline) -> None:
    """Assert that no stack is causal: its first position depends on the last one."""
    weight = model.matching.weight
    for stack in (model.text_cross, model.image_cross, model.decoder):
        x = torch.randn(1, 4, weight.shape[1], device=weight.device, dtype=weight.dtype)
        memory, variant = torch.randn_like(x), x.clone()
        variant[0, -1] = torch.randn_like(x[0, -1])
        first, changed = (stack(tokens, memory, None, None)[0, 0] for tokens in (x, variant))
        assert not torch.equal(first, changed), (
            f"{type(stack).__name__} is causal: its first position does not depend on the last"
        )
