"""FLOPs of one training step of each contender, counted by running it on fake tensors.

    python -m mvlm_benchmarks.step.flops

Fake tensors have shapes but no values, so nothing is computed and no memory is needed. `mvlm.costs.flops` has the
formulas.
"""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mvlm.config.model import MaskVLMConfig
from mvlm.costs.flops import counter
from mvlm.costs.step_cost import give_fake_tensors
from mvlm.objectives.losses import Losses
from mvlm_benchmarks.step.contenders import IMPLEMENTATIONS, StepInputs, compute_losses, make_module
from mvlm_benchmarks.step.inputs import PaddedBatch, make_batch, pad_batch
from mvlm_benchmarks.step.report import flops_table

aten = torch.ops.aten


class KnownTokenCount(TorchDispatchMode):
    """Supplies the values that a step reads from tensors: the number of tokens in ITM's captions.

    ITM has three pairs per image: with its caption, its caption with a negative image, and its image with a negative
    caption. Negative captions count with the mean length, so the number is 3 * tokens.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._rows = 3 * tokens

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            # The last bound of a packing is read too, to see whether it has padding rows. None has: no packing of the
            # step has more rows than ITM's captions.
            return self._rows
        return func(*args, **(kwargs or {}))


def count_flops(loss: Callable[[], Losses]) -> int:
    """Count the FLOPs of one step, forward and backward. `loss` runs the forward pass."""
    with counter() as total:
        loss().total.backward()
        return total.get_total_flops()


def gflop_per_pair(config: MaskVLMConfig, lengths: np.ndarray, contender: str) -> float:
    """Count GFLOP per pair of a contender, forward and backward, for captions of these lengths (B,): takes seconds."""
    batch, masks = make_batch(config, lengths)
    negatives = torch.zeros(len(lengths), dtype=torch.int64)  # the count does not depend on their values
    padded = pad_batch(config, batch, masks, negatives, negatives)
    with torch.device("meta"):
        module = make_module(contender, config)
    with FakeTensorMode() as mode:
        give_fake_tensors(module)
        fake = PaddedBatch(*(mode.from_tensor(x) for x in padded))
        inputs = StepInputs(_to_fake(batch, mode), _to_fake(masks, mode), fake, {})
        with KnownTokenCount(int(lengths.sum())):
            return count_flops(lambda: compute_losses(contender, module, inputs)) / (1e9 * len(lengths))


def _to_fake(item: Any, mode: FakeTensorMode) -> Any:
    """Convert the tensors of a batch or of masks to fake tensors. Other fields are kept."""
    values = {f.name: getattr(item, f.name) for f in fields(item)}
    return type(item)(**{name: mode.from_tensor(v) if isinstance(v, Tensor) else v for name, v in values.items()})


def main() -> None:
    """Print the table of docs/evidence/step.md: `base` with 64 captions, of 12 tokens on average and 30 at most."""
    lengths = np.array([30, *[12] * 46, *[11] * 16, 10])
    names = ("timm+roberta", *IMPLEMENTATIONS)
    print(flops_table({name: gflop_per_pair(MaskVLMConfig.preset("base"), lengths, name) for name in names}))


if __name__ == "__main__":
    main()
