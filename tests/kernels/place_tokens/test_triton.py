"""Values of place_tokens: the interpreted kernels and the CPU's composition against a table of rows in float64."""

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import use_backend
from mvlm_kernels.place_tokens import place_tokens
from mvlm_kernels.place_tokens.cases import case, oracle
from support.kernels.check import SETTINGS, check
from triton_proof.allocations import guarded


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["all", "masked", "both", "visible"])
@pytest.mark.parametrize(
    "dtype, parameters",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_place_kernels_for_modes_and_types(mode: Any, dtype: torch.dtype, parameters: torch.dtype | None):
    check(case("", 17, 5, 130, mode, dtype, parameters, visible=2))  # batch and width past a tile


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(0, 5), st.integers(0, 7), st.sampled_from([1, 3, 65]),
    st.sampled_from(["all", "masked", "both", "visible"]),
    st.integers(0, 7), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
)  # fmt: skip
def test_place_kernels_for_any_shape(
    batch: int, patches: int, width: int, mode: Any, visible: int, share: float, dtype: torch.dtype, layout: str
):
    visible = min(visible, patches)
    check(case("", batch, patches, width, mode, dtype, visible=visible, share=share, layout=layout))


@pytest.mark.slow
def test_place_kernels_for_197_positions():
    check(case("", 2, 196, 24, "masked", torch.float32))
    check(case("", 2, 196, 24, "visible", torch.float32, visible=49))


def test_place_tokens_takes_parameters_as_timm_and_transformers_shape_them():
    inputs = case("", 2, 4, 3, "masked", torch.float32).make("cpu")
    tokens, mask_token, pos_embed, cls_token = leaves = inputs.leaves.values()
    out = place_tokens(tokens, mask_token[None, None], pos_embed[None], cls_token[None, None], **inputs.fixed)
    assert torch.equal(out, place_tokens(*leaves, **inputs.fixed))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_tokens_and_their_gradients_may_be_nan(dtype, backend):
    inputs, grad = case("", 2, 6, 5, "masked", dtype).make("cpu"), torch.randn(2, 7, 5).to(dtype)
    hidden, (tokens, *parameters) = inputs.fixed["masked"], inputs.leaves.values()
    grad[:, 1:][hidden] = torch.nan
    tokens = tokens.detach().masked_fill(hidden[..., None], torch.nan).requires_grad_()
    with use_backend(backend):
        out = place_tokens(tokens, *parameters, **inputs.fixed)
        (token_grad,) = torch.autograd.grad(out, tokens, grad)
    assert out.isfinite().all()
    assert torch.equal(token_grad[~hidden], grad[:, 1:][~hidden])
    assert not token_grad[hidden].any()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["masked", "both", "visible"])
@pytest.mark.parametrize("width", [1, 3, 64])
def test_place_tokens_on_the_cpu_sums_16_bits_in_float32(mode, width):
    """A sum of ones in bfloat16 would stop at 256."""
    inputs = case("", 3000, 3, width, mode, torch.bfloat16, visible=1).make("cpu")
    grad = 1 + torch.randn(6000 if mode == "both" else 3000, 4, width).bfloat16() / 8
    x: list[Any] = list(inputs.leaves.values())
    wide: list[Any] = [leaf.double() for leaf in x]
    got = torch.autograd.grad(place_tokens(*x, **inputs.fixed), x, grad)
    wanted = torch.autograd.grad(oracle(*wide, **inputs.fixed), wide, grad.double())
    for a, b in zip(got[1:], wanted[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=0)


def test_bad_visible_ids_on_a_gpu_touch_no_other_memory():
    launchers = importlib.import_module("mvlm_kernels.place_tokens.triton")
    inputs = case("", 1, 3, 4, "visible", torch.float32, visible=3).make("cpu")
    ids = torch.tensor([[1, -1, 3]])
    tokens, mask_token, pos_embed, cls_token = (guarded(x.detach()) for x in inputs.leaves.values())
    out = launchers.place_tokens(tokens, mask_token, pos_embed, cls_token, None, ids, False)
    assert torch.equal(out[0, 2], tokens[0, 0] + pos_embed[2])
    assert torch.equal(out[0, [1, 3]], mask_token + pos_embed[[1, 3]])
    launchers.place_tokens_backward(out, None, ids, False, 3, (torch.float32,) * 4, (True,) * 4)
