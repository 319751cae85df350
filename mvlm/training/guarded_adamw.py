"""AdamW that can skip an update, and clip gradients, on the device."""

import torch
from torch import Tensor


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that can clip gradients and skip an update, without a host sync and without a pass of its own.

    The fused kernels read two attributes that GradScaler sets for the same purposes.
    """

    found_inf: Tensor | None = None
    """float32 (), 1 = leave weights, moments and step counts unchanged."""
    grad_scale: Tensor | None = None
    """float32 (), gradients are divided by it."""

    def set_learning_rates(self, factor: float) -> None:
        """Set the learning rate of each parameter group to its peak times `factor`."""
        for group in self.param_groups:
            group["lr"] = group["peak"] * factor

    def clip(self, norm: Tensor, limit: float) -> None:
        """Clip the gradients of the next step from their norm () to `limit`, as torch's `clip_grad_norm_` does."""
        self.grad_scale = ((norm.float() + 1e-6) / limit).clamp(min=1)
