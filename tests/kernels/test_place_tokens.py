"""place_tokens: the interpreted kernels against loops in float64, the op boundary, and bad input."""

import importlib

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from kernel_checks import assert_accurate, guarded
from patch_cases import SETTINGS, assert_caught, make_ids

from mvlm_kernels import dispatch, explain, use_backend
from mvlm_kernels.place_tokens import place_tokens

NAMES = "tokens", "mask token", "position", "cls token"


def random(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def case(batch, num_patches, width, mode, dtype=torch.float32, parameter_dtype=None, visible=0, share=0.5):
    """(the four tensors, keyword arguments)."""
    parameter_dtype = parameter_dtype or dtype
    inputs = [
        random((batch, visible if mode == "visible" else num_patches, width), dtype),
        random((width,), parameter_dtype, 1),
        random((1 + num_patches, width), parameter_dtype, 2),
        random((width,), parameter_dtype, 3),
    ]
    if mode == "masked":
        masked = torch.rand(batch, num_patches, generator=torch.Generator().manual_seed(4)) < share
        return inputs, {"masked": masked}
    if mode == "visible":
        return inputs, {"visible_ids": make_ids(batch, visible, num_patches, torch.int32)}
    return inputs, {}


def oracle(inputs, grad, masked=None, visible_ids=None):
    """(output, gradients of the four inputs) in float64, position by position."""
    tokens, mask_token, pos_embed, cls_token = (x.detach().double().numpy() for x in inputs)
    g = grad.double().numpy()
    out = np.zeros(g.shape)
    grads = [np.zeros(x.shape) for x in (tokens, mask_token, pos_embed, cls_token)]
    for b in range(g.shape[0]):
        out[b, 0] = cls_token + pos_embed[0]
        grads[3] += g[b, 0]
        grads[2] += g[b]
        for n in range(g.shape[1] - 1):
            row = n if masked is None or not masked[b, n] else None
            if visible_ids is not None:
                found = [k for k, i in enumerate(visible_ids[b].tolist()) if i == n]
                row = found[0] if found else None
            if row is None:
                out[b, 1 + n] = mask_token + pos_embed[1 + n]
                grads[1] += g[b, 1 + n]
            else:
                out[b, 1 + n] = tokens[b, row] + pos_embed[1 + n]
                grads[0][b, row] = g[b, 1 + n]
    return out, grads


def check(inputs, options, device="cpu"):
    results = {}
    shape = (inputs[0].shape[0], *inputs[2].shape)
    grad = random(shape, torch.float64, 5)
    for backend in ("triton", "torch"):
        at = device if backend == "triton" else "cpu"
        x = [guarded(i, at).requires_grad_() for i in inputs]
        with use_backend(backend):
            out = place_tokens(*x, **{name: guarded(value, at) for name, value in options.items()})
            grad = grad.to(out.dtype)
            out.backward(grad.to(at))
        results[backend] = [out.detach().cpu(), *(i.grad.cpu() for i in x if i.grad is not None)]
    out, grads = oracle(inputs, grad, **options)
    for name, got, same, want in zip(("out", *NAMES), results["triton"], results["torch"], (out, *grads), strict=True):
        assert_accurate(name, got, same, torch.from_numpy(want))


@pytest.mark.parametrize("mode", ["all", "masked", "visible"])
@pytest.mark.parametrize(
    "dtype, parameter_dtype",
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_modes_and_types(mode, dtype, parameter_dtype):
    check(*case(17, 5, 130, mode, dtype, parameter_dtype, visible=2))  # batch and width past a tile


@SETTINGS
@given(
    st.integers(0, 5), st.integers(0, 7), st.sampled_from([1, 3, 65]), st.sampled_from(["all", "masked", "visible"]),
    st.integers(0, 7), st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    st.sampled_from(["contiguous", "transposed", "expanded", "strided"]),
)  # fmt: skip
def test_any_shape(batch, num_patches, width, mode, visible, share, dtype, layout):
    inputs, options = case(batch, num_patches, width, mode, dtype, None, min(visible, num_patches), share)
    tokens = inputs[0]
    if layout == "transposed":  # what a conv patch embedding gives
        inputs[0] = tokens.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        inputs[0] = tokens[:1].expand_as(tokens)
        inputs[1], inputs[3] = inputs[1][:1].expand(width), inputs[3][:1].expand(width)
    elif layout == "strided":
        inputs = [torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in inputs]
    check(inputs, options)


def test_a_197_position_vit():
    check(*case(2, 196, 24, "masked"))
    check(*case(2, 196, 24, "visible", visible=49))


def test_parameters_as_timm_and_transformers_shape_them():
    inputs, options = case(2, 4, 3, "masked")
    tokens, mask_token, pos_embed, cls_token = inputs
    out = place_tokens(tokens, mask_token[None, None], pos_embed[None], cls_token[None, None], **options)
    assert torch.equal(out, place_tokens(*inputs, **options))


@pytest.mark.parametrize("mode", ["all", "masked", "visible"])
def test_gradcheck_through_the_kernels(mode):
    inputs, options = case(2, 3, 2, mode, torch.float64, visible=2)
    with use_backend("triton"):
        assert torch.autograd.gradcheck(
            lambda *x: place_tokens(*x, **options), [x.requires_grad_() for x in inputs], fast_mode=True
        )


@pytest.mark.parametrize("needs", [tuple(bool(i >> j & 1) for j in range(4)) for i in range(16)], ids=str)
def test_only_what_is_asked_for(needs):
    inputs, options = case(2, 2, 3, "masked")
    with use_backend("triton"):
        full = [x.clone().requires_grad_() for x in inputs]
        wanted = torch.autograd.grad(place_tokens(*full, **options).square().sum(), full)
        some = [x.clone().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        out = place_tokens(*some, **options)
        assert out.requires_grad == any(needs)
        if any(needs):
            out.square().sum().backward()
    for x, want, need in zip(some, wanted, needs, strict=True):
        assert (x.grad is not None) == need
        assert x.grad is None or torch.equal(x.grad, want)


def test_bad_visible_ids_on_a_gpu_touch_nothing():
    launchers = importlib.import_module("mvlm_kernels.place_tokens.triton")
    inputs, _ = case(1, 3, 4, "visible", visible=3)
    ids = torch.tensor([[1, -1, 3]])
    tokens, mask_token, pos_embed, cls_token = (guarded(x) for x in inputs)
    out = launchers.place_tokens(tokens, mask_token, pos_embed, cls_token, None, ids)
    assert torch.equal(out[0, 2], tokens[0, 0] + pos_embed[2])
    assert torch.equal(out[0, [1, 3]], mask_token + pos_embed[[1, 3]])
    launchers.place_tokens_backward(out, None, ids, 3, (torch.float32,) * 4, (True,) * 4)


def test_two_runs_agree_bit_for_bit():
    inputs, options = case(5, 3, 8, "masked")
    x = [i.requires_grad_() for i in inputs]
    with use_backend("triton"):
        runs = []
        for _ in range(2):
            out = place_tokens(*x, **options)
            runs.append((out, *torch.autograd.grad(out.square().sum(), x)))
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.plain_empty
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    with use_backend(backend):
        for mode in ("masked", "visible"):
            inputs, options = case(2, 3, 4, mode, visible=2)
            args = [x.requires_grad_() for x in inputs] + [options.get("masked"), options.get("visible_ids")]
            torch.library.opcheck(torch.ops.mvlm_kernels.place_tokens.default, tuple(args))


@pytest.mark.plain_empty
def test_compiles_without_a_break_for_any_size():
    compiled = torch.compile(place_tokens, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, num_patches in ((2, 3), (3, 5)):
        inputs, options = case(batch, num_patches, 4, "masked")
        x = [i.requires_grad_() for i in inputs]
        with use_backend("triton"):
            got, want = compiled(*x, **options), place_tokens(*x, **options)
            grads = [torch.autograd.grad(out.square().sum(), x) for out in (got, want)]
        assert torch.equal(got, want)
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


TOKENS, TOKEN, POS = torch.zeros(2, 3, 4), torch.zeros(4), torch.zeros(4, 4)
IDS = torch.tensor([[0, 1, 2], [0, 1, 2]])


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((TOKENS[0], TOKEN, POS, TOKEN), {}, r"tokens must have shape \(B, N, C\), got \(3, 4\)"),
        ((TOKENS, TOKEN[:3], POS, TOKEN), {}, r"mask_token must have shape \(4,\) or \(1, 1, 4\), got \(3,\)"),
        ((TOKENS, TOKEN, POS, TOKEN[None]), {}, r"cls_token must have shape \(4,\) or \(1, 1, 4\), got \(1, 4\)"),
        ((TOKENS, TOKEN, POS[:, :3], TOKEN), {}, r"pos_embed must have shape \(1\+N, 4\) .*, got \(4, 3\)"),
        ((TOKENS, TOKEN, POS[:3], TOKEN), {}, r"tokens must have N = 2 rows, .*, got \(2, 3, 4\)"),
        ((TOKENS.int(), TOKEN, POS, TOKEN), {}, "tokens must be float16, .*, got torch.int32"),
        ((TOKENS, TOKEN.to("meta"), POS, TOKEN), {}, "mask_token must be on the device"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": torch.zeros(2, 2).bool()}, r"masked must be bool of shape \(2, 3\)"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": torch.zeros(2, 3)}, "masked must be bool of shape .* torch.float32"),
        ((TOKENS, TOKEN, POS, TOKEN), {"masked": IDS.bool(), "visible_ids": IDS}, "masked must be None where visible"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS[:, :2]}, "visible_ids must have one id for each of the 3"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS.float()}, "visible_ids must be int32 or int64, got"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS + 1}, r"visible_ids must be in \[0, 3\), got .* \[1, 3\]"),
        ((TOKENS, TOKEN, POS, TOKEN), {"visible_ids": IDS * 0}, "visible_ids must be distinct within a row, got 0"),
    ],
)
def test_bad_input_says_what_was_wanted(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        place_tokens(*args, **kwargs)


def test_explain():
    assert explain(place_tokens, TOKENS, TOKEN, POS, TOKEN).reasons == ("the tensors are on the CPU",)


def test_launchers_never_look_at_values():
    launched = []
    with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        for _, launch in importlib.import_module("mvlm_kernels.place_tokens.triton").aot_cases():
            launch()  # meta tensors: reading one on the host would raise
    assert {"place_kernel", "place_backward_kernel", "column_sum_kernel", "inverse_kernel"} <= set(launched)


MUTANTS = [
    ("source = tl.where(masked != 0, -1, n.to(tl.int32))", "source = tl.where(masked == 0, -1, n.to(tl.int32))"),
    ("y = tl.where(keep, x, fill[None, :])", "y = tl.where(keep, x, 0.0)"),
    ("+ embedding[None, :]", "+ 0 * embedding[None, :]"),
    ("tl.where(keep, g, 0.0), tokens_grad_ptr", "g, tokens_grad_ptr"),
    ("total += g", "total = g"),
    ("written = inside & keep", "written = inside"),
    ("tl.store(mask_partial_ptr + (position - 1) * C + c", "tl.store(mask_partial_ptr + position * C + c"),
    ("for start in range(0, N, BLOCK_N):", "for start in range(0, N - 1, BLOCK_N):"),
]  # fmt: skip


def exercise():
    check(*case(17, 1, 3, "masked"))
    check(*case(17, 3, 3, "visible", visible=2))


@pytest.mark.parametrize("old, new", MUTANTS, ids=[new[:40] for _, new in MUTANTS])
def test_a_broken_kernel_is_caught(old, new, tmp_path, poison):
    assert_caught("mvlm_kernels.place_tokens.triton", old, new, tmp_path, poison, exercise)


def test_the_whole_kernels_pass_what_the_broken_ones_fail():
    exercise()
