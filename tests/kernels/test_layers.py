"""The ops as layers, against torch's own with the same state dict."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from mvlm_kernels import cross_attention, explain, gelu_linear
from mvlm_kernels.layers import AddLayerNorm, CrossAttention, GeluLinear


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


@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask", "is_causal", "need_weights", "dropout_p"])
def test_arguments_that_only_torchs_attention_or_the_layer_has_are_refused(name: str):
    given: dict[str, Any] = {name: None}
    with pytest.raises(TypeError, match=f"{name} is an argument of "):
        CrossAttention(32, 4)(torch.randn(2, 9, 32), **given)
    if name != "dropout_p":
        q = torch.randn(2, 9, 4, 8)
        for call in (cross_attention, partial(explain, cross_attention)):
            with pytest.raises(TypeError, match=f"{name} is an argument of "):
                call(q, q, q, **given)


def test_unknown_and_missing_arguments_name_the_op():
    q = torch.randn(2, 9, 4, 8)
    for wrong in (
        lambda: cross_attention(q, q, q, heads=4),  # type: ignore[call-overload]
        lambda: explain(cross_attention, q, q, q, heads=4),
        lambda: explain(cross_attention),
        lambda: explain(gelu_linear),
    ):
        with pytest.raises(TypeError, match=r"cross_attention|gelu_linear"):
            wrong()


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
        ({"kv_heads": 0}, "kv_heads must be an int in 1"),
        ({"dropout": 1.0}, r"dropout_p must be a float in \[0, 1\), got 1.0"),
    ],
)
def test_options_that_no_call_could_take_are_refused_when_a_layer_is_made(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        CrossAttention(32, 4, **options)


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


def test_rms_norm_and_modulated_norm_equal_torchs():
    """RMSNorm takes torch's state. AdaLN has no weights of its own, and gates, scales and shifts of each sample."""
    rms, ours = nn.RMSNorm(16, 1e-5), AddLayerNorm(16, kind="rms")
    nn.init.normal_(rms.weight)
    ours.load_state_dict(rms.state_dict())
    x, y = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(ours(x, y)[1], rms(x + y))
    adaptive = AddLayerNorm(16, elementwise_affine=False)
    assert not list(adaptive.parameters())
    gate, scale, shift = torch.randn(3, 2, 16)
    stream, normed = adaptive(x, y, gate=gate, scale=scale, shift=shift)
    torch.testing.assert_close(stream, x + gate[:, None] * y)
    plain = nn.functional.layer_norm(stream, (16,))
    torch.testing.assert_close(normed, plain * (1 + scale[:, None]) + shift[:, None])
    with pytest.raises(ValueError, match="kind"):
        AddLayerNorm(16, kind="group")  # pyright: ignore[reportArgumentType]
