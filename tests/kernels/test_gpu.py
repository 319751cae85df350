"""The GPU lane, `make test-gpu`: compiled kernels on a CUDA device, held to the oracles of the interpreted ones.

What only a device shows is here too: the same bits in a thousand backward passes, rounding to bfloat16, strides past
2^31, capture in a CUDA graph, and no synchronisation.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pixel_loss_checks
import pytest
import test_patch_gather
import test_place_tokens as placing
import torch
from attention_cases import Case, build, check, moved
from patch_cases import LAYOUTS, MEAN, STD, make_ids, make_images
from test_cross_attention import SIDES
from torch import Tensor

from mvlm_kernels import (
    cross_attention,
    gather_patches,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    use_backend,
)

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = [torch.bfloat16, torch.float16]
REPEATS = 1000


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", SIDES.values(), ids=SIDES.keys())
def test_attention_with_lengths_masks_indices_and_packing(case: Case, dtype: torch.dtype):
    check(replace(case, dtype=dtype, width=64, heads=3), DEVICE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("width", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("short", [1, 16, 31, 64, 65, 128])
def test_attention_of_every_tile(width: int, short: int, dtype: torch.dtype):
    for len_q, len_k in ((197, short), (short, 197)):
        check(Case(len_q=len_q, len_k=len_k, width=width, heads=2, batch=3, dtype=dtype, lengths=short > 1), DEVICE)


@pytest.mark.parametrize("layout", ["strided", "expanded"])
def test_attention_of_views(layout: str):
    check(Case(len_q=197, len_k=33, width=64, heads=2, dtype=torch.bfloat16, layout=layout), DEVICE)


def test_attention_at_the_paper_size():
    check(Case(len_q=197, len_k=40, width=64, heads=12, batch=32, dtype=torch.bfloat16, lengths=True), DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, *HALVES], ids=str)
def test_gather_patches(dtype: torch.dtype, layout: str):
    for patch in (7, 16):
        images = make_images((2, 3, 2 * patch, 3 * patch), dtype, layout)
        test_patch_gather.check(images, make_ids(2, 4, 6, torch.int32), patch, MEAN[:3], STD[:3], device=DEVICE)


@pytest.mark.parametrize("kind", pixel_loss_checks.KINDS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_pixel_losses(kind: str, normalize: bool, reduction: str):
    images, ids = make_images((2, 3, 32, 48), torch.uint8, "channels_last"), make_ids(2, 4, 6)
    options = {"kind": kind, "normalize": normalize, "reduction": reduction, "device": DEVICE}
    random = pixel_loss_checks.random
    for dtype in HALVES:
        pixel_loss_checks.check_masked(random((2, 4, 768), dtype), images, ids, 16, MEAN[:3], STD[:3], **options)
        hidden, weight, bias = (random(s, dtype, i, 0.05) for i, s in enumerate([(2, 4, 96), (768, 96), (768,)]))
        pixel_loss_checks.check_linear(hidden, weight, bias, images, ids, 16, MEAN[:3], STD[:3], **options)


@pytest.mark.parametrize("mode", ["all", "masked", "visible"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_place_tokens(mode: str, dtype: torch.dtype):
    inputs, options = placing.case(17, 50, 768, mode, dtype, visible=13)
    placing.check(inputs, options, DEVICE)


def steps() -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every op at a working size: (name, a call that returns outputs and gradients)."""

    def attention(case: Case) -> Callable[[], list[Tensor]]:
        call = moved(build(case), DEVICE)

        def step() -> list[Tensor]:
            leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
            out = cross_attention(leaves[0], leaves[1], leaves[2], **call.kwargs, **call.bounds)
            return [out, *torch.autograd.grad(out, leaves, call.grad)]

        return step

    big = {"width": 64, "heads": 12, "dtype": torch.bfloat16}
    yield "short keys", attention(Case(len_q=197, len_k=40, batch=16, lengths=True, **big))
    yield "short queries", attention(Case(len_q=40, len_k=197, batch=16, **big))
    yield "split grids", attention(Case(len_q=40, len_k=577, batch=1, **big))
    yield "short keys, index", attention(Case(len_q=197, len_k=40, batch=4, readers=32, lengths=True, **big))
    yield "long keys, index", attention(Case(len_q=40, len_k=197, batch=4, readers=32, **big))
    yield "packed queries", attention(Case(len_q=40, len_k=197, batch=16, packed_q=True, **big))

    images = torch.randint(0, 256, (8, 3, 224, 224), dtype=torch.uint8, device=DEVICE)
    ids = make_ids(8, 116, 196, torch.int32).to(DEVICE)
    hidden, weight, bias = (
        torch.randn(s, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        for s in ((8, 116, 768), (768, 768), (768,))
    )
    tokens, row, positions = (
        torch.randn(s, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
        for s in ((8, 196, 768), (768,), (197, 768))
    )
    masked = torch.rand(8, 196, device=DEVICE) < 0.6
    floats = torch.rand(8, 3, 224, 224, device=DEVICE).requires_grad_()
    norm: Any = {"mean": MEAN[:3], "std": STD[:3]}

    def with_grads(leaves: list[Tensor], call: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
        def step() -> list[Tensor]:
            out = call()
            return [out, *torch.autograd.grad(out, leaves, torch.ones_like(out))]

        return step

    yield "gather_patches", with_grads([floats], lambda: gather_patches(floats, ids, 16, **norm))
    yield "masked_pixel_loss", with_grads([hidden], lambda: masked_pixel_loss(hidden, images, ids, 16, **norm))
    yield (
        "linear_pixel_loss",
        with_grads([hidden, weight, bias], lambda: linear_pixel_loss(hidden, weight, bias, images, ids, 16, **norm)),
    )
    yield (
        "place_tokens",
        with_grads([tokens, row, positions], lambda: place_tokens(tokens, row, positions, row, masked=masked)),
    )


NAMES = (
    "short keys", "short queries", "split grids", "short keys, index", "long keys, index", "packed queries",
    "gather_patches", "masked_pixel_loss", "linear_pixel_loss", "place_tokens",
)  # fmt: skip


@pytest.mark.plain_empty
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_every_run(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        first = step()
        for _ in range(REPEATS):
            for a, b in zip(step(), first, strict=True):
                assert torch.equal(a.isnan(), b.isnan())
                assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.plain_empty
@pytest.mark.parametrize("name", NAMES)
def test_captured_in_a_graph(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                wanted = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = step()
        for x in got:
            x.detach().fill_(-1)
        graph.replay()
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.plain_empty
@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name: str):
    step = dict(steps())[name]
    with use_backend("triton"):
        step()  # compiles, and copies constants to the device once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_bfloat16_rounds_to_nearest_even():
    """An output that is one input, unchanged: place_tokens in float32 sums, rounded once as it is stored."""
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
def test_strides_past_two_to_the_31():
    """Rows of a view that lie more than 2^31 elements apart, read and compared with a contiguous copy."""
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
