"""The last linear layer and its cross-entropy in one, a few rows at a time: all logits never exist.

The gradients of a chunk are made while its logits are there (as in Liger Kernel's fused linear cross-entropy), so the
backward pass only scales them. Shape legend: M rows, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvlm.device import compute_dtype
from mvlm.objectives.losses import correct_top1

LOGITS = 1 << 22
"""Logits of one chunk: 16 MB in fp32."""


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the logits x weight^T + bias over the rows whose target is not -100, and the share of these
    rows whose target has the largest logit, which has no gradient.

    x (M, C), weight (V, C), bias (V,), targets int64 (M,) in [0, V) or -100. Returns scalars in fp32, float64 for
    float64. Logits have autocast's dtype, or x's; sums are taken in fp32 (float64). Without any row both are NaN, as
    torch's cross_entropy is.
    """
    return _LinearCrossEntropy.apply(x.to(compute_dtype(x)), weight, bias, targets)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = max(1, LOGITS // len(weight))
        with torch.autocast(x.device.type, enabled=False):
            w, b = weight.to(x.dtype), bias.to(x.dtype)
            share = 1 / (targets != -100).sum().to(wide)
            loss, right = torch.zeros(2, dtype=wide, device=x.device)
            wanted = any(ctx.needs_input_grad)
            dx = torch.empty_like(x) if wanted else None
            dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if wanted else None
            db = torch.zeros(bias.shape, dtype=wide, device=x.device) if wanted else None
            for start in range(0, len(x), rows):
                part, target = x[start : start + rows], targets[start : start + rows]
                log_p = F.log_softmax(F.linear(part, w, b).to(wide), dim=-1)  # (rows, V)
                loss = loss + F.nll_loss(log_p, target, ignore_index=-100, reduction="sum")
                known = target != -100
                right = right + (correct_top1(log_p, target.clamp(min=0)) * known).sum()
                if dx is None or dw is None or db is None:
                    continue
                grad = log_p.exp_()
                grad.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(grad[:, :1]))
                grad *= torch.where(known, share, 0)[:, None]
                db += grad.sum(0)
                grad = grad.to(x.dtype)
                dx[start : start + rows] = grad @ w
                dw += grad.T @ part
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = weight.dtype, bias.dtype
        accuracy = right * share
        ctx.mark_non_differentiable(accuracy)
        return loss * share, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        grad = grads[0]
        weight_type, bias_type = ctx.dtypes
        return (dx * grad).to(dx.dtype), (dw * grad).to(weight_type), (db * grad).to(bias_type), None
