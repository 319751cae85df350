"""Small cases of every op: for rehearsals on a CPU, where kernels are interpreted, and for tools that slow a GPU down.

Shapes are odd on purpose: no length is a multiple of a tile.

Shape legend: B images, C channels, P patch side, N patches, K chosen patches, F = C*P*P.
"""

from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.kernels.attention_cases import Shape, attention_case
from mvlm_benchmarks.kernels.cases import place_reference
from mvlm_benchmarks.kernels.inputs import Case, Inputs, RandomInputs
from mvlm_benchmarks.kernels.layers import add_layer_norm_case, gelu_linear_case
from mvlm_kernels.gather_patches import reference as gathering
from mvlm_kernels.pixel_loss import reference as pixels

IMAGES, CHANNELS, PATCH, GRID, CHOSEN, WIDTH = 2, 3, 8, 3, 5, 40
PATCHES, FEATURES = GRID**2, CHANNELS * PATCH**2
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def small_cases(dtype: torch.dtype) -> list[Case]:
    """One case of each kernel, and of each layout of attention."""
    shapes = [
        Shape(2, 37, 2, 19),
        Shape(2, 19, 2, 37 + 128),
        Shape(2, 37, 2, 19, layout_k="packed"),
        Shape(5, 19, 2, 37 + 128, index="drawn"),
        Shape(3, 19, 3, 19, "packed", "packed"),
        Shape(5, 1, 2, 19, layout_k="packed", index="drawn"),
    ]
    others = [
        _gather(dtype), _masked_loss(dtype), _linear_loss(dtype), _place(dtype),
        add_layer_norm_case(37, dtype, WIDTH), gelu_linear_case(37, dtype, WIDTH),
    ]  # fmt: skip
    return [*(attention_case(shape, dtype, heads=1) for shape in shapes), *others]


def _images(random: RandomInputs) -> Tensor:
    side = GRID * PATCH
    return random.images(IMAGES, torch.uint8)[:, :, :side, :side].contiguous()


def _ids(random: RandomInputs) -> Tensor:
    return random.patch_ids(IMAGES, CHOSEN, PATCHES)


def _channels(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64, device=like.device) for values in (MEAN, STD))
    return mean, std


def _target(random: RandomInputs) -> dict[str, Any]:
    return {
        "images": _images(random), "patch_ids": _ids(random), "patch_size": PATCH, "mean": MEAN, "std": STD,
    }  # fmt: skip


def _gather(dtype: torch.dtype) -> Case:
    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        images = (_images(random) / 255).to(dtype).requires_grad_()
        rest = {key: value for key, value in _target(random).items() if key != "images"}
        return Inputs({"images": images}, {**rest, "dtype": dtype})

    def reference(images: Tensor, patch_ids: Tensor, **_: Any) -> Tensor:
        return gathering.gather_patches(images, patch_ids, PATCH, *_channels(images), torch.float64)

    return Case("gather_patches", "small", dtype, make, mvlm_kernels.gather_patches, reference, (1, 1))


def _masked_loss(dtype: torch.dtype) -> Case:
    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        return Inputs({"pred": random.normal(IMAGES, CHOSEN, FEATURES)}, {**_target(random), "kind": "mse"})

    def reference(pred: Tensor, images: Tensor, patch_ids: Tensor, **_: Any) -> Tensor:
        return pixels.masked_pixel_loss(pred, images, patch_ids, PATCH, *_channels(images), "mse", False, True)[0]

    return Case("masked_pixel_loss", "small", dtype, make, mvlm_kernels.masked_pixel_loss, reference, (1, 1))


def _linear_loss(dtype: torch.dtype) -> Case:
    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "hidden": random.normal(IMAGES, CHOSEN, WIDTH),
            "weight": random.normal(FEATURES, WIDTH, scale=WIDTH**-0.5),
            "bias": random.normal(FEATURES),
        }
        return Inputs(leaves, {**_target(random), "kind": "mse"})

    def reference(hidden, weight, bias, images: Tensor, patch_ids: Tensor, **_: Any) -> Tensor:
        channels = _channels(images)
        return pixels.linear_pixel_loss(
            hidden, weight, bias, images, patch_ids, PATCH, *channels, "mse", False, True
        )[0]  # fmt: skip

    return Case("linear_pixel_loss", "small", dtype, make, mvlm_kernels.linear_pixel_loss, reference, (1, 1))


def _place(dtype: torch.dtype) -> Case:
    def make(device: str, seed: int = 0) -> Inputs:
        random = RandomInputs(device, dtype, seed)
        leaves = {
            "tokens": random.normal(IMAGES, PATCHES, WIDTH),
            "mask_token": random.normal(WIDTH),
            "pos_embed": random.normal(1 + PATCHES, WIDTH),
            "cls_token": random.normal(WIDTH),
        }
        masked = torch.zeros(IMAGES, PATCHES, dtype=torch.bool, device=device)
        return Inputs(leaves, {"masked": masked.scatter(1, _ids(random).long(), True)})

    return Case("place_tokens", "small", dtype, make, mvlm_kernels.place_tokens, place_reference, (1, 1))
