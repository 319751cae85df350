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

from mvlm_kernels import (
    add_layer_norm,
    cross_attention,
    dispatch,
    gather_patches,
    gelu_linear,
    linear_pixel_loss,
    masked_pixel_loss,
    place_tokens,
    registration,
    use_backend,
)
from support.kernels.attention import SIDES, Case, build

pytestmark = pytest.mark.plain_empty
Call = tuple[Callable[..., Any], list[Tensor], dict[str, Any]]
"""Function, tensors that get gradients, options."""


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention(case: Case, **options: Any) -> Call:
    made = build(case)
    given = tree_map_only(Tensor, lambda x: x.to("meta"), made.kwargs)
    rows = [x.to("meta", torch.bfloat16) for x in (made.q, made.k, made.v)]
    return cross_attention, rows, given | made.bounds | options


def calls() -> dict[str, Call]:
    found = {f"attention, {name}": attention(case) for name, case in SIDES.items()}
    found["attention, split grid"] = attention(Case(len_q=17, len_k=577, batch=1))
    seed = torch.empty((), dtype=torch.int64, device="meta")
    found["attention, options"] = attention(
        Case(len_q=67, len_k=37, heads=4, key_heads=2, lengths=True), dropout_p=0.1, seed=seed
    )
    images, ids = empty(2, 3, 32, 32, dtype=torch.uint8), empty(2, 5, dtype=torch.int32)
    norm: Any = {"mean": empty(3, dtype=torch.float32), "std": empty(3, dtype=torch.float32)}
    patches = {"patch_ids": ids, "patch_size": 8, **norm}
    found["gather_patches"] = gather_patches, [empty(2, 3, 32, 32)], patches
    found["gather_patches, all"] = gather_patches, [empty(2, 3, 32, 32)], patches | {"patch_ids": None}
    head = [empty(2, 5, 24), empty(192, 24), empty(192)]
    for kind in ("l1", "mse"):
        options = {"images": images, "kind": kind, "normalize_target": kind == "mse", **patches}
        found[f"masked_pixel_loss, {kind}"] = masked_pixel_loss, [empty(2, 5, 192)], options
        found[f"linear_pixel_loss, {kind}"] = linear_pixel_loss, head, options
    tokens = [empty(2, 16, 8), empty(8), empty(17, 8), empty(8)]
    found["place_tokens"] = place_tokens, tokens, {}
    found["place_tokens, masked"] = place_tokens, tokens, {"masked": empty(2, 16, dtype=torch.bool)}
    found["place_tokens, visible"] = place_tokens, [empty(2, 5, 8), *tokens[1:]], {"visible_ids": ids}
    row = empty(24, dtype=torch.float32)
    found["add_layer_norm"] = add_layer_norm, [empty(2, 5, 24, dtype=torch.float32), empty(2, 5, 24), row, row], {}
    found["gelu_linear"] = gelu_linear, [empty(2, 5, 24), empty(48, 24), empty(48)], {"h_bias": empty(24)}
    return found


CALLS = calls()
WITHOUT_BACKWARD_KERNEL = {"linear_pixel_loss, mse"}  # its gradients are products of torch


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
    function, tensors, options = CALLS[name]
    leaves = [x.detach().requires_grad_() for x in tensors]
    with watched() as launched:
        found = function(*leaves, **options)
        assert launched
        launched.clear()
        outputs = [x for x in tree_leaves(found) if x.requires_grad]
        gradients = torch.autograd.grad(outputs, leaves, [torch.empty_like(x) for x in outputs])
        assert launched or name in WITHOUT_BACKWARD_KERNEL
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


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
