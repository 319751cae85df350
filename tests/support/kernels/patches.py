"""Images and patch ids of every layout, oracles in NumPy loops, and the check of ``gather_patches``."""

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from mvlm_kernels import gather_patches, use_backend
from support.kernels.accuracy import accurate
from triton_proof.allocations import guarded

LAYOUTS = ("contiguous", "channels_last", "expanded", "strided", "transposed")
MEAN = (0.485, 0.456, 0.406, 0.5, 0.25)
STD = (0.229, 0.224, 0.225, 0.5, 0.125)

# The fixtures have no state that an example could change, and interpreted kernels differ in speed.
SETTINGS = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def make_images(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, seed: int = 0) -> Tensor:
    """Random images (B, C, H, W) in the memory layout ``layout``."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)

    def values(*size: int) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        return torch.rand(size, generator=generator, dtype=torch.float64).to(dtype)

    if layout == "channels_last":
        return values(batch, height, width, channels).permute(0, 3, 1, 2)
    if layout == "expanded":
        return values(1, channels, height, width).expand(shape)
    if layout == "strided":
        return values(batch, channels + 1, height + 1, 2 * width)[:, 1:, :height, ::2]
    if layout == "transposed":
        return values(batch, channels, width, height).transpose(2, 3)
    return values(*shape)


def make_ids(batch: int, count: int, num_patches: int, dtype: torch.dtype = torch.int64, seed: int = 0) -> Tensor:
    """Patch ids (B, count), distinct within a row if count is at most num_patches."""
    generator = torch.Generator().manual_seed(seed)
    if count <= num_patches:
        rows = [torch.randperm(num_patches, generator=generator)[:count] for _ in range(batch)]
        return torch.stack(rows).to(dtype) if batch else torch.empty(0, count, dtype=dtype)
    return torch.randint(0, num_patches, (batch, count), generator=generator).to(dtype)


def patches_oracle(images: Tensor, ids: Tensor | None, patch: int, mean, std) -> np.ndarray:
    """Normalised patches (B, K, C*P*P) in float64, patch by patch."""
    pixels = images.detach().double().numpy() / (255 if images.dtype == torch.uint8 else 1)
    batch, channels, height, width = pixels.shape
    for c in range(channels):
        pixels[:, c] = (pixels[:, c] - (0 if mean is None else mean[c])) / (1 if std is None else std[c])
    columns = width // patch
    count = (height // patch) * columns if ids is None else ids.shape[1]
    out = np.empty((batch, count, channels * patch * patch))
    for b in range(batch):
        for k in range(count):
            y, x = divmod(k if ids is None else int(ids[b, k]), columns)
            out[b, k] = pixels[b, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch].reshape(-1)
    return out


def losses_oracle(pred: np.ndarray, target: np.ndarray, kind: str, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
    """Loss of each patch (B, K) and derivative by the prediction of each pixel (B, K, F), before any mean."""
    loss, slope = np.zeros(pred.shape[:2]), np.zeros(pred.shape)
    for b in range(pred.shape[0]):
        for k in range(pred.shape[1]):
            wanted = target[b, k]
            if normalize:
                wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
            d = pred[b, k] - wanted
            if kind == "l1":
                loss[b, k], slope[b, k] = np.abs(d).mean(), np.sign(d)
            else:
                loss[b, k], slope[b, k] = (d * d).mean(), 2 * d
    return loss, slope


def check_gather(images, ids, patch, mean=None, std=None, dtype=None, device="cpu"):
    """Compare values and gradient of the kernels with loops in float64, within twice the error of the torch code."""
    results = {}
    grad = None
    for backend in ("triton", "torch"):
        x = guarded(images, device if backend == "triton" else "cpu")
        if x.dtype.is_floating_point:
            x.requires_grad_()
        with use_backend(backend):
            at = None if ids is None else guarded(ids, x.device)
            out = gather_patches(x, at, patch, mean=mean, std=std, dtype=dtype)
            if x.requires_grad:
                grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
                out.backward(grad.to(x.device))
        results[backend] = out.detach().cpu(), None if x.grad is None else x.grad.cpu()
    oracle = patches_oracle(images, ids, patch, mean, std)
    (out, image_grad), (torch_out, torch_grad) = results["triton"], results["torch"]
    assert out.is_contiguous()
    accurate("patches", out, torch_out, torch.from_numpy(oracle), 0 if mean is None else 1 / min(std or (1.0,)))
    if image_grad is not None:
        assert grad is not None
        wanted = gradient_oracle(grad, images.shape, ids, patch, std)
        accurate("image gradient", image_grad, torch_grad, wanted)


def gradient_oracle(grad, shape, ids, patch, std):
    g = grad.double().numpy()
    batch, channels, _, width = shape
    out = np.zeros(tuple(shape))
    for b in range(batch):
        for k in range(g.shape[1]):
            y, x = divmod(k if ids is None else int(ids[b, k]), width // patch)
            out[b, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] += g[b, k].reshape(channels, patch, -1)
    if std is not None:
        out /= np.asarray(std, dtype=float).reshape(1, -1, 1, 1)
    return torch.from_numpy(out)
