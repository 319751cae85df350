# timm and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false
"""Baselines that hold the weights of a MaskVLM in the same memory, each under the names of its own libraries.

Parameters are objects of their own, so gradients are too; only the storage is shared. Where a library keeps queries,
keys and values in one matrix, ours become slices of it.
"""

import torch
from torch import Tensor, nn

from mvlm.attention import Attention, FeedForward
from mvlm.crossmodal import CrossEncoder
from mvlm.model import MaskVLM
from mvlm_benchmarks.step.baselines import Baseline, Cross, DecoderLayerCross, check_bidirectional
from mvlm_benchmarks.step.inputs import PAD


class SharedWeights:
    """A MaskVLM whose weights any number of baselines share."""

    def __init__(self, model: MaskVLM) -> None:
        self.model = model
        self._fused = {module: _fuse(module) for module in model.modules() if isinstance(module, Attention)}
        text, width = model.text_encoder, model.config.width
        # RoBERTa's table has rows before its first position.
        self._positions = text.position.new_zeros(len(text.position) + PAD + 1, width)
        self._positions[PAD + 1 :] = text.position.detach()
        text.position.data = self._positions[PAD + 1 :]

    def baseline(self, cross: Cross) -> Baseline:
        """A baseline on these weights, on their device and of their dtype. It is checked to be bidirectional."""
        ours = self.model
        theirs = Baseline(ours.config, cross).to(ours.log_scale.device, ours.log_scale.dtype)
        self._image_encoder(theirs)
        self._text_encoder(theirs)
        stacks = (
            (theirs.image_cross, ours.image_cross),
            (theirs.text_cross, ours.text_cross),
            (theirs.decoder, ours.image_decoder),
        )
        for stack, blocks in stacks:
            self._cross(stack, blocks)
        _share(theirs, "mask_token", ours.image_encoder.mask_token)
        _share(theirs, "log_scale", ours.log_scale)
        for name, module in (
            ("pixels", ours.pixel_head),
            ("image_projection", ours.image_projection),
            ("text_projection", ours.text_projection),
            ("matching", ours.matching_head),
        ):
            _share_all(getattr(theirs, name), module)
        _share_all(theirs.words.dense, ours.language_head.dense)
        _share_all(theirs.words.layer_norm, ours.language_head.norm)
        _share_all(theirs.words.decoder, ours.language_head.vocabulary)
        check_bidirectional(theirs)
        return theirs

    def _image_encoder(self, theirs: Baseline) -> None:
        vit, ours = theirs.vit, self.model.image_encoder
        _share(vit.patch_embed.proj, "weight", ours.patch_projection.weight)
        _share(vit.patch_embed.proj, "bias", ours.patch_projection.bias)
        _share(vit, "cls_token", ours.cls_token)
        _share(vit, "pos_embed", ours.position)
        _share_all(vit.norm, ours.norm)
        for other, block in zip(vit.blocks, ours.blocks, strict=True):
            self._fused_projection(other.attn.qkv, "weight", "bias", block.attention)
            _share_all(other.attn.proj, block.attention.out)
            _share_all(other.norm1, block.norm1)
            _share_all(other.norm2, block.norm2)
            _share_feed_forward(other.mlp.fc1, other.mlp.fc2, block.mlp)

    def _text_encoder(self, theirs: Baseline) -> None:
        embeddings, ours = theirs.text.embeddings, self.model.text_encoder
        _share(embeddings.word_embeddings, "weight", ours.words.weight)
        _share(embeddings.position_embeddings, "weight", self._positions)
        nn.init.zeros_(embeddings.token_type_embeddings.weight)
        _share_all(embeddings.LayerNorm, ours.norm)
        for other, block in zip(theirs.text.encoder.layer, ours.blocks, strict=True):
            _share_roberta(other.attention, block.attention, block.norm1)
            _share_feed_forward(other.intermediate.dense, other.output.dense, block.mlp)
            _share_all(other.output.LayerNorm, block.norm2)

    def _cross(self, stack: nn.Module, ours: CrossEncoder) -> None:
        for other, block in zip(stack.layers, ours.blocks, strict=True):
            if isinstance(stack, DecoderLayerCross):
                for attention, source in (
                    (other.self_attn, block.self_attention),
                    (other.multihead_attn, block.cross_attention),
                ):
                    self._fused_projection(attention, "in_proj_weight", "in_proj_bias", source)
                    _share_all(attention.out_proj, source.out)
                for name in ("norm1", "norm2", "norm3"):
                    _share_all(getattr(other, name), getattr(block, name))
                _share_feed_forward(other.linear1, other.linear2, block.mlp)
            else:
                _share_roberta(other.attention, block.self_attention, block.norm1)
                _share_roberta(other.crossattention, block.cross_attention, block.norm2)
                _share_feed_forward(other.intermediate.dense, other.output.dense, block.mlp)
                _share_all(other.output.LayerNorm, block.norm3)

    def _fused_projection(self, target: nn.Module, weight: str, bias: str, source: Attention) -> None:
        fused_weight, fused_bias = self._fused[source]
        _share(target, weight, fused_weight)
        _share(target, bias, fused_bias)


def _fuse(attention: Attention) -> tuple[Tensor, Tensor]:
    """Move queries, keys and values into one weight (3C, C) and one bias (3C,), of which they become slices."""
    parts = (attention.query, attention.key, attention.value)
    weight, bias = (torch.cat([getattr(p, name).detach() for p in parts]) for name in ("weight", "bias"))
    for p, w, b in zip(parts, weight.chunk(3), bias.chunk(3), strict=True):
        p.weight.data, p.bias.data = w, b
    return weight, bias


def _share(target: nn.Module, name: str, source: Tensor) -> None:
    """Give the target's parameter the source's memory, in the target's shape, and a gradient of its own."""
    shape = getattr(target, name).shape
    setattr(target, name, nn.Parameter(source.detach().view(shape)))


def _share_all(target: nn.Module, source: nn.Module) -> None:
    """All parameters of two modules that name them alike."""
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
