# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""Cross-modality encoders against torch's decoder layers with the weights copied over, and the grid of patches.

All in float64. tests/mvlm/weights/test_load.py compares the encoders of images and text with those of other libraries.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from mvlm.model.encoders import CrossBlock, CrossEncoder, ImageEncoder
from support.models import micro_batch, micro_config, normal


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=100 + seed))
    return module


@pytest.mark.parametrize("drop_masked", [False, True])
def test_output_positions_are_added_to_the_features_of_patches(drop_masked):
    config = micro_config(drop_masked=drop_masked)
    usual = randomize(ImageEncoder(config).double())
    placed = ImageEncoder(replace(config, output_positions=True)).double()
    placed.load_state_dict(usual.state_dict())  # no weights of their own
    images = micro_batch()[0].images
    if drop_masked:
        visible = torch.tensor([[0, 3, 5]]).expand(len(images), -1)
        rows = usual.forward_visible(images, visible)
        added = placed.with_mask_tokens(rows, visible) - usual.with_mask_tokens(rows, visible)
        of_rows = placed.add_output_positions(rows, visible) - rows
        torch.testing.assert_close(of_rows, added[:, [0, 1, 4, 6]])
    else:
        added = placed(images) - usual(images)
    assert added.shape == (5, 17, config.width)
    frequencies = [10_000 ** -(i / (config.width // 4)) for i in range(config.width // 4)]
    for row in added.tolist():
        assert row[0] == [0] * config.width
        for patch, found in enumerate(row[1:]):
            x, y = (2 * math.pi * (cell + 0.5) / 4 for cell in (patch % 4, patch // 4))
            wanted = [wave(at * f) for at in (x, y) for wave in (math.sin, math.cos) for f in frequencies]
            assert found == pytest.approx(wanted, abs=1e-6)


def test_cls_is_encoded_where_no_patch_is_visible():
    encoder = randomize(ImageEncoder(micro_config(drop_masked=True)).double())
    images = micro_batch()[0].images
    nothing = torch.zeros(len(images), 0, dtype=torch.int64)
    found = encoder.with_mask_tokens(encoder.forward_visible(images, nothing), nothing)
    first, others = encoder.position[0], encoder.position[1:]
    alone = (encoder.cls_token + first).expand(len(images), 1, -1)
    encoded = encoder.run(alone, lambda attention, x: attention(x, x)) + first
    torch.testing.assert_close(found[:, :1], encoded)
    torch.testing.assert_close(found[:, 1:], (encoder.mask_token + others).expand(len(images), -1, -1))


WIDTH, HEADS = 12, 3


def decoder_layer(block: CrossBlock, norm: str) -> nn.TransformerDecoderLayer:
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
    ).double()
    for ours, theirs in ((block.self_attention, layer.self_attn), (block.cross_attention, layer.multihead_attn)):
        parts = (ours.query, ours.key, ours.value)
        theirs.in_proj_weight.data = torch.cat([part.weight for part in parts]).detach()
        theirs.in_proj_bias.data = torch.cat([part.bias for part in parts]).detach()
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    for ours, theirs in (
        (block.norm1, layer.norm1),
        (block.norm2, layer.norm2),
        (block.norm3, layer.norm3),
        (block.mlp.up, layer.linear1),
        (block.mlp.down, layer.linear2),
    ):
        theirs.load_state_dict(ours.state_dict())
    return layer


@pytest.fixture
def streams():
    """x (3, 5, C), memory (3, 4, C), and their key masks."""
    own = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    other = torch.arange(4) < torch.tensor([1, 4, 2])[:, None]
    return normal(3, 5, WIDTH), normal(3, 4, WIDTH, seed=1), own, other


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("masks", ["none", "own", "other", "both"])
def test_a_cross_encoder_is_torchs_decoder_layers_in_turn(streams, norm, masks):
    """With pre-norm, a last LayerNorm follows."""
    x, memory, own, other = streams
    own, other = own if masks in ("own", "both") else None, other if masks in ("other", "both") else None
    hidden = {
        "tgt_key_padding_mask": None if own is None else ~own,
        "memory_key_padding_mask": None if other is None else ~other,
    }
    encoder = randomize(CrossEncoder(WIDTH, HEADS, 3, norm).double())
    wanted = x
    for block in encoder.blocks:
        wanted = decoder_layer(block, norm)(wanted, memory, **hidden)
    if norm == "pre":
        mean = wanted.mean(-1, keepdim=True)
        variance = ((wanted - mean) ** 2).mean(-1, keepdim=True)
        wanted = (wanted - mean) / (variance + 1e-5).sqrt() * encoder.norm.weight + encoder.norm.bias
    torch.testing.assert_close(encoder(x, memory, own, other), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_cross_encoder_of_the_first_row_alone_gives_the_same_row(streams, norm, layers):
    x, memory, own, other = streams
    encoder = randomize(CrossEncoder(WIDTH, HEADS, layers, norm).double())
    alone = encoder(x, memory, own, other, first_row_only=True)
    assert alone.shape == (3, 1, WIDTH)
    torch.testing.assert_close(alone, encoder(x, memory, own, other)[:, :1], rtol=0, atol=1e-12)
