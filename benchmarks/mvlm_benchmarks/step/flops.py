"""Floating-point operations of a step, counted with the formulas of `mvlm.flops`.

Nothing is computed: parameters and inputs are fake tensors of the right shapes.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm.config import MaskVLMConfig
from mvlm.flops import counter
from mvlm.objectives import Losses
from mvlm.parts import MATCHING, PREFIX
from mvlm_benchmarks.step.contenders import Inputs, losses_of, make_module
from mvlm_benchmarks.step.inputs import Padded, make_batch, pad
from mvlm_benchmarks.step.parts import OTHER, parts_of

aten = torch.ops.aten


class PartCounter(TorchDispatchMode):
    """Splits a counter's total by `mvlm.parts`, entered inside it. What is in no part is `OTHER`."""

    def __init__(self, total: Callable[[], int]) -> None:
        super().__init__()
        self._total = total
        self._open: list[str] = []
        self._seen = 0
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith("profiler._record_function_enter"):
            self.close()
            self._open.append(args[0])
        elif name.startswith("profiler._record_function_exit"):
            self.close()
            self._open.pop()
        return func(*args, **(kwargs or {}))

    def close(self) -> None:
        """Book what has been counted since the last range began or ended, to the part that was open."""
        parts = [name.removeprefix(PREFIX) for name in self._open if name.startswith(PREFIX)]
        name = MATCHING if MATCHING in parts else parts[-1] if parts else OTHER
        total = self._total()
        self.counts[name] = self.counts.get(name, 0) + total - self._seen
        self._seen = total


class KnownTotal(TorchDispatchMode):
    """Answers the one number that a step on the CPU asks of its values: the tokens of the captions that ITM is shown.

    Every caption is shown twice with its own image or a drawn one, and one more is drawn for each image; a drawn one is
    taken to have the mean length.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._answers = [3 * tokens]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return self._answers.pop()  # there is no second answer: another question is another number
        return func(*args, **(kwargs or {}))


def count(loss: Callable[[], Losses]) -> tuple[dict[str, int], int]:
    """Operations of one step: forward by part, and of the backward in all. `loss` makes the losses."""
    with counter() as found:
        parts = PartCounter(found.get_total_flops)
        with parts:
            losses = loss()
        parts.close()
        forward = found.get_total_flops()
        losses.total.backward()
        return {name: n for name, n in parts.counts.items() if n}, found.get_total_flops() - forward


def gflop_per_pair(config: MaskVLMConfig, lengths: np.ndarray, contender: str) -> tuple[dict[str, float], float]:
    """Forward GFLOP a pair by part and backward GFLOP a pair, for captions of these lengths (B,).

    Takes seconds for `base` at any batch: tensors have shapes and no memory.
    """
    batch, masks = make_batch(config, lengths)
    none = torch.zeros(len(lengths), dtype=torch.int64)  # which negatives makes no difference
    padded = pad(config, batch, masks, none, none)
    with torch.device("meta"):
        module = make_module(contender, config)
    with FakeTensorMode() as mode:
        _give_fake_tensors(module)
        fake = Padded(*(mode.from_tensor(x) for x in padded))
        inputs = Inputs(_fake(batch, mode), _fake(masks, mode), fake)
        with parts_of(module), KnownTotal(int(lengths.sum())):
            parts, backward = count(lambda: losses_of(contender, module, inputs))
    scale = 1e9 * len(lengths)
    return {name: n / scale for name, n in parts.items()}, backward / scale


def _give_fake_tensors(module: nn.Module) -> None:
    """Replace parameters and buffers on the meta device by fake ones that say they are on the CPU."""
    for owner in module.modules():
        for name, value in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(torch.empty(value.shape, dtype=value.dtype)))
        for name, value in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(value.shape, dtype=value.dtype))


def _fake(item: Any, mode: FakeTensorMode) -> Any:
    """A batch or masks with fake tensors; numbers of the host stay."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return type(item)(**{name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()})


def main() -> None:
    """The table of docs/step.md: `base`, 64 captions of 12 tokens on average, the longest of 30."""
    from mvlm_benchmarks.step.report import parts_table

    lengths = np.array([30, *[12] * 46, *[11] * 16, 10])
    names = ("timm+roberta", "plain", "fast", "drop_masked")
    print(parts_table({name: gflop_per_pair(MaskVLMConfig.preset("base"), lengths, name) for name in names}))


if __name__ == "__main__":
    main()
