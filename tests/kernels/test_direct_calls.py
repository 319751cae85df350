"""Plain eager calls skip the dispatcher. Everything that can see or change a call must find no difference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm_kernels import (
    cross_attention,
    gather_patches,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    registration,
    use_backend,
)

pytestmark = pytest.mark.plain_empty
IMAGES, IDS = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1], [2, 3]])
WEIGHT, ROW, POSITIONS, KEYS = torch.ones(48, 5) / 7, torch.ones(4), torch.ones(4, 4) / 3, torch.ones(2, 7, 2, 32) / 5
# For each op: a call of one tensor, and that tensor.
CALLS: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "cross_attention": (lambda q, **k: cross_attention(q, KEYS, KEYS, **k), torch.ones(2, 9, 2, 32) / 3),
    "gather_patches": (lambda x, ids=IDS, p=4: gather_patches(x, ids, p), IMAGES),
    "masked_pixel_loss": (lambda x, ids=IDS, p=4: masked_pixel_loss(x, IMAGES, ids, p), torch.ones(2, 2, 48) / 3),
    "linear_pixel_loss": (
        lambda x, ids=IDS, p=4: linear_pixel_loss(x, WEIGHT, None, IMAGES, ids, p),
        torch.ones(2, 2, 5) / 3,
    ),
    "place_tokens": (lambda x, **k: place_tokens(x, ROW, POSITIONS, ROW, **k), torch.ones(2, 3, 4) / 3),
}
OPS = pytest.mark.parametrize("op", CALLS)


class Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A tensor subclass, such as image libraries return."""


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with use_backend("triton"):  # on the CPU attention would be composed of torch ops, without an op
        yield


@contextmanager
def through_the_dispatcher() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "called_directly", lambda *_: False)
        yield


def profiled(op: str) -> tuple[list[bool], Tensor, Tensor]:
    """[call enters the dispatcher, its backward does], the output, and the gradient of the input."""
    call, x = CALLS[op]
    leaf = x.clone().requires_grad_()
    profile = torch.autograd.profiler.profile()
    with profile:
        out = call(leaf)
        (grad,) = torch.autograd.grad(out.square().sum(), leaf)
    assert profile.function_events is not None
    seen = {event.name for event in profile.function_events}
    return [f"mvlm_kernels::{name}" in seen for name in (op, f"{op}_backward")], out, grad


@pytest.mark.slow
@OPS
def test_plain_call_skips_the_dispatcher_and_gives_the_same_bits(op: str):
    entered, *direct = profiled(op)
    assert entered == [False, False]
    with through_the_dispatcher():
        entered, *dispatched = profiled(op)
    assert entered == [True, True]
    for a, b in zip(direct, dispatched, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@OPS
def test_torch_modes_and_subclasses_see_the_op(op: str):
    call, x = CALLS[op]
    want = call(x)
    for mode in (Dispatched(), Called()):
        with mode:
            assert torch.equal(call(x), want)
        assert f"mvlm_kernels.{op}.default" in mode.seen
    got = call(x.as_subclass(Named))
    assert type(got) is Named
    assert torch.equal(got.as_subclass(Tensor), want)


@OPS
def test_op_keeps_fake_tensors_fake(op: str):
    call, x = CALLS[op]
    want = call(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        got = call(mode.from_tensor(x))
    assert isinstance(got, FakeTensor)
    assert (got.shape, got.dtype, got.stride()) == (want.shape, want.dtype, want.stride())


@pytest.mark.slow
@OPS
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_op_under_vmap_and_under_grad_transforms(op: str):
    """vmap runs the op row by row; a transform that differentiates sees the op's gradient."""
    call, x = CALLS[op]
    rows = torch.stack([x, x / 2])
    got = torch.func.vmap(call)(rows)
    assert torch.equal(got, torch.stack([call(row) for row in rows]))
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(call(leaf).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda y: call(y).sum())(x), wanted)


@OPS
def test_tensor_left_over_from_a_transform_takes_the_op(op: str):
    call, x = CALLS[op]
    left: list[Tensor] = []

    def leak(y: Tensor) -> Tensor:
        left.append(y)
        return y.sum()

    torch.func.grad(leak)(x)
    assert type(left[0]) is Tensor
    assert not registration.called_directly(left[0])
    assert torch.equal(call(left[0]), call(x))


@OPS
def test_autocast_is_the_same_with_and_without_the_dispatcher(op: str):
    call, x = CALLS[op]
    with torch.autocast("cpu", torch.bfloat16):
        got = call(x)
        with through_the_dispatcher():
            want = call(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    assert got.dtype == (torch.bfloat16 if op == "cross_attention" else torch.float32)


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("cross_attention", {"key_lengths": torch.tensor([7, 8])}, "key_lengths must be in 0..7"),
    ("cross_attention", {"key_index": torch.tensor([0, 2])}, "key_index must be in 0..1"),
    ("cross_attention", {"key_lengths": torch.ones(3, dtype=torch.int32)}, "key_lengths must have shape"),
    ("cross_attention", {"max_len_k": 7}, "max_len_k must be None"),
    *((op, {"ids": IDS - 1}, "patch_ids must be in") for op in list(CALLS)[1:4]),
    *((op, {"ids": IDS[:1]}, "patch_ids must have shape") for op in list(CALLS)[1:4]),
    *((op, {"p": 3}, "patch_size must divide") for op in list(CALLS)[1:4]),
    ("place_tokens", {"masked": torch.ones(2, 3)}, "masked must be bool"),
    ("place_tokens", {"visible_ids": torch.tensor([[0, 1, 3], [0, 1, 2]])}, "visible_ids must be in"),
    ("place_tokens", {"visible_ids": torch.tensor([[0, 1, 1], [0, 1, 2]])}, "visible_ids must be distinct"),
]


@pytest.mark.parametrize("op, changes, message", BAD)
def test_bad_arguments_are_refused_in_the_same_words(op: str, changes: dict[str, Any], message: str):
    call, x = CALLS[op]
    with pytest.raises(ValueError, match=message) as direct:
        call(x, **changes)
    with through_the_dispatcher(), pytest.raises(ValueError, match=message) as dispatched:
        call(x, **changes)
    assert str(direct.value) == str(dispatched.value)
