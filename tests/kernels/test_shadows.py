"""Shadow weights against casts in their places: the same bits, of the weights as they are, in the block alone."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvlm_kernels import gelu_linear
from mvlm_kernels.shadows import Shadows, cast, held, linear, stacked, under_autocast
from mvlm_kernels.split_linear import split_linear

pytestmark = pytest.mark.plain_empty
BF16 = torch.bfloat16


def layers(seed: int = 0) -> Any:
    """Layers a, b and c that one product reads, and d, all 16 wide."""
    torch.manual_seed(seed)
    return nn.ModuleList(nn.Linear(16, 16) for _ in range(4))


def shadows_of(model: Any) -> Shadows:
    a, b, c, d = model
    stacks = [[x.weight for x in (a, b, c)], [x.bias for x in (a, b, c)], [d.weight], [d.bias]]
    return Shadows(stacks, [[a.weight, a.bias, d.weight]], BF16)


def output(model: Any, x: Tensor) -> Tensor:
    """All reads of weights, of some twice, by products whose gradients are added up in bf16 and in float32."""
    a, b, c, d = model
    x = linear(a, linear(d, linear(a, x)))
    q, k, v = (
        y.flatten(-2) for y in split_linear(x.to(BF16), [y.weight for y in (a, b, c)], [y.bias for y in (a, b, c)], 2)
    )
    k2, v2 = (y.flatten(-2) for y in split_linear(q, [b.weight, c.weight], [b.bias, c.bias], 2))
    weight, bias = cast((d.weight, b.bias), BF16)
    return gelu_linear(k + v2 + (k2 * v) @ weight + bias, d.weight, d.bias)


def gradients(model: Any, shadows: Shadows | None) -> list[Tensor]:
    """Output and gradients of one step."""
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    with nullcontext() if shadows is None else shadows.in_use():
        with torch.autocast("cpu", BF16):
            out = output(model, x)
        out.square().sum().backward()
    found = [out.detach(), *(torch.zeros(0) if p.grad is None else p.grad for p in model.parameters())]
    model.zero_grad(set_to_none=True)
    return found


def check_equal(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def load(model: Any) -> None:
    model.load_state_dict(layers(seed=3).state_dict())


def update(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    model.zero_grad(set_to_none=True)


def assign(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("change", [load, update, assign])
def test_results_and_gradients_have_the_bits_of_casts(change: Callable[[Any], None]):
    model = layers()
    shadows = shadows_of(model)
    check_equal(gradients(model, shadows), gradients(model, None))
    change(model)
    check_equal(gradients(model, shadows), gradients(model, None))


def test_weights_that_stop_to_learn_get_no_gradient():
    model = layers()
    shadows = shadows_of(model)
    gradients(model, shadows)
    for frozen in (model[0].weight, model[1].bias):
        frozen.requires_grad_(False)
    found = gradients(model, shadows)
    check_equal(found, gradients(model, None))
    assert not found[1].numel()
    assert found[2].numel()
    with shadows.in_use(), torch.autocast("cpu", BF16):
        assert not under_autocast(model[0].weight).requires_grad


def test_copies_are_read_in_the_block_under_autocast_alone():
    a, b, c, d = model = layers()
    shadows = shadows_of(model)
    assert held(a.weight, BF16) is None
    assert under_autocast(a.weight) is a.weight
    with shadows.in_use():
        assert under_autocast(a.weight) is a.weight
        copy = held(a.weight, BF16)
        assert copy is not None
        assert torch.equal(copy, a.weight.to(BF16))
        assert held(a.weight, torch.float16) is None
        with torch.autocast("cpu", BF16):
            assert under_autocast(a.weight).dtype == BF16
            assert under_autocast(b.weight) is b.weight  # in no group
            with torch.no_grad():
                assert not under_autocast(a.weight).requires_grad
    with shadows.in_use(), torch.no_grad():
        both = stacked([b.weight, c.weight], BF16)
        assert both.data_ptr() == copy.data_ptr() + copy.nbytes  # no copy of the copies
        assert torch.equal(both, torch.cat([b.weight, c.weight]).to(BF16))
        for parts in ([c.weight, b.weight], [a.weight, c.weight], [c.weight, d.weight]):
            assert torch.equal(stacked(parts, BF16), torch.cat(parts).to(BF16))
    assert held(a.weight, BF16) is None


def test_second_derivatives_are_those_without_shadows_or_refused():
    model = layers()
    x = torch.randn(3, 16, requires_grad=True)

    def penalty() -> list[Tensor]:
        with torch.autocast("cpu", BF16):
            out = linear(model[0], linear(model[3], x).float().square())
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return list(torch.autograd.grad(grad.square().sum(), [model[0].weight, model[3].weight]))

    def refused() -> None:
        h = x.to(BF16)
        (grad,) = torch.autograd.grad(gelu_linear(h, model[3].weight).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            grad.square().sum().backward()

    wanted = penalty()
    refused()
    with shadows_of(model).in_use():
        check_equal(penalty(), wanted)
        refused()
