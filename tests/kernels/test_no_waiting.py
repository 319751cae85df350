"""Host code of every op, forward and backward, on meta tensors up to its launches: nothing waits for a device.

A meta tensor has no values. Reading one raises an error, and so does a result whose shape depends on values. Copies
between host and device are found by their devices. Indices, lengths, masks, means and seeds lie on the device. The few
lines that ask for a CUDA device by name run in test_fake_cuda.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mvlm_kernels import cross_attention, dispatch, registration, use_backend
from mvlm_kernels.case import Case
from mvlm_kernels.cases import compiled
from mvlm_kernels.cross_attention.cases import SIDES, Shape
from support.kernels.attention import build
from support.kernels.ops import Row, distinct, rows

pytestmark = pytest.mark.plain_empty


def on_device(row: Row) -> Row:
    """The row on the meta device. Values of channels are tensors there."""
    meta = tree_map_only(Tensor, lambda x: x.to("meta"), row._asdict())
    values = {x: torch.empty(3, device="meta") for x in ("mean", "std") if row.constants.get(x)}
    return Row(**meta | {"constants": meta["constants"] | values})


def attention(shape: Shape, **options: Any) -> Row:
    made = build(shape)
    given = tree_map_only(Tensor, lambda x: x.to("meta"), made.kwargs)
    tensors = tuple(x.to("meta", torch.bfloat16) for x in (made.q, made.k, made.v))
    return Row("cross_attention", cross_attention, cross_attention, tensors, given | made.bounds | options)


CALLS = {name: on_device(row) for name, row in rows(mixed=True).items()}
CALLS |= {f"attention, {name}": attention(shape) for name, shape in SIDES.items()}
CALLS["attention, split grid"] = attention(Shape(len_q=17, len_k=577, batch=1))
SEED = torch.empty((), dtype=torch.int64, device="meta")
OPTIONS = Shape(len_q=67, len_k=37, heads=4, key_heads=2, lengths=True)
CALLS["attention, options"] = attention(OPTIONS, dropout_p=0.1, seed=SEED)
WITHOUT_BACKWARD_KERNEL = ("patches",)  # the gradient is torch's


class NoCopies(TorchDispatchMode):
    """Refusal of ops that take a tensor to another device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = [{x.device.type for x in tree_leaves(part) if isinstance(x, Tensor)} for part in (args, out)]
        assert not (devices[0] and devices[1] and devices[0] != devices[1]), f"{func} copies between {devices}"
        return out


@contextmanager
def watched() -> Iterator[list[str]]:
    """Take the launchers, in a process that would compile for compute capability 9.0. The list receives the kernels."""
    launched: list[str] = []
    with pytest.MonkeyPatch.context() as patch, use_backend("triton"), NoCopies():
        patch.setattr(registration, "called_directly", lambda *_: True)  # as for plain tensors without a mode
        with dispatch.recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
            yield launched


@pytest.mark.parametrize("name", CALLS)
def test_no_op_reads_a_value_or_copies_to_the_host(name: str):
    row = CALLS[name]
    leaves = [x.detach().requires_grad_() for x in row.tensors]
    with watched() as launched:
        outputs = [x for x in distinct(row.ours(*leaves, **row.constants)) if x.requires_grad]
        assert launched
        launched.clear()
        grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs], allow_unused=True)
        assert launched or name.startswith(WITHOUT_BACKWARD_KERNEL)
    assert [x.shape for x in grads if x is not None] == [x.shape for x in leaves]


COMPILED = [x for x in compiled() if x.label.startswith(("bfloat16/64/32/", "step/", "bf16", "fp"))]


@pytest.mark.parametrize("case", COMPILED, ids=lambda case: f"{case.op}/{case.label}")
def test_launchers_of_compiled_cases_read_no_tensor(case: Case):
    inputs = case.make("meta")
    with watched() as launched:
        case.backward(inputs, case.forward(inputs))
    assert launched


VALUES = {"attention", "attention, long keys", "patches", "loss", "tokens, visible"}
"""Rows with lengths, indices and ids, whose values are checked."""


@pytest.mark.parametrize("switch, checks", [(None, False), ("", False), ("0", False), ("1", True)])
@pytest.mark.parametrize("name", sorted(VALUES))
def test_values_on_a_gpu_are_read_in_debug_mode_only(
    name: str, switch: str | None, checks: bool, monkeypatch: pytest.MonkeyPatch
):
    """With MVLM_KERNELS_DEBUG=1 they are checked before the launch. A tensor of a CPU is checked in any case."""
    monkeypatch.delenv("MVLM_KERNELS_DEBUG", raising=False)
    if switch is not None:
        monkeypatch.setenv("MVLM_KERNELS_DEBUG", switch)
    with watched() as launched:
        if checks:
            with pytest.raises(RuntimeError, match="meta tensors"):
                CALLS[name].ours(*CALLS[name].tensors, **CALLS[name].constants)
        else:
            CALLS[name].ours(*CALLS[name].tensors, **CALLS[name].constants)
    assert bool(launched) != checks
    assert dispatch.checks_values(torch.device("cuda")) == checks
    assert dispatch.checks_values(torch.device("cpu"))


PROBES: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda x: x.max().item(),
    "a list": lambda x: x.tolist(),
    "a choice": lambda x: bool(x.any()),
    "positions": lambda x: x.nonzero(),
    "a choice of rows": lambda x: x[x > 0],
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.zeros(3).to(x.device),
}


@pytest.mark.parametrize("name", PROBES)
def test_reads_and_copies_are_found(name: str):
    with watched(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        PROBES[name](torch.empty(3, device="meta"))
