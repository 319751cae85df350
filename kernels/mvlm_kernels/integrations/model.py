"""Explanation of a model: which calls the kernels compute, or would after a swap."""

import copy
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from mvlm_kernels.integrations.blocks import swap_blocks
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, ModelExplanation, SwapReport, explain_swapped


def explain_model(model: nn.Module, inputs: Any, *, as_if: str | None = None) -> ModelExplanation:
    """Explain which calls of a model the kernels compute, for these inputs.

    The model is one of timm or transformers, or has layers of :mod:`mvlm_kernels.layers`.

    A copy of the model runs once, without gradients, on the device of its weights; the model stays as it is. If nothing
    in it is swapped, everything that can be is swapped in the copy.

    Args:
        inputs: a tensor, the arguments of the model in a tuple or list, or its keywords in a mapping.
        as_if: a GPU, as ``"sm_90"`` for compute capability 9.0: explain each call with its tensors on one, on any
            machine. Give weights and inputs the dtype of training.
    """
    trial = copy.deepcopy(model)
    reports = [swap(trial) for swap in _swaps(trial)]
    parts = [part for report in reports for part in report.parts]
    if any(part.reason == ALREADY_SWAPPED for part in parts):
        for report in reports:
            report.undo()
        return explain_swapped(trial, inputs, as_if)
    return explain_swapped(trial, inputs, as_if, tuple(part for part in parts if part.reason is not None))


def _swaps(model: nn.Module) -> list[Callable[[nn.Module], SwapReport]]:
    """Functions that swap modules of a model: :func:`swap_blocks`, and those of timm and transformers if imported.

    That of transformers is left out for a model without a ``PreTrainedModel``.
    """
    found: list[Callable[[nn.Module], SwapReport]] = [swap_blocks]
    if "timm" in sys.modules:
        from mvlm_kernels.integrations import timm

        found.append(timm.swap)
    if "transformers" in sys.modules:
        from transformers import PreTrainedModel

        from mvlm_kernels.integrations import transformers

        if any(isinstance(module, PreTrainedModel) for module in model.modules()):
            found.append(transformers.swap)
    return found
