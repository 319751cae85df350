"""The ops as layers, against torch's own with the same state dict."""

from typing import Any

import pytest
import torch
from torch import nn

from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear, PatchEmbed, PixelLoss, PlaceTokens


@pytest.mark.parametrize("kdim", [None, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_cross_attention_from_torch_equals_it(kdim: int | None, bias: bool):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, bias=bias, kdim=kdim, vdim=kdim, batch_first=True).double()
    x, context = torch.randn(2, 9, 32).double(), torch.randn(2, 5, kdim or 32).double()
    exists = torch.tensor([[True] * 5, [True, True, False, False, False]])
    wanted, _ = theirs(x, context, context, key_padding_mask=~exists)
    ours = CrossAttention.from_torch(theirs)
    torch.testing.assert_close(ours(x, context, key_mask=exists), wanted)
    copied = CrossAttention(32, 4, context_width=kdim, bias=bias).double()
    copied.load_state_dict(ours.state_dict())
    torch.testing.assert_close(copied(x, context, key_mask=exists), wanted)


def test_attention_that_cannot_be_copied_is_refused():
    with pytest.raises(ValueError, match="attention must have no add_bias_kv"):
        CrossAttention.from_torch(nn.MultiheadAttention(32, 4, add_bias_kv=True))
    with pytest.raises(ValueError, match=r"attention must be an nn\.MultiheadAttention, got Linear"):
        CrossAttention.from_torch(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="width must be divisible by heads, got 32 and 3"):
        CrossAttention(32, 3)


@pytest.mark.parametrize(
    "name, instead",
    [
        ("key_padding_mask", "pass key_mask=~key_padding_mask"),
        ("attn_mask", "use scaled_dot_product_attention"),
        ("is_causal", "use scaled_dot_product_attention"),
        ("need_weights", "mvlm_kernels.attention_probabilities"),
    ],
)
def test_arguments_of_torchs_attention_are_refused_with_what_to_pass_instead(name: str, instead: str):
    x = torch.randn(2, 9, 32)
    with pytest.raises(TypeError, match=f"{name} is an argument of nn.MultiheadAttention: .*{instead}"):
        CrossAttention(32, 4)(x, **{name: None})


def test_options_of_the_op_that_the_layer_passes_are_refused():
    layer, x = CrossAttention(32, 4), torch.randn(2, 9, 32)
    for name, own in (("dropout_p", "dropout"),):
        with pytest.raises(
            TypeError, match=rf"{name} is an argument of the layer: CrossAttention\(\.\.\., {own}=\.\.\.\)"
        ):
            layer(x, **{name: 0.5})


def test_log_sum_exp_of_the_layer():
    layer, x = CrossAttention(32, 4), torch.randn(2, 9, 32)
    out, lse = layer(x, return_lse=True)
    torch.testing.assert_close(out, layer(x))
    q, k = (linear(x).unflatten(-1, (4, 8)) for linear in (layer.q, layer.k))
    torch.testing.assert_close(lse, (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).logsumexp(-1))
    torch.testing.assert_close(layer(x, return_lse=False), layer(x))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kv_heads": 3}, "kv_heads must divide the 4 heads, got 3"),
        ({"kv_heads": 0}, "kv_heads must divide the 4 heads, got 0"),
        ({"dropout": 1.0}, r"dropout_p must be a float in \[0, 1\), got 1.0"),
    ],
)
def test_options_that_no_call_could_take_are_refused_when_a_layer_is_made(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CrossAttention(32, 4, **options)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got \(1, 4, 8, 8\)"):
        PatchEmbed(3, 16, 8)(torch.rand(1, 4, 8, 8))


def test_dropout_of_the_layer_is_for_training_alone():
    layer = CrossAttention(32, 4, kv_heads=2, dropout=0.5)
    assert "kv_heads=2, dropout=0.5" in repr(layer)
    x = torch.randn(2, 9, 32)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x, seed=1), layer(x, seed=1))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_norm_and_feed_forward_take_the_state_of_torchs():
    norm, linear = nn.LayerNorm(16), nn.Linear(16, 8)
    nn.init.normal_(norm.weight)
    ours, gelu = AddLayerNorm(16), GeluLinear(16, 8)
    ours.load_state_dict(norm.state_dict())
    gelu.load_state_dict(linear.state_dict())
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    stream, normed = ours(x, y)
    torch.testing.assert_close(stream, x + y)
    torch.testing.assert_close(normed, norm(x + y))
    torch.testing.assert_close(gelu(normed), linear(nn.functional.gelu(normed)))
    post = AddLayerNorm(16, post_norm=True)
    torch.testing.assert_close(post(x, y)[0], nn.functional.layer_norm(x + y, (16,)))


def test_dropout_in_place_after_the_second_half_of_a_feed_forward_layer():
    layers = nn.Sequential(nn.Linear(8, 16), GeluLinear(16, 8), nn.Dropout(0.1, inplace=True))
    layers(torch.randn(2, 5, 8)).sum().backward()
    assert all(x.grad is not None for x in layers.parameters())


def test_patches_and_pixels_take_the_state_of_torchs():
    images, ids = torch.rand(2, 3, 16, 24), torch.tensor([[0, 5], [3, 2]])
    conv = nn.Conv2d(3, 12, 8, 8)
    embed = PatchEmbed(3, 12, 8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    embed.load_state_dict(conv.state_dict())
    normal = (images - torch.tensor(embed.mean)[:, None, None]) / torch.tensor(embed.std)[:, None, None]
    wanted = conv(normal).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), wanted)
    torch.testing.assert_close(embed(images, ids), wanted[torch.arange(2)[:, None], ids])

    head = nn.Linear(12, 192)
    loss = PixelLoss(12, 8, kind="mse")
    loss.load_state_dict(head.state_dict())
    patches = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)[torch.arange(2)[:, None], ids]
    hidden = torch.randn(2, 2, 12)
    torch.testing.assert_close(loss(hidden, images, ids), nn.functional.mse_loss(head(hidden), patches))


def test_tokens_are_placed_by_parameters():
    layer, tokens = PlaceTokens(6, 16), torch.randn(2, 6, 16)
    masked = torch.rand(2, 6) < 0.5
    wanted = torch.where(masked[:, :, None], layer.mask_token, tokens) + layer.pos_embed[1:]
    out = layer(tokens, masked=masked)
    torch.testing.assert_close(out[:, 1:], wanted)
    torch.testing.assert_close(out[:, 0], (layer.cls_token + layer.pos_embed[0]).expand(2, -1))
    assert set(layer.state_dict()) == {"mask_token", "cls_token", "pos_embed"}
    with torch.device("meta"):
        sharded = PlaceTokens(6, 16)
    sharded.to_empty(device="cpu").reset_parameters()
    assert all(0 < x.abs().max() < 0.1 for x in sharded.parameters())
