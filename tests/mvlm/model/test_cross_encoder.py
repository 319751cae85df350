# torch types the children of a module as Tensor or Module, whatever they are.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
"""Cross-modality blocks against torch's own decoder layers with the weights copied over, in float64."""

import pytest
import torch
from torch import nn

from mvlm.model.cross_encoder import CrossBlock, CrossEncoder
from mvlm.model.residual import Residual
from support.models import normal

WIDTH, HEADS = 12, 3


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.4 * normal(*parameter.shape, seed=100 + seed))
    return module


def decoder_layer(block: CrossBlock, norm: str) -> nn.TransformerDecoderLayer:
    layer = nn.TransformerDecoderLayer(
        WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm == "pre"
    ).double()
    for ours, theirs in (
        (block.self_attention, layer.self_attn),
        (block.cross_attention, layer.multihead_attn),
    ):
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
def test_a_cross_block_is_torchs_decoder_layer(streams, norm, masks):
    x, memory, own, other = streams
    own = own if masks in ("own", "both") else None
    other = other if masks in ("other", "both") else None
    block = randomize(CrossBlock(WIDTH, HEADS, norm).double())
    layer = decoder_layer(block, norm)
    wanted = layer(
        x,
        memory,
        tgt_key_padding_mask=None if own is None else ~own,
        memory_key_padding_mask=None if other is None else ~other,
    )
    found, y = block(
        Residual(x), lambda attention, y: attention(y, y, own), lambda attention, y: attention(y, memory, other)
    )
    found = found + y if norm == "pre" else found
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_cross_encoder_is_its_blocks_in_turn(streams, norm):
    """With pre-norm, a last LayerNorm follows."""
    x, memory, own, other = streams
    encoder = randomize(CrossEncoder(WIDTH, HEADS, 3, norm).double())
    wanted = x
    for block in encoder.blocks:
        wanted = decoder_layer(block, norm)(wanted, memory, tgt_key_padding_mask=~own, memory_key_padding_mask=~other)
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


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_a_cross_encoder_ignores_masked_rows(streams, norm):
    x, memory, own, other = streams
    encoder = randomize(CrossEncoder(WIDTH, HEADS, 2, norm).double())
    wanted = encoder(x, memory, own, other)
    x, memory = x.clone(), memory.clone()
    x[~own] = 7.0
    memory[~other] = -9.0
    assert torch.equal(encoder(x, memory, own, other)[own], wanted[own])
