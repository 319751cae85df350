"""Values of place_tokens: the interpreted kernels and the CPU's composition against loops in float64."""

import importlib

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.place_tokens import place_tokens
from support.kernels.patches import SETTINGS
from support.kernels.pixel_losses import random
from support.kernels.token_placement import case, check_placement, oracle
from triton_proof.allocations import guarded


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "masked", "both", "visible"])
@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_place_kernels_for_modes_and_types(mode, dtype, parameter_dtype):
    check_placement(*case(17, 5, 130, mode, dtype, parameter_dtype, visible=2))  # batch and width past a tile


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 5), st.integers(0, 7), st.sampled_from([1, 3, 65]),
    st.sampled_from(["all", "masked", "both", "visible"]),
    st.integers(0, 7), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
)  # fmt: skip
def test_place_kernels_for_any_shape(batch, num_patches, width, mode, visible, share, dtype, layout):
    inputs, options = case(batch, num_patches, width, mode, dtype, None, min(visible, num_patches), share)
    sequences = 2 * batch if mode == "both" else batch
    tokens, grad = inputs[0], random((sequences, 1 + num_patches, width), torch.float64, 5)
    if layout == "transposed":  # as a conv patch embedding returns them
        inputs[0] = tokens.transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        inputs[0] = tokens[:1].expand_as(tokens)
        inputs[1], inputs[3] = inputs[1][:1].expand(width), inputs[3][:1].expand(width)
        grad = grad[:, :1, :1].expand_as(grad)  # of a sum
    elif layout == "strided":
        *inputs, grad = (torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in (*inputs, grad))
    check_placement(inputs, options, grad=grad)


@pytest.mark.slow
def test_place_kernels_for_197_positions():
    check_placement(*case(2, 196, 24, "masked"))
    check_placement(*case(2, 196, 24, "visible", visible=49))


def test_place_tokens_takes_parameters_as_timm_and_transformers_shape_them():
    inputs, options = case(2, 4, 3, "masked")
    tokens, mask_token, pos_embed, cls_token = inputs
    out = place_tokens(tokens, mask_token[None, None], pos_embed[None], cls_token[None, None], **options)
    assert torch.equal(out, place_tokens(*inputs, **options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_and_their_gradients_may_be_nan(dtype, backend):
    (tokens, *parameters), options = case(2, 6, 5, "masked", dtype)
    hidden, grad = options["masked"], random((2, 7, 5), dtype, 5)
    tokens[hidden] = torch.nan
    grad[:, 1:][hidden] = torch.nan
    tokens.requires_grad_()
    with use_backend(backend):
        out = place_tokens(tokens, *parameters, **options)
        (token_grad,) = torch.autograd.grad(out, tokens, grad)
    assert out.isfinite().all()
    assert torch.equal(token_grad[~hidden], grad[:, 1:][~hidden])
    assert not token_grad[hidden].any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["masked", "both", "visible"])
@pytest.mark.parametrize("width", [1, 3, 64])
def test_place_tokens_on_the_cpu_sums_16_bits_in_float32(mode, width):
    """A sum of ones in bfloat16 would stop at 256."""
    inputs, options = case(3000, 3, width, mode, torch.bfloat16, visible=1)
    grad = 1 + random((6000 if mode == "both" else 3000, 4, width), torch.bfloat16, 5) / 8
    x = [i.requires_grad_() for i in inputs]
    got = torch.autograd.grad(place_tokens(*x, **options), x, grad)
    for a, b in zip(got[1:], oracle(inputs, grad, **options)[1][1:], strict=True):
        torch.testing.assert_close(a.double(), torch.from_numpy(b), rtol=2**-8, atol=0)


def test_bad_visible_ids_on_a_gpu_touch_no_other_memory():
    launchers = importlib.import_module("mvlm_kernels.place_tokens.triton")
    inputs, _ = case(1, 3, 4, "visible", visible=3)
    ids = torch.tensor([[1, -1, 3]])
    tokens, mask_token, pos_embed, cls_token = (guarded(x) for x in inputs)
    out = launchers.place_tokens(tokens, mask_token, pos_embed, cls_token, None, ids, False)
    assert torch.equal(out[0, 2], tokens[0, 0] + pos_embed[2])
    assert torch.equal(out[0, [1, 3]], mask_token + pos_embed[[1, 3]])
    launchers.place_tokens_backward(out, None, ids, False, 3, (torch.float32,) * 4, (True,) * 4)
