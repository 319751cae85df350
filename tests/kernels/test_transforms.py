"""Transforms of torch over every op: torch.func, second derivatives, modules around them. Against plain torch."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from mvlm_kernels import cross_attention, use_backend
from support.kernels.ops import ROWS, distinct

pytestmark = [
    pytest.mark.plain_empty,
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # vmap loops over samples, and says so
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # of torch's own forward mode
]
G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=G, dtype=torch.float64)


def joined(f: Callable[..., Any], constants: dict[str, Any]) -> Callable[..., Tensor]:
    """f of tensors alone, with its outputs in one tensor."""

    def call(*tensors: Tensor) -> Tensor:
        outputs = distinct(f(*tensors, **constants))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    return call


NAMES = ("attention", "patches", "loss", "tokens, masked", "tokens, visible", "norm", "post-norm", "gelu")
CALLS = {
    name: (*(joined(f, ROWS[name].constants) for f in (ROWS[name].ours, ROWS[name].plain)), ROWS[name].tensors)
    for name in NAMES
}
LINEAR = ("patches",)
OPS = pytest.mark.parametrize("op", CALLS)


def public(op: str) -> str:
    """Name of the function, as errors say it."""
    return ROWS[op].op


@pytest.fixture(autouse=True, params=["triton", "torch"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with use_backend(request.param):
        yield request.param


def squared(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: f(*args).square().sum()


def same(got: Any, wanted: Any) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-9)


def skip_without_kernel(op: str, backend: str) -> None:
    if op == "gelu" and backend == "triton":
        pytest.skip("transforms have no kernel of gelu_linear, and use_backend says so")


def test_forced_kernels_of_gelu_linear_refuse_transforms(backend: str):
    ours, _, args = CALLS["gelu"]
    if backend == "torch":
        torch.func.vjp(ours, *args)
        return
    with pytest.raises(RuntimeError, match=r"in force, but: transforms of torch\.func and dual numbers have no kernel"):
        torch.func.vjp(ours, *args)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"have no kernel; torch runs"):
        ours(*args)


@pytest.mark.slow
@OPS
def test_gradients_of_torch_func(op: str, backend: str):
    skip_without_kernel(op, backend)
    ours, plain, args = CALLS[op]
    every = tuple(range(len(args)))
    same(torch.func.grad(squared(ours), every)(*args), torch.func.grad(squared(plain), every)(*args))
    got, wanted = torch.func.vjp(ours, *args), torch.func.vjp(plain, *args)
    same(got[0], wanted[0])
    same(got[1](torch.ones_like(got[0])), wanted[1](torch.ones_like(wanted[0])))


@pytest.mark.slow
@OPS
def test_compiled_gradients_of_torch_func(op: str, backend: str):
    skip_without_kernel(op, backend)
    ours, _, args = CALLS[op]
    gradient = torch.func.grad(squared(ours), tuple(range(len(args))))
    torch._dynamo.reset()
    same(torch.compile(gradient, backend="aot_eager", fullgraph=True)(*args), gradient(*args))
    torch._dynamo.reset()


@pytest.mark.slow
@OPS
def test_gradients_of_each_sample(op: str, backend: str):
    skip_without_kernel(op, backend)
    ours, plain, args = CALLS[op]
    every, samples = tuple(range(len(args))), [torch.stack([x, x / 2, -x]) for x in args]
    got = torch.func.vmap(torch.func.grad(squared(ours), every))(*samples)
    wanted = [torch.func.grad(squared(plain), every)(*(x[i] for x in samples)) for i in range(3)]
    same(got, tuple(torch.stack(x) for x in zip(*wanted, strict=True)))


@pytest.mark.slow
@OPS
def test_second_derivatives_are_right_or_refused_by_name(op: str, backend: str):
    ours, plain, args = CALLS[op]

    def penalty(f: Callable[..., Tensor], *rest: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: squared(torch.func.grad(squared(f)))(x, *rest)

    def by_autograd(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in args]
        return penalized(f, inputs, inputs)

    if op not in LINEAR and (op != "attention" or backend == "triton"):
        attempts = [lambda: by_autograd(ours), lambda: torch.func.grad(penalty(ours, *args[1:]))(args[0])]
        for attempt in attempts[: 1 if op == "gelu" else 2]:
            with pytest.raises(RuntimeError, match=f"{public(op)} has no second derivative; use "):
                attempt()
    else:
        same(by_autograd(ours), by_autograd(plain))
    if op in LINEAR or (op in ("attention", "gelu") and backend == "torch"):
        same(torch.func.grad(penalty(ours, *args[1:]))(args[0]), torch.func.grad(penalty(plain, *args[1:]))(args[0]))


def penalized(f: Callable[..., Tensor], inputs: Sequence[Tensor], first: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a penalty on the gradients by `first`, by every input that has one."""
    grads = torch.autograd.grad(squared(f)(*inputs), first, create_graph=True)
    total = sum((x.square().sum() for x in grads), torch.zeros(()))
    trained = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(total, trained, allow_unused=True, materialize_grads=True)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@OPS
def test_second_derivatives_of_some_inputs_are_right_or_refused_by_name(op: str, frozen: bool):
    """First derivatives by each set of inputs. `frozen`: the other inputs are constants."""
    ours, plain, args = CALLS[op]
    every = range(len(args))
    for chosen in itertools.chain.from_iterable(itertools.combinations(every, n) for n in range(1, len(args))):
        inputs = [x.clone().requires_grad_(not frozen or i in chosen) for i, x in enumerate(args)]
        first = [inputs[i] for i in chosen]
        wanted = penalized(plain, inputs, first)
        try:
            got = penalized(ours, inputs, first)
        except RuntimeError as error:
            assert f"{public(op)} has no second derivative; use " in str(error)  # noqa: PT017
            assert op not in LINEAR
        else:
            same(got, wanted)


@pytest.mark.slow
@OPS
def test_dual_numbers_are_right_or_refused_by_name(op: str, backend: str):
    skip_without_kernel(op, backend)
    ours, plain, args = CALLS[op]

    def tangent(f: Callable[..., Tensor]) -> Tensor | None:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(*(forward_ad.make_dual(x, x.cos()) for x in args))).tangent

    if op == "gelu" or (op == "attention" and backend == "torch"):
        same(tangent(ours), tangent(plain))
        return
    with pytest.raises(NotImplementedError, match=f"{public(op)} has no forward-mode derivative; use reverse"):
        tangent(ours)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
@OPS
def test_checkpointing_gives_the_same_gradients(op: str, reentrant: bool):
    ours, _, args = CALLS[op]
    leaves = [x.clone().requires_grad_() for x in args]
    checkpoint(ours, *leaves, use_reentrant=reentrant).square().sum().backward()
    same(tuple(x.grad for x in leaves), torch.autograd.grad(squared(ours)(*leaves), leaves))


@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # of samples of a batch
@pytest.mark.parametrize("name", ["key_lengths", "key_mask", "key_index"])
def test_vmap_over_what_says_which_keys_exist(name: str):
    q, k = rand(3, 2, 4, 1, 8), rand(3, 2, 5, 1, 8)
    values = {
        "key_lengths": torch.tensor([[5, 3], [1, 2], [4, 4]]),
        "key_mask": torch.rand(3, 2, 5, generator=G) < 0.7,
        "key_index": torch.tensor([[1, 0], [1, 1], [0, 0]]),
    }[name]

    def attended(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        options: dict[str, Any] = {name: x}
        return cross_attention(q, k, k, **options)

    found = torch.func.vmap(attended)(q, k, values)
    wanted = torch.stack([attended(*one) for one in zip(q, k, values, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
