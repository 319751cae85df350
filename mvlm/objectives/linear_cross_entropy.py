"""Fused linear layer and cross-entropy, computed a few rows at a time, so that the full logits never exist.

The gradients of a chunk are computed in the forward pass, while its logits exist, and the backward pass only scales
them (as in Liger Kernel's fused linear cross-entropy). Shape legend: M rows, C width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mvlm.device import compute_dtype
from mvlm.objectives.losses import correct_top1
from mvlm_kernels.dispatch import without_autocast

LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Largest number of logits that exist at a time, by device: 16 MiB in fp32, or 256 MiB. Each chunk reads the weight and
adds to its gradient, which on a GPU takes longer than the logits of a small chunk."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the logits x weight^T + bias, and top-1 accuracy, over the rows whose target is not -100.

    x (M, C), weight (V, C), bias (V,), targets int64 (M,) in [0, V) or -100. Returns two scalars, fp32, or float64 for
    float64; the accuracy has no gradient. With row_weights (M,), the loss is the sum of the rows' cross-entropies, each
    times its weight; the accuracy is the same. Logits have autocast's dtype, or x's. Sums are taken in fp32 (float64).
    If all targets are -100 both are NaN, as torch's cross_entropy is.
    """
    return _LinearCrossEntropy.apply(x.to(compute_dtype(x)), weight, bias, targets, row_weights)  # pyright: ignore[reportReturnType]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, row_weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        sum_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = max(1, LOGITS_PER_CHUNK["cpu" if x.device.type == "cpu" else "cuda"] // len(weight))
        with without_autocast(x.device):
            w, b = weight.to(x.dtype), bias.to(x.dtype)
            # The number of targets stays on the device: with it on the host, every step would wait for the device.
            share = 1 / (targets != -100).sum().to(sum_dtype)
            loss, correct = torch.zeros(2, dtype=sum_dtype, device=x.device)
            with_gradients = any(ctx.needs_input_grad)
            dx = torch.empty_like(x) if with_gradients else None
            dw = torch.zeros(weight.shape, dtype=sum_dtype, device=x.device) if with_gradients else None
            db = torch.zeros(bias.shape, dtype=sum_dtype, device=x.device) if with_gradients else None
            for start in range(0, len(x), rows):
                chunk, target = x[start : start + rows], targets[start : start + rows]
                log_p = F.log_softmax(F.linear(chunk, w, b).to(sum_dtype), dim=-1)  # (rows, V)
                counted = target != -100
                if row_weights is None:
                    factor = share
                    loss = loss + F.nll_loss(log_p, target, ignore_index=-100, reduction="sum")
                else:
                    factor = row_weights[start : start + rows].to(sum_dtype)
                    loss = loss + (factor * F.nll_loss(log_p, target, ignore_index=-100, reduction="none")).sum()
                correct = correct + (correct_top1(log_p, target.clamp(min=0)) * counted).sum()
                if dx is None or dw is None or db is None:
                    continue
                # The gradient of the mean with respect to the logits: (softmax - one-hot target) / number of targets.
                # It overwrites log_p, to save memory.
                grad = log_p.exp_()
                grad.scatter_add_(1, target.clamp(min=0)[:, None], -torch.ones_like(grad[:, :1]))
                grad *= torch.where(counted, factor, 0)[:, None]
                db += grad.sum(0)
                grad = grad.to(x.dtype)
                dx[start : start + rows] = grad @ w
                dw += grad.T @ chunk
        ctx.save_for_backward(dx, dw, db)
        ctx.dtypes = weight.dtype, bias.dtype
        accuracy = correct * share
        ctx.mark_non_differentiable(accuracy)
        return loss * share if row_weights is None else loss, accuracy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.saved_tensors
        grad = grads[0]
        weight_dtype, bias_dtype = ctx.dtypes
        return (dx * grad).to(dx.dtype), (dw * grad).to(weight_dtype), (db * grad).to(bias_dtype), None, None
