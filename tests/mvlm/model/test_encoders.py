# torch and transformers type the children of a module as Tensor or Module, whatever they are.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportGeneralTypeIssues=false
"""The encoders against timm's ViT, transformers' RoBERTa and torch's decoder layers with the weights copied over.

The grid of patches against loops. All in float64.
"""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from mvlm.model.attention import Residual
from mvlm.model.encoders import (
    CrossBlock,
    CrossEncoder,
    ImageEncoder,
    TextEncoder,
    masked_patches,
    patchify,
    sine_positions,
    unpatchify,
    visible_patches,
)
from mvlm.model.packing import PackedText, Packing
from support.models import micro_batch, micro_config, normal


def randomize(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=100 + seed))
    return module


def copy(ours: nn.Module, theirs: nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


def test_the_image_encoder_is_timms_vit():
    from timm.models.vision_transformer import VisionTransformer

    config = micro_config(image_layers=3)
    theirs = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.image_layers,
        num_heads=config.heads,
        num_classes=0,
    )
    theirs = randomize(theirs.double())
    ours = ImageEncoder(config).double()
    with torch.no_grad():
        ours.patch_projection.weight.copy_(theirs.patch_embed.proj.weight.flatten(1))
        ours.patch_projection.bias.copy_(theirs.patch_embed.proj.bias)
        ours.cls_token.copy_(theirs.cls_token[0, 0])
        ours.position.copy_(theirs.pos_embed[0])
        copy(ours.norm, theirs.norm)
        for block, other in zip(ours.blocks, theirs.blocks, strict=True):
            parts = (block.attention.query, block.attention.key, block.attention.value)
            for part, weight, bias in zip(
                parts, other.attn.qkv.weight.chunk(3), other.attn.qkv.bias.chunk(3), strict=True
            ):
                part.weight.copy_(weight)
                part.bias.copy_(bias)
            copy(block.attention.out, other.attn.proj)
            copy(block.norm1, other.norm1)
            copy(block.norm2, other.norm2)
            copy(block.mlp.up, other.mlp.fc1)
            copy(block.mlp.down, other.mlp.fc2)

    images = micro_batch()[0].images
    mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (config.image_mean, config.image_std))
    wanted = theirs.forward_features((images.double() / 255 - mean) / std)
    assert wanted.shape == (5, 17, config.width)
    torch.testing.assert_close(ours(images), wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("drop_masked", [False, True])
def test_output_positions_are_added_to_the_features_of_patches(drop_masked):
    config = micro_config(drop_masked=drop_masked)
    usual = randomize(ImageEncoder(config).double())
    placed = ImageEncoder(replace(config, output_positions=True)).double()
    placed.load_state_dict(usual.state_dict())  # no weights of their own
    images = micro_batch()[0].images
    if drop_masked:
        visible = torch.tensor([[0, 3, 5]]).expand(len(images), -1)
        added = placed.forward_visible(images, visible) - usual.forward_visible(images, visible)
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
    found = encoder.forward_visible(images, torch.zeros(len(images), 0, dtype=torch.int64))
    first, others = encoder.position[0], encoder.position[1:]
    alone = (encoder.cls_token + first).expand(len(images), 1, -1)
    encoded = encoder.run(alone, lambda attention, x: attention(x, x)) + first
    torch.testing.assert_close(found[:, :1], encoded)
    torch.testing.assert_close(found[:, 1:], (encoder.mask_token + others).expand(len(images), -1, -1))


def test_the_text_encoder_is_transformers_roberta():
    """With padding. RoBERTa's positions begin at 2, after its pad id 1; its one token type adds a constant."""
    from transformers import RobertaConfig, RobertaModel

    config = micro_config(text_layers=3)
    theirs = RobertaModel(
        RobertaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.text_length + 2,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=1,
        ),
        add_pooling_layer=False,
    )
    theirs = randomize(theirs.double().eval())
    ours = TextEncoder(config).double()
    with torch.no_grad():
        embeddings = theirs.embeddings
        ours.words.weight.copy_(embeddings.word_embeddings.weight)
        ours.position.copy_(embeddings.position_embeddings.weight[2:] + embeddings.token_type_embeddings.weight[0])
        copy(ours.norm, embeddings.LayerNorm)
        for block, other in zip(ours.blocks, theirs.encoder.layer, strict=True):
            copy(block.attention.query, other.attention.self.query)
            copy(block.attention.key, other.attention.self.key)
            copy(block.attention.value, other.attention.self.value)
            copy(block.attention.out, other.attention.output.dense)
            copy(block.norm1, other.attention.output.LayerNorm)
            copy(block.mlp.up, other.intermediate.dense)
            copy(block.mlp.down, other.output.dense)
            copy(block.norm2, other.output.LayerNorm)

    batch, _ = micro_batch()
    padded = torch.ones(5, 12, dtype=torch.int64)  # 1 is RoBERTa's padding
    for row, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        padded[row, : end - start] = batch.tokens[start:end]
    packing = Packing(batch.cu_seqlens, batch.max_length, len(batch.tokens))
    key_mask = packing.key_mask
    with torch.no_grad():
        wanted = theirs(input_ids=padded, attention_mask=key_mask.long()).last_hidden_state
        found = ours(batch.tokens, packing)
    assert key_mask.sum(1).tolist() == [7, 4, 12, 3, 9]
    torch.testing.assert_close(found, wanted[key_mask], rtol=0, atol=1e-10)
    padded_text, text_mask = PackedText(found, packing).padded()
    assert text_mask.equal(key_mask)
    assert padded_text[key_mask].equal(found)
    assert (padded_text[~key_mask] == 0).all()


def test_the_image_encoder_replaces_masked_patches_with_the_mask_token():
    """The result equals that for an image whose patch, once projected, is the mask token."""
    encoder = randomize(ImageEncoder(micro_config()).double())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 5] = masked[1, 0] = masked[1, 15] = True
    patches = patchify(encoder.normalize(images), 8)
    weight, bias = encoder.patch_projection.weight, encoder.patch_projection.bias
    solution = torch.linalg.lstsq(weight, (encoder.mask_token - bias)[:, None]).solution[:, 0]
    patches[masked] = solution.detach()
    std, mean = (torch.tensor(v).double().view(3, 1, 1) for v in ((0.5, 0.25, 0.2), (0.5, 0.4, 0.3)))
    replaced = unpatchify(patches, 8) * std + mean
    torch.testing.assert_close(encoder(images, masked), encoder(replaced), rtol=0, atol=1e-10)


def test_the_image_encoder_takes_bytes_and_floats_alike():
    encoder = ImageEncoder(micro_config()).double()
    images = micro_batch()[0].images
    found = encoder.normalize(images)
    assert found.dtype == torch.float64
    assert torch.equal(encoder.normalize(images.double() / 255), found)
    for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.5, 0.25, 0.2), strict=True)):
        wanted = (images[1, channel, 3, 20].item() / 255 - mean) / std
        assert found[1, channel, 3, 20].item() == pytest.approx(wanted, abs=1e-6)  # mean and std are made in fp32


def test_masked_patches_against_a_loop():
    ids = torch.tensor([[0, 3, 5], [1, 2, 8], [6, 7, 8]])
    mask = masked_patches(ids, 9)
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 9)
    for row in range(3):
        for patch in range(9):
            assert bool(mask[row, patch]) == (patch in ids[row].tolist())


def test_visible_patches_are_the_others():
    patch_ids = torch.tensor([[0, 3, 4], [1, 2, 8]])
    assert visible_patches(patch_ids, 9).tolist() == [[1, 2, 5, 6, 7, 8], [0, 3, 4, 5, 6, 7]]


def test_patchify_against_loops():
    images = normal(2, 3, 12, 12)
    rows = patchify(images, 4)
    assert rows.shape == (2, 9, 48)
    for b in range(2):
        for patch in range(9):
            top, left = patch // 3 * 4, patch % 3 * 4
            wanted = [images[b, c, top + y, left + x] for c in range(3) for y in range(4) for x in range(4)]
            assert rows[b, patch].tolist() == wanted


def test_patchify_has_the_order_of_a_convolutions_weight():
    images, convolution = normal(2, 3, 12, 12), nn.Conv2d(3, 5, 4, stride=4).double()
    assert convolution.bias is not None
    wanted = convolution(images).flatten(2).transpose(1, 2)
    found = patchify(images, 4) @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_unpatchify_is_the_inverse_of_patchify():
    images = normal(2, 3, 20, 20)
    assert torch.equal(unpatchify(patchify(images, 4), 4), images)
    patches = normal(2, 25, 48, seed=1)
    assert torch.equal(patchify(unpatchify(patches, 4), 4), patches)


def test_sine_positions_against_loops():
    side, width = 3, 16
    found = sine_positions(side, width)
    assert found.shape == (9, 16)
    assert found.dtype == torch.float32
    for patch in range(9):
        wanted = []
        for cell in (patch % 3, patch // 3):  # column, row
            coordinate = 2 * math.pi * (cell + 0.5) / side
            for wave in (math.sin, math.cos):
                wanted += [wave(coordinate / 10_000 ** (i / 4)) for i in range(4)]
        assert found[patch].tolist() == pytest.approx(wanted, abs=1e-7)


def test_sine_positions_are_those_of_places_whatever_the_grid():
    coarse, fine = sine_positions(2, 32).reshape(2, 2, 32), sine_positions(6, 32).reshape(6, 6, 32)
    torch.testing.assert_close(fine[1::3, 1::3], coarse)  # of three cells in a row the middle one has the same centre


def test_sine_positions_need_a_width_that_four_divides():
    with pytest.raises(ValueError, match="width: wanted a multiple of 4, got 30"):
        sine_positions(3, 30)


WIDTH, HEADS = 12, 3


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
