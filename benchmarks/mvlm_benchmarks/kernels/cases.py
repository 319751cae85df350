"""Benchmark cases: the shapes at which each op is timed, with reference, minimum bytes and operations.

Inputs are seeded, so that two processes get equal ones. Their values make a wrong result visible.

Shape legend: B batch, H heads, D head width, N patches, K chosen patches, C channels, P patch side, F = C*P*P.
"""

from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.kernels.attention_cases import attention_cases
from mvlm_benchmarks.kernels.inputs import (
    CHANNELS,
    FEATURES,
    MASKED,
    MEAN,
    PATCH,
    PATCHES,
    SIDE,
    STD,
    WIDTH,
    Case,
    Inputs,
    RandomInputs,
)
from mvlm_benchmarks.kernels.layers import layer_cases
from mvlm_kernels.gather_patches import reference as gathering
from mvlm_kernels.pixel_loss import reference as pixels


def cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """All cases for a batch of `batch` images. The core cases come first, then the others by importance."""
    found = [
        *attention_cases(batch, dtype),
        _gather(batch, dtype, torch.uint8, MASKED, core=True),
        _gather(batch, dtype, torch.uint8, PATCHES),
        _gather(batch, dtype, dtype, MASKED),
        _masked_loss(batch, dtype, "l1", False, core=True),
        _masked_loss(batch, dtype, "mse", True),
        _linear_loss(batch, dtype, "l1", core=True),
        _linear_loss(batch, dtype, "mse"),
        _place(batch, dtype, "masked", core=True),
        _place(batch, dtype, "visible"),
        *layer_cases(batch, dtype),
    ]
    if dtype.itemsize == 2:  # as in training, where autocast leaves parameters in float32
        found += [_linear_loss(batch, dtype, "l1", torch.float32), _place(batch, dtype, "masked", torch.float32)]
    return sorted(found, key=lambda case: not case.core)


def _channels(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, float64 (C,) each, on the device of `like`."""
    mean, std = (torch.tensor(values, dtype=torch.float64, device=like.device) for values in (MEAN, STD))
    return mean, std


def _gather(batch: int, dtype: torch.dtype, image_dtype: torch.dtype, count: int, *, core: bool = False) -> Case:
    floating = image_dtype != torch.uint8

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        images = random.images(batch, image_dtype)
        ids = random.patch_ids(batch, count) if count < PATCHES else None
        fixed = {"patch_ids": ids, "patch_size": PATCH, "mean": MEAN, "std": STD, "dtype": dtype}
        if floating:
            return Inputs({"images": images.requires_grad_()}, fixed)
        return Inputs({}, {"images": images, **fixed})

    def reference(images: Tensor, patch_ids: Tensor | None, patch_size: int, **_: Any) -> Tensor:
        return gathering.gather_patches(images, patch_ids, patch_size, *_channels(images), torch.float64)

    ids = 4 * count if count < PATCHES else 0
    out = count * FEATURES * dtype.itemsize
    forward = count * FEATURES * image_dtype.itemsize + ids + out
    backward = out + ids + PATCHES * FEATURES * image_dtype.itemsize if floating else 0
    chosen = f"{count} of {PATCHES}" if count < PATCHES else f"all {PATCHES}"
    shape = f"B{batch} {CHANNELS}x{SIDE}x{SIDE} p{PATCH}, {chosen}, {_name(image_dtype)} -> {_name(dtype)}"
    minimum = batch * forward, batch * backward
    return Case("gather_patches", shape, dtype, make, mvlm_kernels.gather_patches, reference, minimum, core=core)


def _masked_loss(batch: int, dtype: torch.dtype, kind: Any, normalize: bool, *, core: bool = False) -> Case:
    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        draw = random.far_from_pixels if kind == "l1" else random.normal
        pred = draw(batch, MASKED, FEATURES)
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.patch_ids(batch, MASKED)}
        options = {"patch_size": PATCH, "mean": MEAN, "std": STD, "kind": kind, "normalize_target": normalize}
        return Inputs({"pred": pred.detach().requires_grad_()}, {**fixed, **options})

    def reference(pred: Tensor, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        channels = _channels(images)
        return pixels.masked_pixel_loss(pred, images, patch_ids, patch_size, *channels, kind, normalize, True)[0]

    count = batch * MASKED * FEATURES
    # Forward saves the derivative of the loss by each prediction. For L1 it is a sign, of one byte.
    slope = count * (1 if kind == "l1" else dtype.itemsize)
    pred = count * dtype.itemsize
    minimum = pred + count + slope + batch * MASKED * 4 + 4, slope + 4 + pred
    shape = f"B{batch} {MASKED} patches of {FEATURES}, {kind}{', normalised' if normalize else ''}, uint8 images"
    return Case("masked_pixel_loss", shape, dtype, make, mvlm_kernels.masked_pixel_loss, reference, minimum, core=core)


def _linear_loss(
    batch: int, dtype: torch.dtype, kind: Any, parameters: torch.dtype | None = None, *, core: bool = False
) -> Case:
    """linear_pixel_loss. parameters: dtype of weight and bias, if it is not that of the states."""
    weights = parameters or dtype

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "hidden": random.normal(batch, MASKED, WIDTH),
            "weight": random.normal(FEATURES, WIDTH, scale=0.5 * WIDTH**-0.5, dtype=weights),
            # The bias keeps predictions away from the pixels, so that rounding cannot flip the sign of an L1 term.
            "bias": random.far_from_pixels(FEATURES, dtype=weights).requires_grad_()
            if kind == "l1"
            else random.normal(FEATURES, dtype=weights),
        }
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.patch_ids(batch, MASKED)}
        return Inputs(leaves, {**fixed, "patch_size": PATCH, "mean": MEAN, "std": STD, "kind": kind})

    def reference(hidden, weight, bias, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        target = images, patch_ids, patch_size, *_channels(images)
        return pixels.linear_pixel_loss(hidden, weight, bias, *target, kind, False, True)[0]

    rows, item = batch * MASKED, dtype.itemsize
    matrix, hidden = weights.itemsize * FEATURES * (WIDTH + 1), item * rows * WIDTH
    slope = rows * FEATURES * (1 if kind == "l1" else item)
    forward = hidden + matrix + rows * FEATURES + 4 * rows + slope + 4
    # Backward reads the weight but not the bias, and writes the gradients of both.
    minimum = forward, slope + 4 + 2 * hidden + 2 * matrix - weights.itemsize * FEATURES
    product = 2 * rows * FEATURES * WIDTH
    shape = f"B{batch} {MASKED} rows of {WIDTH} -> {FEATURES}, {kind}, uint8 images{_parameters(parameters)}"
    ours = mvlm_kernels.linear_pixel_loss
    sizes = rows, FEATURES, WIDTH
    flops = product, 2 * product
    return Case("linear_pixel_loss", shape, dtype, make, ours, reference, minimum, flops, core, sizes)


def place_reference(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    masked: Tensor | None = None,
    visible_ids: Tensor | None = None,
) -> Tensor:
    """place_tokens in plain torch: choose a token for each patch, put [CLS] in front, add the position embeddings."""
    batch, width = len(tokens), tokens.shape[2]
    fill = mask_token.expand(batch, len(pos_embed) - 1, width)
    if visible_ids is not None:
        x = fill.scatter(1, visible_ids.long()[:, :, None].expand(-1, -1, width), tokens)
    else:
        assert masked is not None
        x = torch.where(masked[:, :, None], fill, tokens)
    return torch.cat([cls_token.expand(batch, 1, width), x], dim=1) + pos_embed


def _place(
    batch: int, dtype: torch.dtype, mode: str, parameters: torch.dtype | None = None, *, core: bool = False
) -> Case:
    """place_tokens. mode: `masked` has a token for every patch, half of them masked; `visible` for a quarter only.

    parameters: dtype of mask token, [CLS] and position embeddings, if it is not that of the tokens.
    """
    visible = PATCHES // 4

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "tokens": random.normal(batch, visible if mode == "visible" else PATCHES, WIDTH),
            "mask_token": random.normal(WIDTH, dtype=parameters),
            "pos_embed": random.normal(1 + PATCHES, WIDTH, dtype=parameters),
            "cls_token": random.normal(WIDTH, dtype=parameters),
        }
        if mode == "visible":
            return Inputs(leaves, {"visible_ids": random.patch_ids(batch, visible)})
        masked = torch.zeros(batch, PATCHES, dtype=torch.bool, device=device)
        return Inputs(leaves, {"masked": masked.scatter(1, random.patch_ids(batch, PATCHES // 2).long(), True)})

    row = dtype.itemsize * WIDTH
    read = visible if mode == "visible" else PATCHES // 2
    written = visible if mode == "visible" else PATCHES
    index = batch * (read * 4 if mode == "visible" else PATCHES)
    wide = WIDTH * (parameters or dtype).itemsize  # of a row of a parameter, and of the output
    vectors, whole = wide * (PATCHES + 3), batch * (1 + PATCHES) * wide
    minimum = batch * read * row + index + vectors + whole, whole + index + batch * written * row + vectors
    tokens = f"{visible} of {PATCHES} visible" if mode == "visible" else f"half of {PATCHES} masked"
    shape = f"B{batch} width {WIDTH}, {tokens}{_parameters(parameters)}"
    return Case("place_tokens", shape, dtype, make, mvlm_kernels.place_tokens, place_reference, minimum, core=core)


def _parameters(dtype: torch.dtype | None) -> str:
    return f", parameters in {_name(dtype)}" if dtype else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
