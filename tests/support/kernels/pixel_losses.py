"""Oracles and checks of the pixel loss, for interpreted and compiled kernels."""

from typing import Any

import torch

from mvlm_kernels import use_backend
from mvlm_kernels.pixel_loss import masked_pixel_loss
from support.kernels.accuracy import accurate
from support.kernels.patches import losses_oracle, patches_oracle
from triton_proof.allocations import guarded

KINDS = ("l1", "mse")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def random(shape, dtype, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def incoming(shape, reduction):
    """Incoming gradient of the loss: not 1, and not the same for all patches."""
    return torch.tensor(1.7) if reduction == "mean" else random(shape, torch.float32, seed=9)


def pred_gradient_oracle(slope, grad, reduction):
    """Gradient of the predictions, (B, K, F) in float64."""
    batch, count, features = slope.shape
    if reduction == "mean":
        return slope * float(grad) / max(1, batch * count * features)
    return slope * grad.double().numpy()[:, :, None] / features


def check_masked(
    pred, images, ids, patch, mean=None, std=None, kind: Any = "l1", normalize=False, reduction: Any = "mean",
    device="cpu",
):  # fmt: skip
    results = {}
    grad = incoming(pred.shape[:2], reduction)
    for backend in ("triton", "torch"):
        at = device if backend == "triton" else "cpu"
        p = guarded(pred, at).requires_grad_()
        with use_backend(backend):
            loss = masked_pixel_loss(
                p, guarded(images, at), None if ids is None else guarded(ids, at), patch, mean=mean, std=std, kind=kind,
                normalize_target=normalize, reduction=reduction,
            )  # fmt: skip
            loss.backward(grad.to(loss))
        assert p.grad is not None
        results[backend] = loss.detach().cpu(), p.grad.cpu()
    losses, slope = losses_oracle(
        pred.detach().double().numpy(), patches_oracle(images, ids, patch, mean, std), kind, normalize
    )
    wanted = losses.sum() / max(1, losses.size) if reduction == "mean" else losses
    (loss, p_grad), (torch_loss, torch_grad) = results["triton"], results["torch"]
    near = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(pred.dtype, 1e-4)
    torch.testing.assert_close(torch_loss.double(), torch.as_tensor(wanted), rtol=near, atol=near)
    accurate("loss", loss, torch_loss, torch.as_tensor(wanted), 4.0)
    wanted_grad = torch.from_numpy(pred_gradient_oracle(slope, grad, reduction))
    # Slopes are differences of numbers of about 4 (a normalised target), scaled by the divisor of the loss.
    terms = 8.0 * float(grad.abs().max()) / pred.shape[2] if grad.numel() else 0.0
    accurate("pred gradient", p_grad, torch_grad, wanted_grad, 0 if kind == "l1" else terms)
