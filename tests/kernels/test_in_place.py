"""Outputs that a caller writes to, as `Dropout(inplace=True)` does: gradients as of the same step out of place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvlm_kernels import (
    add_layer_norm,
    cross_attention,
    gather_patches,
    gelu_linear,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    use_backend,
)
from mvlm_kernels.layers import GeluLinear

pytestmark = pytest.mark.plain_empty
IMAGES = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
IDS, LARGEST = torch.tensor([[2, 0], [3, 3]]), torch.zeros(2, 1, dtype=torch.int64)
PIXELS, STATES, QUERIES, KEYS = (2, 3, 8, 8), (2, 3, 8), (2, 4, 2, 32), (2, 5, 2, 32)
VALUES: dict[str, Any] = {"mean": [0.1] * 3, "std": [0.3] * 3}
# For each kind of output: a call, and the shapes of the tensors that it takes.
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "add_layer_norm": (lambda x, y, w, b: add_layer_norm(x, y, w, b)[1], (STATES, STATES, (8,), (8,))),
    "post_norm": (lambda x, y, w, b: add_layer_norm(x, y, w, b, post_norm=True)[1], (STATES, STATES, (8,), (8,))),
    "cross_attention": (cross_attention, (QUERIES, KEYS, KEYS)),
    "gather_patches": (lambda x: gather_patches(x, None, 4), (PIXELS,)),
    "gather_patches, ids": (lambda x: gather_patches(x, IDS, 4), (PIXELS,)),
    "gather_patches, normalised": (lambda x: gather_patches(x, None, 4, **VALUES), (PIXELS,)),
    "gather_patches, ids, normalised": (lambda x: gather_patches(x, IDS, 4, **VALUES), (PIXELS,)),
    "gather_patches, whole images": (lambda x: gather_patches(x, None, 8), (PIXELS,)),
    "gather_patches, whole images, ids": (lambda x: gather_patches(x, LARGEST, 8, **VALUES), (PIXELS,)),
    "gelu_linear": (gelu_linear, ((2, 5, 8), (4, 8), (4,))),
    "gelu_linear, 4 dims": (gelu_linear, ((2, 1, 5, 8), (4, 8), (4,))),
    "gelu_linear, rows": (gelu_linear, ((5, 8), (4, 8), (4,))),
    "gelu_linear, no bias": (gelu_linear, ((2, 5, 8), (4, 8))),
    "linear_pixel_loss": (lambda h, w, b: linear_pixel_loss(h, w, b, IMAGES, IDS, 4), ((2, 2, 6), (48, 6), (48,))),
    "linear_pixel_loss, none": (
        lambda h, w, b: linear_pixel_loss(h, w, b, IMAGES, IDS, 4, reduction="none"),
        ((2, 2, 6), (48, 6), (48,)),
    ),
    "masked_pixel_loss": (lambda x: masked_pixel_loss(x, IMAGES, IDS, 4), ((2, 2, 48),)),
    "masked_pixel_loss, none": (lambda x: masked_pixel_loss(x, IMAGES, IDS, 4, reduction="none"), ((2, 2, 48),)),
    "place_tokens": (place_tokens, (STATES, (8,), (4, 8), (8,))),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS)
def test_outputs_may_be_written_to(name: str, backend: Any):
    call, shapes = CALLS[name]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw, requires_grad=True) for shape in shapes]
    with use_backend(backend):
        out = call(*inputs)
        out *= 3
        got = torch.autograd.grad(out.square().sum(), inputs)
        other = call(*inputs) * 3
        wanted = torch.autograd.grad(other.square().sum(), inputs)
    torch.testing.assert_close((out, *got), (other, *wanted), rtol=0, atol=0)


def test_dropout_in_place_after_the_second_half_of_a_feed_forward_layer():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), GeluLinear(16, 8), nn.Dropout(0.1, inplace=True))
    layers(torch.randn(2, 5, 8)).sum().backward()
    assert all(x.grad is not None for x in layers.parameters())
