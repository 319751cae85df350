# timm and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false
"""Baselines whose parameters share the storage of a MaskVLM's weights.

Only the storage is shared. Each baseline has its own parameter objects, with the names of its libraries, and its own
gradients. Some libraries store queries, keys and values in one matrix. Our three matrices then become slices of it.
"""

import torch
from torch import Tensor, nn

from mvlm.model.attention import Attention, FeedForward
from mvlm.model.encoders import CrossEncoder
from mvlm.model.maskvlm import MaskVLM
from mvlm_benchmarks.step.baselines import Baseline, Cross, DecoderLayerCross, check_bidirectional
from mvlm_benchmarks.step.inputs import PAD


class SharedWeights:
    """Makes baselines that share the weights of a MaskVLM."""

    def __init__(self, model: MaskVLM) -> None:
        self.model = model
        self._fused = {module: _fuse(module) for module in model.modules() if isinstance(module, Attention)}
        text, width = model.text_encoder, model.config.width
        # RoBERTa's position table has PAD + 1 unused rows before the first position.
        self._positions = text.position.new_zeros(len(text.position) + PAD + 1, width)
        self._positions[PAD + 1 :] = text.position.detach()
        text.position.data = self._positions[PAD + 1 :]

    def baseline(self, cross: Cross) -> Baseline:
        """Make a baseline on these weights, with their device and dtype. Checks that it is bidirectional."""
        ours = self.model
        baseline = Baseline(ours.config, cross).to(ours.log_scale.device, ours.log_scale.dtype)
        self._share_image_encoder(baseline)
        self._share_text_encoder(baseline)
        stacks = (
            (baseline.image_cross, ours.image_cross),
            (baseline.text_cross, ours.text_cross),
            (baseline.decoder, ours.image_decoder),
        )
        for stack, blocks in stacks:
            self._share_cross(stack, blocks)
        _share(baseline, "mask_token", ours.image_encoder.mask_token)
        _share(baseline, "log_scale", ours.log_scale)
        for name, module in (
            ("pixels", ours.pixel_head),
            ("image_projection", ours.image_projection),
            ("text_projection", ours.text_projection),
            ("matching", ours.matching_head),
        ):
            _share_all(getattr(baseline, name), module)
        _share_all(baseline.words.dense, ours.language_head.dense)
        _share_all(baseline.words.layer_norm, ours.language_head.norm)
        _share_all(baseline.words.decoder, ours.language_head.vocabulary)
        check_bidirectional(baseline)
        return baseline

    def _share_image_encoder(self, baseline: Baseline) -> None:
        vit, ours = baseline.vit, self.model.image_encoder
        _share(vit.patch_embed.proj, "weight", ours.patch_projection.weight)
        _share(vit.patch_embed.proj, "bias", ours.patch_projection.bias)
        _share(vit, "cls_token", ours.cls_token)
        _share(vit, "pos_embed", ours.position)
        _share_all(vit.norm, ours.norm)
        for layer, block in zip(vit.blocks, ours.blocks, strict=True):
            self._share_fused_projection(layer.attn.qkv, "weight", "bias", block.attention)
            _share_all(layer.attn.proj, block.attention.out)
            _share_all(layer.norm1, block.norm1)
            _share_all(layer.norm2, block.norm2)
            _share_feed_forward(layer.mlp.fc1, layer.mlp.fc2, block.mlp)

    def _share_text_encoder(self, baseline: Baseline) -> None:
        embeddings, ours = baseline.text.embeddings, self.model.text_encoder
        _share(embeddings.word_embeddings, "weight", ours.words.weight)
        _share(embeddings.position_embeddings, "weight", self._positions)
        nn.init.zeros_(embeddings.token_type_embeddings.weight)
        _share_all(embeddings.LayerNorm, ours.norm)
        for layer, block in zip(baseline.text.encoder.layer, ours.blocks, strict=True):
            _share_roberta(layer.attention, block.attention, block.norm1)
            _share_feed_forward(layer.intermediate.dense, layer.output.dense, block.mlp)
            _share_all(layer.output.LayerNorm, block.norm2)

    def _share_cross(self, stack: nn.Module, ours: CrossEncoder) -> None:
        for layer, block in zip(stack.layers, ours.blocks, strict=True):
            if isinstance(stack, DecoderLayerCross):
                for attention, source in (
                    (layer.self_attn, block.self_attention),
                    (layer.multihead_attn, block.cross_attention),
                ):
                    self._share_fused_projection(attention, "in_proj_weight", "in_proj_bias", source)
                    _share_all(attention.out_proj, source.out)
                for name in ("norm1", "norm2", "norm3"):
                    _share_all(getattr(layer, name), getattr(block, name))
                _share_feed_forward(layer.linear1, layer.linear2, block.mlp)
            else:
                _share_roberta(layer.attention, block.self_attention, block.norm1)
                _share_roberta(layer.crossattention, block.cross_attention, block.norm2)
                _share_feed_forward(layer.intermediate.dense, layer.output.dense, block.mlp)
                _share_all(layer.output.LayerNorm, block.norm3)

    def _share_fused_projection(self, target: nn.Module, weight: str, bias: str, source: Attention) -> None:
        fused_weight, fused_bias = self._fused[source]
        _share(target, weight, fused_weight)
        _share(target, bias, fused_bias)


def _fuse(attention: Attention) -> tuple[Tensor, Tensor]:
    """Move queries, keys and values into one weight (3C, C) and bias (3C,). Our parameters become slices of them."""
    projections = (attention.query, attention.key, attention.value)
    weight, bias = (torch.cat([getattr(p, name).detach() for p in projections]) for name in ("weight", "bias"))
    for p, w, b in zip(projections, weight.chunk(3), bias.chunk(3), strict=True):
        p.weight.data, p.bias.data = w, b
    return weight, bias


def _share(target: nn.Module, name: str, source: Tensor) -> None:
    """Replace a parameter of the target by one that uses the source's storage, in the target's shape."""
    shape = getattr(target, name).shape
    setattr(target, name, nn.Parameter(source.detach().view(shape)))


def _share_all(target: nn.Module, source: nn.Module) -> None:
    """Share all parameters of two modules that have the same parameter names."""
    names = dict(target.named_parameters(recurse=False))
    assert names.keys() == dict(source.named_parameters(recurse=False)).keys()
    for name in names:
        _share(target, name, getattr(source, name))


def _share_feed_forward(up: nn.Module, down: nn.Module, source: FeedForward) -> None:
    _share_all(up, source.up)
    _share_all(down, source.down)


def _share_roberta(target: nn.Module, source: Attention, norm: nn.Module) -> None:
    for name in ("query", "key", "value"):
        _share_all(getattr(target.self, name), getattr(source, name))
    _share_all(target.output.dense, source.out)
    _share_all(target.output.LayerNorm, norm)
