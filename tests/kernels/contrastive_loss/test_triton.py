"""Values of the contrastive terms: the interpreted kernels against formulas in float64, and against torch's draws."""

import importlib
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from mvlm_kernels import contrastive_loss, contrastive_terms, dispatch, explain, use_backend
from mvlm_kernels.contrastive_loss.cases import FORMS, case
from mvlm_kernels.contrastive_loss.noise import noise_key
from support.kernels.check import SETTINGS, check
from triton_proof.allocations import guarded

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.slow
@SETTINGS
@given(
    st.integers(1, 140), st.integers(0, 70), st.integers(1, 70), st.sampled_from(FLOATS), st.sampled_from(FORMS),
    st.booleans(), st.sampled_from([1, 1 << 13]),
)  # fmt: skip
def test_contrastive_kernels_for_any_shape(
    rows: int, more: int, width: int, dtype: torch.dtype, form: tuple[bool, bool, bool], unit: bool, logits: int
):
    """logits: those of a block, so that some have several blocks and some a last one that is cut."""
    bias, shared, draws = form
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    launchers = importlib.import_module("mvlm_kernels.contrastive_loss.triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launchers, "PARTIAL", logits)
        patch.setattr(launchers, "WRITTEN", 4 * logits)
        options: dict[str, Any] = {"width": width, "bias": bias, "shared_positives": shared, "draws": draws}
        check(case("", rows, rows + more, dtype, parameters, unit=unit, **options))


def pairs(number: int, width: int) -> dict[str, Tensor]:
    """Embeddings whose products are exact in float32, so that both backends have equal logits."""
    draw = torch.Generator().manual_seed(number)
    image, text = (torch.randint(-8, 9, (x, width), generator=draw) / 8 for x in (number, number + 37))
    ids = {name: torch.randint(0, number, (len(text),), generator=draw) for name in ("image_id", "text_id")}
    keys = torch.stack([noise_key(3, number, direction, image.device) for direction in (0, 1)])
    rows = torch.randperm(len(text), generator=draw)[:number]
    return {"image": image, "text": text, "log_scale": torch.zeros(1), "rows": rows, "noise_keys": keys, **ids}


def by_both(**given: Any) -> list[Any]:
    found = []
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found.append(contrastive_terms(**given))
    return found


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("number", [1, 61, 131, 300])
def test_draws_and_largest_logits_are_those_of_torch(number, shared):
    by_torch, found = by_both(**pairs(number, 24), shared_positives=shared)
    assert torch.equal(found.drawn, by_torch.drawn)
    assert torch.equal(found.column_drawn, by_torch.column_drawn)
    for name in ("column_score", "row_best", "column_best"):
        torch.testing.assert_close(getattr(found, name), getattr(by_torch, name), rtol=3e-7, atol=2e-6)
    right, wanted = (terms.row_best[0] == terms.row_best[1] for terms in (found, by_torch))
    assert torch.equal(right, wanted)  # whether a right pair is the largest, which accuracies count


def test_a_row_or_column_without_a_pair_to_draw_has_its_own_number():
    given = pairs(61, 5)
    given["image_id"] = torch.zeros_like(given["image_id"])
    by_torch, found = by_both(**given)
    assert torch.equal(found.drawn, given["rows"])
    assert torch.equal(found.column_drawn, torch.arange(98))
    assert torch.equal(found.column_score, by_torch.column_score)


def strided(x: Tensor) -> Tensor:
    """Equal values, of which no two are neighbours in memory."""
    wide = torch.stack([x, torch.full_like(x, 10**6)], -1)
    return guarded(wide)[..., 0]


def test_strides_do_not_change_the_terms_or_the_gradients():
    results = []
    for layout in (guarded, strided):
        given = {name: layout(x) for name, x in pairs(70, 24).items()}
        leaves = [given[name].requires_grad_() for name in ("image", "text", "log_scale")]
        with use_backend("triton"):
            terms = contrastive_terms(**given, shared_positives=True)
            incoming = [layout(torch.linspace(0, 1, len(x))) for x in terms[:2]]
            grads = torch.autograd.grad(terms[:2], leaves, incoming)
        results.append([*terms, *grads])
    for wanted, found in zip(*results, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype, precision, wanted", [
    (torch.bfloat16, "highest", "triton"), (torch.float16, "highest", "triton"), (torch.float32, "high", "triton"),
    (torch.float32, "highest", "torch"), (torch.float64, "high", "torch"),
])  # fmt: skip
def test_kernels_take_the_types_that_tensor_cores_multiply(dtype, precision, wanted, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    rows, before = torch.zeros(4, 8, dtype=dtype), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        for op in (contrastive_terms, contrastive_loss):
            assert explain(op, rows, rows, torch.zeros(1), as_if="sm_90").backend == wanted
    finally:
        torch.set_float32_matmul_precision(before)
