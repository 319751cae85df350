"""Checks of the arguments of ``add_layer_norm``, and its reasons against the kernels."""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.gather_patches.arguments import FLOATS, check_device
from mvlm_kernels.refusals import FLOAT64, Refusal, refusal

WIDEST = 8192
"""Largest C of the kernels: a row has to fit in registers."""


def check(
    x: Tensor, y: Tensor | None, y_bias: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
    out_dtype: Any,
) -> torch.dtype:  # fmt: skip
    """The dtype of the norm. Raises ValueError for a wrong shape, dtype, device or eps."""
    dispatch.check_number("eps", eps, 0)
    named = {"x": x, "y": y, "y_bias": y_bias, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "weight", "bias")):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"x must have shape (.., C) with C at least 1, got {tuple(x.shape)}")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must have the shape of x, {tuple(x.shape)}, got {tuple(y.shape)}")
    if y_bias is not None and y is None:
        raise ValueError("y_bias must be None where y is None, got a tensor")
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if name not in ("x", "y") and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape ({x.shape[-1]},), got {tuple(tensor.shape)}")
        check_device(name, tensor, x.device)
    if out_dtype is None:
        return x.dtype if y is None else y.dtype
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype must be float16, bfloat16, float32 or float64, got {out_dtype}")
    return out_dtype


def explain(
    x: Tensor, y: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, y_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None, post_norm: bool = False,
) -> tuple[Refusal, ...]:  # fmt: skip
    """The reasons against the kernels for arguments of the op, which are checked."""
    check(x, y, y_bias, weight, bias, eps, out_dtype)
    return reasons(x)


def reasons(x: Tensor) -> tuple[Refusal, ...]:
    """Every reason against the kernels."""
    found = dispatch.device_reasons(x.device)
    if x.shape[-1] > WIDEST:
        reason = f"a row has {x.shape[-1]} values, the kernels hold at most {WIDEST} in registers"
        found = (*found, refusal(reason, "torch runs; use rows of at most that width"))
    if x.dtype == torch.float64 and x.device.type == "cuda":
        found = (*found, FLOAT64)
    return found
