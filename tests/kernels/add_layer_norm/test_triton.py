"""Values of add_layer_norm: the interpreted kernels and the torch code against formulas in float64."""

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mvlm_kernels import add_layer_norm, dispatch, use_backend
from mvlm_kernels.add_layer_norm.cases import (
    ADALN,
    AFTER_BIAS,
    ALL,
    MODULATED,
    NORM,
    RMS_ADALN,
    Vectors,
    case,
)  # fmt: skip
from mvlm_kernels.case import Case, Inputs
from support.kernels.check import SETTINGS, check, results

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def of(rows: int, width: int, *types: Any, **options: Any) -> Case:
    return case(f"{rows}x{width}", (rows, width), *types, **options)


@pytest.mark.slow
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    "types",
    [
        (FP32, BF16, BF16, FP32),
        (FP32, FP16, BF16, FP32),
        (FP32, FP32, BF16, FP32),
        (BF16, BF16, BF16, BF16),
        (BF16, BF16, BF16, FP32),
        (FP32, None, BF16, FP32),
        (FP64, FP64, FP64, FP64),
    ],
    ids=str,
)
def test_types(types: Any, post_norm: bool):
    check(of(9, 96, *types, post_norm=post_norm))


@pytest.mark.slow
@pytest.mark.parametrize("width", [3, 7, 96, 192, 200, 384, 768, 1000])
def test_widths(width: int):
    check(of(5, width))
    check(of(5, width, vectors=AFTER_BIAS, post_norm=True))


@pytest.mark.slow
@SETTINGS
@given(st.integers(1, 40), st.integers(5, 130), st.booleans(), st.booleans(), st.sampled_from([BF16, FP32, None]))
def test_any_shape(rows: int, width: int, post_norm: bool, bias: bool, y: torch.dtype | None):
    check(of(rows, width, FP32, y, vectors=NORM if bias else AFTER_BIAS, post_norm=post_norm))


@pytest.mark.slow
def test_programs_walk_over_many_tiles(monkeypatch):
    """Two programs for eleven tiles."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(of(41, 768))
    check(of(41, 192, post_norm=True))


@pytest.mark.slow
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize(
    "types",
    [(FP32, BF16, BF16, FP32), (BF16, BF16, None, BF16), (FP16, FP16, None, FP32), (FP32, FP32, None, FP32)],
    ids=str,
)
@pytest.mark.parametrize("name", MODULATED)
def test_gates_scales_shifts_and_both_norms(name: str, types: Any, post_norm: bool):
    check(case(name, (3, 5, 72), *types, vectors=MODULATED[name], post_norm=post_norm))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 3, 2, 200), (5, 24), (1, 9, 40), (3, 1, 96), (2, 3, 1160)], ids=str)
def test_rows_of_samples_of_any_shape(shape: tuple[int, ...]):
    check(case("samples", shape, vectors=ALL))
    check(case("samples", shape, vectors=RMS_ADALN))


OF = ["", "samples", "channels"]
"""Gate, scale or shift: absent, one vector of each sample, or one of all."""
COMBINATIONS = list(itertools.product(
    ["", "weight", "weight bias", "bias"], ["layer", "rms"], [False, True], [False, True], OF, OF, OF
))  # fmt: skip


def check_combination(
    shape: tuple[int, ...], affine: str, kind: str, y_bias: bool, post_norm: bool, gate: str, scale: str, shift: str
) -> None:
    where = {"gate": gate, "scale": scale, "shift": shift}
    named = {which: " ".join(n for n, of in where.items() if of == which) for which in ("samples", "channels")}
    vectors = Vectors(affine, y_bias, **named, kind=kind)
    check(case("combined", shape, FP64, FP64, FP64, FP64, vectors, post_norm=post_norm))


@pytest.mark.slow
@SETTINGS
@given(st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(3, 70)), st.sampled_from(COMBINATIONS))
def test_any_shape_of_any_combination(shape: tuple[int, ...], combination: tuple[Any, ...]):
    check_combination(shape, *combination)


@pytest.mark.extended
@pytest.mark.slow
def test_every_combination_of_parts():
    for affine, kind, y_bias, post_norm, *vectors in COMBINATIONS:
        if not post_norm:  # which shares the code of all parts
            check_combination((2, 3, 7), affine, kind, y_bias, post_norm, *vectors)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 41, 192), (11, 3, 192)], ids=str)
def test_programs_share_the_rows_of_a_sample(shape: tuple[int, ...], monkeypatch):
    """Fewer samples than programs that run at once, and more."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda _: 1)
    check(case("few", shape, vectors=ADALN))


@pytest.mark.parametrize("tiles, groups, running", [(11, 1, 4), (128, 256, 396), (7, 3, 400), (1, 5, 2), (0, 4, 8)])
def test_no_other_number_of_programs_takes_fewer_steps(tiles: int, groups: int, running: int):
    """In a step each running program does one tile; a program starts when another one ends."""
    from mvlm_kernels.add_layer_norm.triton import programs_of_group

    def steps(n: int) -> int:
        return -(-groups * n // running) * -(-tiles // n)

    found = programs_of_group(tiles, groups, running)
    assert found <= tiles
    assert all(steps(found) <= steps(n) for n in range(1, running // groups + 8) if found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_samples_without_rows_have_zero_gradients(shape: tuple[int, ...], backend: Any):
    made = case("empty", shape, vectors=ALL)
    inputs = made.make("cpu")
    with use_backend(backend):
        stream, n = made.forward(inputs)
        (stream.sum() + n.sum()).backward()
    assert stream.shape == n.shape == shape
    assert all(t.grad is not None and not t.grad.any() for t in inputs.leaves.values())


@pytest.mark.slow
@pytest.mark.parametrize("used", ["stream", "normalised"])
@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_one_output_is_used(backend: Any, post_norm: bool, used: str):
    """The gradient is that of the other one's gradient being zero."""
    made, found = of(6, 12, FP64, BF16, None, FP64, post_norm=post_norm), []
    for both in (False, True):
        inputs = made.make("cpu")
        with use_backend(backend):
            stream, n = made.forward(inputs)
            one, other = (stream, n) if used == "stream" else (n, stream)
            ((one.double() ** 2).sum() + (0 * other.double().sum() if both else 0)).backward()
        found.append([torch.zeros_like(t) if t.grad is None else t.grad for t in inputs.leaves.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_rows_of_any_strides_and_repeats_give_the_same_bits():
    made = case("12x96", (3, 4, 96), vectors=ALL)
    draws = (torch.Generator().manual_seed(n) for n in (7, 8))
    inputs, grads = made.make("cpu"), [torch.randn(3, 4, 96, generator=draw) for draw in draws]
    strided = Inputs({name: torch.stack([x, x], dim=-1)[..., 0] for name, x in inputs.leaves.items()}, inputs.fixed)
    with use_backend("triton"):
        wanted, *others = (results(made.ours, given, grads) for given in (inputs, inputs, strided))
    for again in others:
        assert all(torch.equal(again[name], x) for name, x in wanted.items())


def test_a_single_row_without_other_dimensions():
    x, y, weight, bias, y_bias = made = [torch.randn(8, dtype=torch.float64, requires_grad=True) for _ in range(5)]
    flat = add_layer_norm(x, y, weight, bias, y_bias=y_bias)
    rows = add_layer_norm(x[None], y[None], weight, bias, y_bias=y_bias)
    for a, b in zip(flat, rows, strict=True):
        wanted = torch.autograd.grad(b.square().sum(), made, retain_graph=True, allow_unused=True)
        found = torch.autograd.grad(a.square().sum(), made, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
