"""Values and gradients of the interpreted cross-attention kernels and of the CPU paths, against the oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mvlm_kernels
from mvlm_kernels import cross_attention, dispatch
from mvlm_kernels.cross_attention.cases import SIDES, Shape
from support.kernels.attention import build, check_kernels, run
from support.kernels.check import check

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture
def many_multiprocessors(monkeypatch: pytest.MonkeyPatch):
    """A GPU so large that every grid is too small for it: all kernels split their work."""
    monkeypatch.setattr(dispatch, "multiprocessors", lambda device: 40)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("len_q, len_k", [(197, 32), (33, 577), (63, 64), (1, 2)])
def test_attention_kernels_for_types(dtype: torch.dtype, len_q: int, len_k: int):
    check_kernels(Shape(len_q=len_q, len_k=len_k, width=64, dtype=dtype, lengths=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [8, 16, 40, 64, 80, 104, 128])
@pytest.mark.parametrize("len_q, len_k", [(35, 19), (9, 131)])
def test_attention_kernels_for_head_widths(width: int, len_q: int, len_k: int):
    check_kernels(Shape(len_q=len_q, len_k=len_k, width=width, heads=2))


@pytest.mark.slow
@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
def test_attention_kernels_for_lengths_masks_indices_and_packing(case: Shape):
    check_kernels(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
@pytest.mark.usefixtures("many_multiprocessors")
def test_attention_kernels_with_split_work(case: Shape):
    check_kernels(replace(case, heads=2, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["packed-k", "packed-both", "packed-q", "long-packed-q", "long-packed-k"])
def test_attention_kernels_for_packed_rows_of_unknown_length(name: str):
    check_kernels(replace(SIDES[name], bounded=False, ids=torch.int64))


LENGTHS = st.sampled_from([2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128])


@pytest.mark.slow
@given(
    short=LENGTHS,
    long=st.sampled_from([2, 5, 15, 64, 65, 97, 129, 197]),
    short_keys=st.booleans(),
    width=st.sampled_from([32, 64, 80]),
    dtype=st.sampled_from(TYPES),
    batch=st.integers(1, 3),
    readers=st.integers(0, 4),
    lengths=st.booleans(),
    mask=st.booleans(),
    packed=st.sampled_from(["", "q", "k"]),
    layout=st.sampled_from(["contiguous", "strided", "expanded"]),
    splits=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_attention_kernels_for_any_case(
    short: int, long: int, short_keys: bool, width: int, dtype: torch.dtype, batch: int, readers: int, lengths: bool,
    mask: bool, packed: str, layout: Any, splits: bool, seed: int,
):  # fmt: skip
    packed_k = packed == "k"
    case = Shape(
        len_q=long if short_keys else short, len_k=short if short_keys else long, batch=batch, readers=readers,
        width=width, dtype=dtype, packed_q=packed == "q", packed_k=packed_k, lengths=lengths and not packed_k,
        mask=mask and not packed_k, layout=layout, seed=seed,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "multiprocessors", lambda device: 12 if splits else 1)
        check_kernels(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["both", "packed-index", "long-index", "long-packed-q"])
def test_attention_on_the_cpu_is_as_accurate_as_the_reference(name: str, dtype: torch.dtype):
    check(replace(SIDES[name], dtype=dtype, heads=3, layout="strided").case(name), backends=("torch",))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lengths", "index", "long-lengths", "long-index"])
@pytest.mark.usefixtures("many_multiprocessors")
def test_attention_kernels_are_bitwise_repeatable(name: str):
    call = build(SIDES[name])
    with mvlm_kernels.use_backend("triton"):
        first, second = (run(cross_attention, call, **call.bounds) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
