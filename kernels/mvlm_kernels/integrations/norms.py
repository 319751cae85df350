"""Norms, and other modules in a block, whose parameters an op may read without calling them."""

import sys
from typing import Any

import torch
from torch import nn

from mvlm_kernels.add_layer_norm import WIDEST
from mvlm_kernels.arguments import compute_dtype
from mvlm_kernels.dispatch import Refusal, refusal

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_not_replaced(module: nn.Module, *kinds: type[nn.Module]) -> Refusal | None:
    """Reason why a module's parameters cannot be used without calling it: wrapped, another class, or hooks."""
    if type(module) not in kinds:
        return refusal(
            f"wanted {' or '.join(dict.fromkeys(kind.__name__ for kind in kinds))}, got {type(module).__name__}",
            f"the original forward runs; unwrap it if it is a wrapped {kinds[0].__name__}",
        )
    if any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module):
        return refusal(f"its {type(module).__name__} has hooks", "the original forward calls them; remove them")
    return None


def why_not_norm(norm: Any, *others: type[nn.Module]) -> Refusal | None:
    """Reason why the op cannot compute a LayerNorm, or a norm of one of these other classes; None if it can."""
    reason = why_not_replaced(norm, nn.LayerNorm, *of_timm("norm", "LayerNorm"), *others)
    if reason is not None:
        return reason
    if len(norm.normalized_shape) != 1:
        return refusal(f"the norm must be over the last axis, got {norm}", "the original forward runs")
    if norm.normalized_shape[0] > WIDEST:
        reason = f"a row of the norm has {norm.normalized_shape[0]} values, the kernel holds at most {WIDEST}"
        return refusal(reason, "the original forward runs; use rows of at most that width")
    if getattr(norm, "_fast_norm", False):
        return refusal("timm's fast norm is on", "call timm.layers.set_fast_norm(False) before building the model")
    return None


def of_timm(module: str, name: str) -> tuple[type[nn.Module], ...]:
    """A class of ``timm.layers``; none where it is not imported, or in a version of timm without it."""
    key = f"timm.layers.{module}"
    found = getattr(sys.modules.get(key), name, None)
    return () if found is None else (found,)


def eps_of(norm: Any) -> float:
    """The number that a norm adds to the variance, or to the mean square."""
    if norm.eps is not None:
        return norm.eps
    # As nn.RMSNorm has it: that of the dtype in which torch computes.
    return torch.finfo(compute_dtype(*(p.dtype for p in norm.parameters()))).eps
