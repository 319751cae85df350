"""Compiled kernels on a CUDA device (`make test-gpu`), compared with the oracles of the interpreted kernels.

Three more things only a device can show: rounding to bfloat16, strides past 2^31, and checks of values in debug mode.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mvlm_kernels import cases, cross_attention, gather_patches, place_tokens, use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.cross_attention.cases import Shape
from support.kernels.attention import check_kernels
from support.kernels.check import check

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = [torch.bfloat16, torch.float16]
# Widths of heads have a test of their own. A GPU splits work by its own size.
LEFT_OUT = re.compile("/widths/|/splits$")
# All outputs of these ops are made by kernels of ours. Products of GELUs and of split layers are torch's.
CASES = {
    name: case
    for name, case in cases.emulated().items()
    if case.has_kernels and case.product is None and not LEFT_OUT.search(name)
}


@pytest.mark.parametrize("case", [pytest.param(case, id=name[:80]) for name, case in CASES.items()])
def test_emulated_cases(case: Case):
    check(case, DEVICE, compiled=True, backends=("triton",))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [8, 32, 40, 64, 72, 80, 96, 104, 128])
@pytest.mark.parametrize("short", [1, 16, 31, 64, 65, 128])
def test_attention_of_every_tile(width: int, short: int, dtype: torch.dtype):
    for len_q, len_k in ((197, short), (short, 197)):
        check_kernels(
            Shape(len_q=len_q, len_k=len_k, width=width, heads=2, batch=3, dtype=dtype, lengths=short > 1), DEVICE
        )


def test_attention_at_the_paper_size():
    check_kernels(Shape(len_q=197, len_k=40, width=64, heads=12, batch=32, dtype=torch.bfloat16, lengths=True), DEVICE)


BAD_VALUES: dict[str, Callable[[], Tensor]] = {
    "key_lengths": lambda: cross_attention(*attention_inputs(), key_lengths=on_device([7, 8])),
    "key_index": lambda: cross_attention(*attention_inputs(), key_index=on_device([0, 2])),
    "patch_ids": lambda: gather_patches(torch.rand(2, 3, 32, 32, device=DEVICE), on_device([[0], [4]]), 16),
    "visible_ids": lambda: place_tokens(
        *(torch.rand(s, device=DEVICE) for s in ((2, 1, 8), (8,), (5, 8), (8,))), visible_ids=on_device([[0], [4]])
    ),
}


def on_device(values: list[Any]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    q, k = (torch.randn(2, n, 2, 32, dtype=torch.bfloat16, device=DEVICE) for n in (9, 7))
    return q, k, k


@pytest.mark.parametrize("name", BAD_VALUES)
def test_debug_mode_refuses_bad_values(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
    with use_backend("triton"):
        BAD_VALUES[name]()  # reads nothing out of bounds and raises nothing
        torch.cuda.synchronize()
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", "1")
        with pytest.raises(ValueError, match=f"{name} must"):
            BAD_VALUES[name]()


def test_gather_patches_rounds_bfloat16_to_nearest_even():
    """Without mean and std a patch is its pixels, rounded once when it is stored."""
    ties = torch.tensor(
        [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 0.0, float("inf"), -float("inf"), 3.4e38, 1e-40, float("nan")]
    )
    images = torch.cat([ties, torch.randn(16 * 16 - len(ties))]).view(1, 1, 16, 16).to(DEVICE)
    with use_backend("triton"):
        got = gather_patches(images, None, 16, dtype=torch.bfloat16).flatten()
    wanted = images.flatten().bfloat16()
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.plain_empty
def test_kernels_read_strides_past_31_bits():
    """Views whose rows are more than 2^31 elements apart give the same as contiguous copies."""
    far = 2**31 + 64
    buffer = torch.zeros(far + 64 * 64 * 64, dtype=torch.bfloat16, device=DEVICE)
    shapes = {"q": (2, 40, 2, 64), "k": (2, 20, 2, 64)}
    views = {name: buffer.as_strided(s, (far, 128, 64, 1), i * 16384) for i, (name, s) in enumerate(shapes.items())}
    for view in views.values():
        view.copy_(torch.randn(view.shape))
    with use_backend("triton"):
        far_apart = cross_attention(views["q"], views["k"], views["k"])
        close = cross_attention(views["q"].contiguous(), views["k"].contiguous(), views["k"].contiguous())
        assert torch.equal(far_apart, close)
        pixels = buffer.view(torch.uint8).as_strided((2, 3, 32, 32), (2 * far, 1024, 32, 1))
        pixels.copy_(torch.randint(0, 256, pixels.shape, dtype=torch.uint8))
        assert torch.equal(gather_patches(pixels, None, 16), gather_patches(pixels.contiguous(), None, 16))
        tokens = views["q"].flatten(2)
        row, positions = torch.randn(128, device=DEVICE), torch.randn(41, 128, device=DEVICE)
        assert torch.equal(
            place_tokens(tokens, row, positions, row), place_tokens(tokens.contiguous(), row, positions, row)
        )
