"""The first op of a computation whose output is not finite, forward or backward, and the module that ran it.

`FirstNotFinite` looks at the outputs of every op that torch's dispatcher runs. An infinity that is meant, as in a mask,
is none: it comes from a number that is written in the code. A kernel that torch does not dispatch, and values from
other ranks, are seen by the op that reads them, whose inputs are then not finite.
"""

import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mvlm
import mvlm_kernels

_FOLDERS = tuple(f"{Path(str(package.__file__)).parent}{os.sep}" for package in (mvlm, mvlm_kernels))
"""Folders of the packages mvlm and mvlm_kernels, to tell their lines in a call stack from those of libraries."""
_OF_RANKS = ("c10d", "_c10d_functional", "fsdp")
"""Namespaces of the ops of torch.distributed. Their outputs are not judged: they arrive later."""


@dataclass(frozen=True)
class NotFinite:
    """An op (operator of torch's dispatcher) whose output has NaN or infinite values, and the code that called it."""

    op: str
    """Name of the op, such as `aten.mul.Tensor`; in backward also that of its autograd node."""
    backward: bool
    module: str
    """Name of the innermost module that ran the op, or the op whose gradient it computes; empty outside of all."""
    place: str
    """Line of mvlm or mvlm_kernels that called the op, or, in backward, the op whose gradient it computes."""
    came_in: bool
    """True if an input of the op had NaN or infinite values already."""

    def describe(self) -> str:
        """Describe the finding in two lines of text: the module, and the op with the line of code that called it."""
        way = "backward" if self.backward else "forward"
        inputs = "its inputs are finite"
        if self.came_in:
            inputs = "its inputs are not: a weight, values of another rank, or of a kernel that torch does not dispatch"
        return (
            f"the first module whose output is not finite, {way}: {self.module or 'none, as a loss has it'}\n"
            f"the first op whose output is not finite: {self.op}, {self.place}; {inputs}"
        )


class FirstNotFinite(TorchDispatchMode):
    """Context that finds the first op with an output that is not finite, among all ops of the block.

    Args:
        model: model that runs in the block; the finding names its module.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model, self._running = model, list[str]()
        self._origins: dict[int, tuple[str, str]] = {}
        """(name of the module, line of code) of each forward op, by its sequence number in the autograd graph."""
        self._meant: set[int] = set()
        """Addresses of memory with infinities that the code wrote on purpose, such as -inf in a mask."""
        self._hooks: list[Any] = []
        self.found: NotFinite | None = None

    def __enter__(self) -> "FirstNotFinite":
        for name, module in dict(self._model.named_modules()).items():
            before = module.register_forward_pre_hook(partial(self._enter, name))
            self._hooks += [before, module.register_forward_hook(self._leave, always_call=True)]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.found is not None:
            return func(*args, **(kwargs or {}))
        inputs = tree_leaves((args, kwargs))
        meant = any(isinstance(x, float) and not math.isfinite(x) for x in inputs)
        before = [_local(x) for x in inputs if isinstance(x, Tensor)]
        bad = [x.untyped_storage().data_ptr() in self._meant for x in before if not _finite(x)]
        out = func(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()  # torch has no public name for it
        here = self._running[-1] if self._running else "", _place(sys._getframe(1))
        number = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
        if node is None:
            self._origins.setdefault(number - 1, here)
        self._judge(func, out, before, meant or any(bad), not all(bad), node, here)
        return out

    def _judge(
        self, func: Any, out: Any, inputs: list[Tensor], meant: bool, came_in: bool, node: Any, here: tuple[str, str]
    ) -> None:
        name = func.name().split("::")[-1]
        outputs = [_local(x) for x in tree_leaves(out) if isinstance(x, Tensor)]
        if name.startswith(("empty", "new_empty")):
            for x in outputs:
                if x.is_floating_point() and x.device.type != "meta":
                    x.zero_()  # it may hold what is not finite, and nobody reads it before it is written
        if func.namespace in _OF_RANKS:
            return
        for x in outputs:
            address = x.untyped_storage().data_ptr()
            if _finite(x):
                self._meant.discard(address)
            elif meant and not _has_nan(x):
                self._meant.add(address)
            elif func._schema.is_mutable or all(address != y.untyped_storage().data_ptr() for y in inputs):
                module, place = here
                if node is not None and not module:
                    module, place = self._origins.get(node._sequence_nr(), here)
                op = f"{func.namespace}.{name}" + ("" if node is None else f" of {node.name()}")
                self.found = NotFinite(op, node is not None, module, place, came_in)
                return


def _local(x: Tensor) -> Tensor:
    """This rank's shard of a DTensor; any other tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def _finite(x: Tensor) -> bool:
    numbers = (x.is_floating_point() or x.is_complex()) and x.layout == torch.strided and x.device.type != "meta"
    return not numbers or bool(torch.isfinite(x).all())


def _has_nan(x: Tensor) -> bool:
    return bool(torch.isnan(x).any())


def _place(frame: FrameType | None) -> str:
    """Innermost frame of mvlm or mvlm_kernels in a call stack, such as `mvlm/model/fast.py:90 in encode_patches`."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_FOLDERS) and file != __file__:
            root = next(folder for folder in _FOLDERS if file.startswith(folder))
            return f"{Path(file).relative_to(Path(root).parent)}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
