"""Benchmark cases: the shapes at which each op is timed, with reference, minimum bytes and operations.

Inputs are seeded, so that two processes get equal ones. Their values make a wrong result visible.

Shape legend: B batch, H heads, D head width, N patches, K chosen patches, C channels, P patch side, F = C*P*P.
"""

from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.kernels.attention_cases import Shape, attention_case, attention_cases
from mvlm_benchmarks.kernels.inputs import MEAN, PAPER, SMALL, STD, Case, Inputs, RandomInputs, Sizes
from mvlm_benchmarks.kernels.layers import add_layer_norm_case, gelu_linear_case, layer_cases
from mvlm_kernels.gather_patches import reference as gathering
from mvlm_kernels.pixel_loss import reference as pixels


def cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """All cases for a batch of `batch` images. The core cases come first, then the others by importance."""
    found = [
        *layer_cases(batch, dtype),
        *attention_cases(batch, dtype),
        _gather(batch, dtype, torch.uint8, core=True),
        _gather(batch, dtype, torch.uint8, whole=True),
        _gather(batch, dtype, dtype),
        _masked_loss(batch, dtype, "l1", False, core=True),
        _masked_loss(batch, dtype, "mse", True),
        place_case(batch, dtype, "masked", core=True),
        place_case(batch, dtype, "visible"),
    ]
    if dtype.itemsize == 2:  # as in training, where autocast leaves parameters in float32
        found += [place_case(batch, dtype, mode, torch.float32) for mode in ("masked", "both")]
    return sorted(found, key=lambda case: not case.core)


def small_cases(dtype: torch.dtype) -> list[Case]:
    """One case of each kernel, and of each layout of attention, at sizes of which none is a multiple of a tile."""
    shapes = [
        Shape(2, 37, 2, 19),
        Shape(2, 19, 2, 37 + 128),
        Shape(2, 37, 2, 19, layout_k="packed"),
        Shape(5, 19, 2, 37 + 128, index="drawn"),
        Shape(3, 19, 3, 19, "packed", "packed"),
        Shape(5, 1, 2, 19, layout_k="packed", index="drawn"),
    ]
    return [
        *(attention_case(shape, dtype, heads=1) for shape in shapes),
        _gather(2, dtype, dtype, sizes=SMALL),
        _masked_loss(2, dtype, "mse", False, sizes=SMALL),
        place_case(2, dtype, "masked", sizes=SMALL),
        add_layer_norm_case(37, dtype, SMALL.width),
        gelu_linear_case(37, dtype, SMALL.width),
    ]


def _channels(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, float64 (C,) each, on the device of `like`."""
    mean, std = (torch.tensor(values, dtype=torch.float64, device=like.device) for values in (MEAN, STD))
    return mean, std


def _gather(
    batch: int,
    dtype: torch.dtype,
    image_dtype: torch.dtype,
    *,
    whole: bool = False,
    core: bool = False,
    sizes: Sizes = PAPER,
) -> Case:
    """gather_patches of the masked patches, or of the whole image. Images in uint8 have no gradient."""
    floating, count = image_dtype != torch.uint8, sizes.patches if whole else sizes.masked

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed, sizes)
        images = random.images(batch, image_dtype)
        ids = None if whole else random.patch_ids(batch, count)
        fixed = {"patch_ids": ids, "patch_size": sizes.patch, "mean": MEAN, "std": STD, "dtype": dtype}
        if floating:
            return Inputs({"images": images.requires_grad_()}, fixed)
        return Inputs({}, {"images": images, **fixed})

    def reference(images: Tensor, patch_ids: Tensor | None, patch_size: int, **_: Any) -> Tensor:
        return gathering.gather_patches(images, patch_ids, patch_size, *_channels(images), torch.float64)

    ids = 0 if whole else 4 * count
    out = count * sizes.features * dtype.itemsize
    forward = count * sizes.features * image_dtype.itemsize + ids + out
    backward = out + ids + sizes.patches * sizes.features * image_dtype.itemsize if floating else 0
    chosen = f"all {count}" if whole else f"{count} of {sizes.patches}"
    images = f"B{batch} {sizes.channels}x{sizes.side}x{sizes.side} p{sizes.patch}"
    shape = f"{images}, {chosen}, {_name(image_dtype)} -> {_name(dtype)}"
    minimum = batch * forward, batch * backward
    return Case("gather_patches", shape, dtype, make, mvlm_kernels.gather_patches, reference, minimum, core=core)


def _masked_loss(
    batch: int, dtype: torch.dtype, kind: Any, normalize: bool, *, core: bool = False, sizes: Sizes = PAPER
) -> Case:
    masked, features = sizes.masked, sizes.features

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed, sizes)
        draw = random.far_from_pixels if kind == "l1" else random.normal
        pred = draw(batch, masked, features)
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.patch_ids(batch, masked)}
        options = {"patch_size": sizes.patch, "mean": MEAN, "std": STD, "kind": kind, "normalize_target": normalize}
        return Inputs({"pred": pred.detach().requires_grad_()}, {**fixed, **options})

    def reference(pred: Tensor, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        channels = _channels(images)
        return pixels.masked_pixel_loss(pred, images, patch_ids, patch_size, *channels, kind, normalize, True)[0]

    count = batch * masked * features
    # Forward saves the derivative of the loss by each prediction. For L1 it is a sign, of one byte.
    slope = count * (1 if kind == "l1" else dtype.itemsize)
    pred = count * dtype.itemsize
    minimum = pred + count + slope + batch * masked * 4 + 4, slope + 4 + pred
    shape = f"B{batch} {masked} patches of {features}, {kind}{', normalised' if normalize else ''}, uint8 images"
    return Case("masked_pixel_loss", shape, dtype, make, mvlm_kernels.masked_pixel_loss, reference, minimum, core=core)


def place_reference(
    tokens: Tensor,
    mask_token: Tensor,
    pos_embed: Tensor,
    cls_token: Tensor,
    masked: Tensor | None = None,
    visible_ids: Tensor | None = None,
    with_unmasked: bool = False,
) -> Tensor:
    """place_tokens in plain torch: choose a token for each patch, put [CLS] in front, add the position embeddings."""
    batch, width = len(tokens), tokens.shape[2]
    fill = mask_token.expand(batch, len(pos_embed) - 1, width)
    if visible_ids is not None:
        x = fill.scatter(1, visible_ids.long()[:, :, None].expand(-1, -1, width), tokens)
    else:
        assert masked is not None
        x = torch.where(masked[:, :, None], fill, tokens)
    if with_unmasked:
        batch, x = 2 * batch, torch.cat([tokens, x])
    return torch.cat([cls_token.expand(batch, 1, width), x], dim=1) + pos_embed


def place_case(
    batch: int, dtype: torch.dtype, mode: str, parameters: torch.dtype | None = None, *, core: bool = False,
    sizes: Sizes = PAPER,
) -> Case:  # fmt: skip
    """place_tokens. mode: `masked` has a token for every patch, half of them masked; `visible` for a quarter only.

    `both`: as `masked`, and the sequences without a mask, as in a step.

    parameters: dtype of mask token, [CLS] and position embeddings, if it is not that of the tokens.
    """
    patches, width = sizes.patches, sizes.width
    visible = patches // 4

    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed, sizes)
        leaves = {
            "tokens": random.normal(batch, visible if mode == "visible" else patches, width),
            "mask_token": random.normal(width, dtype=parameters),
            "pos_embed": random.normal(1 + patches, width, dtype=parameters),
            "cls_token": random.normal(width, dtype=parameters),
        }
        if mode == "visible":
            return Inputs(leaves, {"visible_ids": random.patch_ids(batch, visible)})
        masked = torch.zeros(batch, patches, dtype=torch.bool, device=device)
        masked = masked.scatter(1, random.patch_ids(batch, patches // 2).long(), True)
        return Inputs(leaves, {"masked": masked, "with_unmasked": mode == "both"})

    row = dtype.itemsize * width
    read = {"visible": visible, "masked": patches // 2, "both": patches}[mode]
    written = visible if mode == "visible" else patches
    index = batch * (read * 4 if mode == "visible" else patches)
    wide = width * (parameters or dtype).itemsize  # of a row of a parameter, and of the output
    vectors, whole = wide * (patches + 3), batch * (1 + patches) * wide * (2 if mode == "both" else 1)
    minimum = batch * read * row + index + vectors + whole, whole + index + batch * written * row + vectors
    tokens = f"{visible} of {patches} visible" if mode == "visible" else f"half of {patches} masked"
    tokens = f"unmasked and {tokens}" if mode == "both" else tokens
    shape = f"B{batch} width {width}, {tokens}{_parameters(parameters)}"
    return Case("place_tokens", shape, dtype, make, mvlm_kernels.place_tokens, place_reference, minimum, core=core)


def _parameters(dtype: torch.dtype | None) -> str:
    return f", parameters in {_name(dtype)}" if dtype else ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
