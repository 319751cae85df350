"""``linear_pixel_loss`` on a GPU: matrix products of cuBLAS, and the kernels of ``masked_pixel_loss``, by chunks.

A chunk is a number of images whose predictions take CHUNK_BYTES, so that they are written and read again in the
L2 cache. No more predictions exist at a time, in either pass. The chunks follow from shapes alone, so the order of all
sums does too. Parameters are cast to hidden's dtype once. Predictions are float32: their rounding would turn the sign
of small differences.

    forward   products of a chunk = hidden @ weight.T; ``loss_kernel`` adds the bias and makes losses and slopes
    backward  gradient of a chunk's predictions, unscaled: the slopes in hidden's dtype. Its products with weight and
              hidden, and its column sums, are the three gradients; those of the parameters add up in float32.

Rows are the B*K masked patches, F = C*P*P the pixels of a patch, D the width of hidden.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mvlm_kernels.pixel_loss.triton import loss_dtype, losses_of, new_slope, scaled_slope, total, write_losses

# About half of the L2 cache of an A100 (40 MB) or H100 (50 MB): predictions share it with pixels, slopes and weight.
CHUNK_BYTES = 24 * 2**20
# Chunks of a multiple of 16 images begin at multiples of 16 bytes in every tensor, so that all of them launch the same
# signatures.
CHUNK_IMAGES = 16


def chunks(batch: int, bytes_of_an_image: int) -> Iterator[slice]:
    """Slices of a batch: as many images as have CHUNK_BYTES of predictions, rounded to a multiple of CHUNK_IMAGES."""
    fitting = CHUNK_BYTES // max(1, bytes_of_an_image)
    size = max(1, fitting // CHUNK_IMAGES) * CHUNK_IMAGES
    for start in range(0, batch, size):
        yield slice(start, min(start + size, batch))


def linear_pixel_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    images: Tensor,
    patch_ids: Tensor | None,
    patch_size: int,
    mean: Tensor | None,
    std: Tensor | None,
    kind: str,
    normalize_target: bool,
    reduce: bool,
    with_slope: bool,
) -> tuple[Tensor, Tensor]:
    """Loss and slope of hidden (B, K, D), weight (F, D), bias (F,) and images (B, C, H, W), of any strides.

    patch_ids is (B, K), or None for all patches; mean and std are (C,) or None. The loss is a scalar if reduce, else
    (B, K), in float32, or in float64 for float64 inputs. slope is (B, K, F), empty without with_slope.
    """
    batch, chosen, _ = hidden.shape
    features = weight.shape[0]
    weight = weight.to(hidden.dtype)
    bias = None if bias is None else bias.to(hidden.dtype).contiguous()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    slope = new_slope((batch, chosen, features) if with_slope else (0, 0, 0), kind, hidden)
    parts = list(chunks(batch, chosen * features * wide.itemsize))
    counts = [losses_of((part.stop - part.start) * chosen, features, reduce) for part in parts]
    # In its final shape: autograd forbids to write to a view that a Function made.
    shape = sum(counts) if reduce else (batch, chosen)
    losses = hidden.new_empty(shape, dtype=loss_dtype(hidden.dtype, images.dtype))
    for part, part_losses in zip(parts, losses.flatten().split(counts), strict=True):
        pred = product(hidden[part].flatten(0, 1), weight.T, wide).view(part.stop - part.start, chosen, features)
        ids = None if patch_ids is None else patch_ids[part]
        write_losses(
            pred, bias, images[part], ids, patch_size, mean, std, kind, normalize_target, reduce, part_losses,
            slope[part] if with_slope else None,
        )  # fmt: skip
    return (total(losses, batch * chosen) if reduce else losses), slope


def linear_pixel_loss_backward(
    grad: Tensor, slope: Tensor, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (B, K, D), weight (F, D) and bias (F,), each in its own dtype, empty where not needed.

    grad is the incoming gradient, a scalar or (B, K); slope (B, K, F) is the forward's.

    Products are taken of slopes, which are of the order of 1, and what is common to all rows multiplies the result: the
    gradient of a mean, or the largest gradient of (B, K) losses, whose rows are divided by it first. Otherwise a scaled
    loss would overflow float16, and the gradient of a mean would be rounded to 8 bits in bfloat16.
    """
    batch, chosen, width = hidden.shape
    features, rows = weight.shape[0], batch * chosen
    dtype, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    hidden_grad = hidden.new_empty(hidden.shape if needs[0] else (0,))
    weight_sum = torch.zeros((features, width) if needs[1] else 0, dtype=wide, device=weight.device)
    bias_sum = torch.zeros(features if needs[2] else 0, dtype=wide, device=weight.device)
    per_row = None
    factor = grad / (max(1, rows) * features)
    if grad.ndim:
        largest = grad.abs().amax() if rows else grad.new_ones(())
        largest = largest.clamp_min(torch.finfo(grad.dtype).tiny)
        per_row, factor = grad / largest, largest / features
    # float16 could not hold the product of a weight and the factor, which is about 1 / (B*K*F).
    scaled = None if dtype == torch.float16 else (weight * factor).to(dtype)
    for part in chunks(batch, chosen * features * wide.itemsize):
        slopes = slope[part]
        if per_row is not None or slopes.dtype != dtype:
            slopes = scaled_slope(slopes, None if per_row is None else per_row[part], 1, dtype)
        slopes = slopes.flatten(0, 1)  # (rows of the chunk, F)
        if needs[0]:
            out = hidden_grad[part].flatten(0, 1)
            if scaled is not None:
                torch.mm(slopes, scaled, out=out)
            else:
                torch.mul(product(slopes, weight.to(dtype), wide), factor, out=out)
        if needs[1]:
            weight_sum += product(slopes.T, hidden[part].flatten(0, 1), wide)
        if needs[2]:
            bias_sum += slopes.sum(dim=0, dtype=wide)
    return hidden_grad, (weight_sum * factor).to(weight.dtype), (bias_sum * factor).to(weight.dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in ``dtype``."""
    if a.dtype == dtype:
        return a @ b
    if a.device.type == "cpu":  # torch has this product of narrow operands on CUDA only
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)
