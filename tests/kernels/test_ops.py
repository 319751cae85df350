"""Properties of every op, by the rows of one table: values, gradients, registration, compilers, modes, writes in place.

Wide ranges of shapes and types are in each op's own folder, transforms of torch.func in test_transforms.py, and what a
GPU must not wait for in test_no_waiting.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mvlm_kernels import registration, use_backend
from support.kernels.ops import REGISTERED, ROWS, Row, distinct, loss_and_gradients, rows, total

pytestmark = pytest.mark.plain_empty
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])
LONG = "attention, long keys"  # its graphs take half a minute to trace
NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] * (name == LONG)) for name in ROWS]
)
FIRST = {row.op: name for name, row in reversed(ROWS.items())}.values()
FIRST_NAMES = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.extended] * (name not in FIRST)) for name in ROWS]
)
"""One row of each op in `make test`: for what takes a compiler seconds."""


@pytest.mark.slow
@BACKENDS
@NAMES
def test_values_and_gradients_are_those_of_plain_torch(name: str, backend: Any):
    with use_backend(backend):
        got = loss_and_gradients(ROWS[name].ours, ROWS[name])
    torch.testing.assert_close(got, loss_and_gradients(ROWS[name].plain, ROWS[name]), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
@BACKENDS
@NAMES
def test_repeats_give_the_same_bits_and_only_the_gradients_that_are_needed(name: str, backend: Any):
    """Each gradient alone, and all but it, are those of a backward pass that computes all."""
    row, numbers = ROWS[name], range(len(ROWS[name].tensors))
    with use_backend(backend):
        wanted = loss_and_gradients(row.ours, row)[-len(numbers) :]
        for needed in ({*numbers}, *({i} for i in numbers), *({*numbers} - {i} for i in numbers)):
            leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(row.tensors)]
            out = total(row.ours(*leaves, **row.constants))
            assert out.requires_grad == bool(needed)
            if needed:
                out.backward()
            for i, x in enumerate(leaves):
                assert (x.grad is not None) == (i in needed)
                assert x.grad is None or torch.equal(x.grad, wanted[i])


@pytest.mark.slow
@BACKENDS
@NAMES
def test_outputs_may_be_written_to(name: str, backend: Any):
    """As `Dropout(inplace=True)` does: gradients as of the same step out of place."""
    row, found = ROWS[name], []
    if name == "attention, long keys" and backend == "triton":
        leaves = row.leaves()
        with use_backend(backend), pytest.raises(RuntimeError, match="modified by an inplace operation"):
            row.ours(*leaves, **row.constants).mul_(3).sum().backward()  # whose backward pass reads the output
        return
    if row.op == "qk_norm_rope":
        with use_backend(backend), pytest.raises(RuntimeError, match="is a view"):
            row.ours(*row.leaves(), **row.constants)[2].mul_(3)
    for in_place in (True, False):
        leaves = row.leaves()
        with use_backend(backend):
            out = distinct(row.ours(*leaves, **row.constants))[1 if row.op == "qk_norm_rope" else -1]
            out = out.mul_(3) if in_place else out * 3
            grads = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        found.append((out, *grads))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


class Dispatched(TorchDispatchMode):
    """Ops of the library that the dispatcher calls, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == registration.NAMESPACE:
            self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func, args))
        return func(*args, **(kwargs or {}))


class Named(Tensor):
    """A tensor subclass, such as image libraries return."""


def registered_calls(row: Row) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Calls of the ops of both passes: all gradients, and that of each tensor alone."""
    seen = set()
    for needed in ({*range(len(row.tensors))}, *({i} for i in range(len(row.tensors)))):
        leaves = [x.clone().requires_grad_(i in needed) for i, x in enumerate(row.tensors)]
        with use_backend("triton"), Dispatched() as mode:  # on the CPU attention would be composed, without an op
            out = total(row.ours(*leaves, **row.constants))
            if out.requires_grad:
                torch.autograd.grad(out, [x for x in leaves if x.requires_grad])
        for op, args in mode.seen:
            key = str(op), repr([x for x in tree_leaves(args) if not isinstance(x, Tensor)]), len(needed)
            if key not in seen:
                seen.add(key)
                differentiable = "backward" not in str(op) and row.op not in REGISTERED
                trained = {x.data_ptr() for x in leaves if x.requires_grad and differentiable}
                yield op, tree_map_only(Tensor, lambda x, t=trained: x.detach().requires_grad_(x.data_ptr() in t), args)


@pytest.mark.slow
@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.extended)])
@pytest.mark.parametrize("name", [name for name in ROWS if name in FIRST])
def test_ops_of_both_passes_pass_opcheck(name: str, mixed: bool):
    """Schema, fake tensors and tracing, in float64 and in the types of autocast."""
    row = rows(mixed=mixed)[name]
    checked = set()
    for op, args in registered_calls(row):
        checked.add(op)
        trains = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        for backend in ("torch", "triton"):
            utils: dict[str, Any] = {}
            if trains and "mse" in args:
                # Slopes of mse are floating outputs. Their gradient would be a second derivative, which is refused, and
                # the last check of opcheck asks for it.
                utils["test_utils"] = ("test_schema", "test_autograd_registration", "test_faketensor")
            with use_backend(backend):
                torch.library.opcheck(op, args, **utils)
    registered = REGISTERED.get(row.op, row.op)
    ops = torch.ops.mvlm_kernels
    assert checked >= {getattr(ops, registered).default, getattr(ops, f"{registered}_backward").default}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("attention, packed", "patches")])
def test_outputs_for_other_strides_are_those_that_a_compiler_is_told(name: str):
    row = ROWS[name]
    strided = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x for x in row.tensors)
    with use_backend("triton"), Dispatched() as mode:
        row.ours(*strided, **row.constants)
    for backend in ("torch", "triton"):
        with use_backend(backend):
            for op, args in mode.seen:
                torch.library.opcheck(op, args, test_utils=("test_faketensor", "test_schema"))


@pytest.mark.slow
@BACKENDS
@FIRST_NAMES
def test_one_graph_without_breaks_holds_for_all_sizes(name: str, backend: Any):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(ROWS[name].ours, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    with use_backend(backend):
        for number in (4, 5):
            row = rows(number)[name]
            got, wanted = loss_and_gradients(compiled, row), loss_and_gradients(row.ours, row)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)
            graphs.append(counter.frame_count)
    floats = "norm" in ROWS[name].op or ROWS[name].constants.get("mean")  # for which torch compiles twice, such as eps
    assert graphs[0] == graphs[1] <= (2 if floats else 1)
    torch._dynamo.reset()


@contextmanager
def through_the_dispatcher() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registration, "called_directly", lambda *_: False)
        yield


@pytest.mark.slow
@NAMES
def test_modes_and_subclasses_see_the_op_and_get_the_same_bits(name: str):
    row = ROWS[name]

    def outputs(*tensors: Tensor) -> list[Tensor]:
        return tree_leaves(row.ours(*tensors, **row.constants))

    with use_backend("triton"):
        wanted = outputs(*row.tensors)
        for mode in (Dispatched(), Called()):
            with mode:
                got = outputs(*row.tensors)
            assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
            assert any(str(op) == f"mvlm_kernels.{REGISTERED.get(row.op, row.op)}.default" for op, _ in mode.seen)
        if row.op != "gelu_linear":  # its Function gives plain tensors
            got = outputs(row.tensors[0].as_subclass(Named), *row.tensors[1:])
            assert type(got[-1]) is Named
            assert all(torch.equal(x.as_subclass(Tensor), y) for x, y in zip(got, wanted, strict=True))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            for x, y in zip(outputs(*map(fake.from_tensor, row.tensors)), wanted, strict=True):
                assert isinstance(x, FakeTensor)
                assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())


@pytest.mark.slow
@NAMES
def test_a_tensor_left_over_from_a_transform_takes_the_op(name: str):
    row = ROWS[name]
    left: list[Tensor] = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(row.tensors[0])
    assert type(left[0]) is Tensor
    assert not registration.called_directly(left[0])
    with use_backend("triton"):
        got, wanted = (row.ours(x, *row.tensors[1:], **row.constants) for x in (left[0], row.tensors[0]))
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves(got), tree_leaves(wanted), strict=True))


@pytest.mark.slow
@NAMES
def test_autocast_is_the_same_with_and_without_the_dispatcher(name: str):
    row = ROWS[name].cast(torch.float32)
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        got = tree_leaves(row.ours(*row.tensors, **row.constants))
        with through_the_dispatcher():
            wanted = tree_leaves(row.ours(*row.tensors, **row.constants))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert got[-1].dtype == (torch.bfloat16 if row.op == "cross_attention" else torch.float32)


@NAMES
def test_the_meta_device_takes_every_call_and_gives_its_shapes(name: str):
    row = ROWS[name].cast(torch.float32, "meta")
    real = ROWS[name].cast(torch.float32)
    got = loss_and_gradients(row.ours, row)
    wanted = loss_and_gradients(real.ours, real)
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in wanted]


@NAMES
def test_every_device_has_an_implementation(name: str):
    """Other devices than CPU and CUDA run torch. The suite has none of them, so it asks the dispatcher."""
    op = REGISTERED.get(ROWS[name].op, ROWS[name].op)
    for registered in (op, f"{op}_backward"):
        for device in ("CPU", "CUDA", "XPU", "MPS", "HPU", "PrivateUse1"):
            for key in (device, f"Autograd{device}") if ROWS[name].op not in REGISTERED else (device,):
                found = torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"mvlm_kernels::{registered}", key)
                assert found, (registered, key)
