"""Cases of ``masked_pixel_loss``, and its oracle.

Legend: B images, C channels, P patch side, N patches, K predicted patches, F = C*P*P.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels.case import MEAN, PAPER, SMALL, STD, Case, Draw, Inputs, Layout, Sizes
from mvlm_kernels.gather_patches import cases as patches
from mvlm_kernels.pixel_loss import masked_pixel_loss

FAST = {"masked/bf16/l1/raw/mean/p16", "masked/bf16/mse/normalized/none/p16"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("l1", "mse")


def oracle(
    pred: Tensor, images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: Any = None, std: Any = None,
    kind: str = "l1", normalize_target: bool = False, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Mean distance of predictions (B, K, F) and pixels, for each patch or over all of them."""
    target = patches.oracle(images, patch_ids, patch_size, mean, std)
    if normalize_target:
        centred = target - target.mean(2, keepdim=True)
        target = centred / (centred.square().sum(2, keepdim=True) / (target.shape[2] - 1) + 1e-6).sqrt()
    difference = pred - target
    loss = difference.abs() if kind == "l1" else difference * difference
    return loss.mean(2) if reduction == "none" else loss.sum() / max(1, loss.numel())


def case(
    label: str,
    batch: int,
    grid: tuple[int, int],
    patch: int,
    count: int | None,
    images: torch.dtype,
    dtype: torch.dtype,
    *,
    channels: int = 3,
    layout: Layout = "contiguous",
    ids: torch.dtype = torch.int32,
    mean: Sequence[float] | None = MEAN,
    std: Sequence[float] | None = STD,
    kind: Any = "l1",
    normalize: bool = False,
    reduction: Any = "mean",
    strided: bool = False,
    ascending: bool = False,
    far: bool = False,
) -> Case:
    """Case of `masked_pixel_loss` with predictions of `count` patches of each image, None for all.

    far: predictions lie far from all pixels, so that no sign of an L1 term depends on rounding. strided: they are every
    second value of a buffer.
    """
    chosen, features = grid[0] * grid[1] if count is None else count, channels * patch**2

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        shape = batch, chosen, features * (1 + strided)
        pred = (draw.far_from_pixels if far else draw.normal)(*shape, dtype=dtype)[..., :: 1 + strided]
        pixels = draw.images(batch, channels, grid[0] * patch, grid[1] * patch, images, layout)
        numbers = None if count is None else draw.patch_ids(batch, count, grid[0] * grid[1], ids, ascending)
        fixed = {"images": pixels, "patch_ids": numbers, "patch_size": patch, "mean": mean, "std": std, "kind": kind}
        return Inputs({"pred": pred}, {**fixed, "normalize_target": normalize, "reduction": reduction})

    values = batch * chosen * features
    # Forward saves the derivative of the loss by each prediction. For L1 it is a sign, of one byte.
    slope, read = values * (1 if kind == "l1" else dtype.itemsize), values * dtype.itemsize
    minimum = read + values * images.itemsize + slope + batch * chosen * 4 + 4, slope + 4 + read
    # Slopes are differences of numbers of about 4 (a normalised target), scaled by the divisor of the loss.
    terms = {"out": 4.0, "pred": 0.0 if kind == "l1" else 8.0 / features}
    return Case("masked_pixel_loss", label, dtype, make, masked_pixel_loss, oracle, minimum, terms=terms)


def _sized(
    batch: int, dtype: torch.dtype, kind: str, normalize: bool, sizes: Sizes = PAPER, core: bool = False
) -> Case:
    shape = f"B{batch} {sizes.masked} patches of {sizes.features}"
    made = case(
        f"{shape}, {kind}{', normalised' if normalize else ''}, uint8 images", batch, sizes.grid, sizes.patch,
        sizes.masked, torch.uint8, dtype, kind=kind, normalize=normalize, ascending=True, far=kind == "l1",
    )  # fmt: skip
    return replace(made, core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return [_sized(batch, dtype, "l1", False, core=True), _sized(batch, dtype, "mse", True)]


def small(dtype: torch.dtype) -> list[Case]:
    return [_sized(2, dtype, "mse", False, SMALL)]


def compiled() -> Iterator[Case]:
    for (name, dtype), kind in itertools.product(TYPES.items(), KINDS):
        images = torch.uint8 if kind == "l1" else dtype
        yield case(f"{name}/{kind}/p16", 64, (14, 14), 16, 116, images, dtype, kind=kind)
    for patch in (14, 32):
        yield case(
            f"bf16/mse/p{patch}/normalized", 64, (224 // patch, 224 // patch), patch, 116 if patch < 32 else 40,
            torch.uint8, torch.bfloat16, kind="mse", normalize=True,
        )  # fmt: skip


def emulated() -> Iterator[Case]:
    for (name, dtype), kind, normalize, reduction in itertools.product(
        TYPES.items(), KINDS, (False, True), ("mean", "none")
    ):
        options: dict[str, Any] = {"kind": kind, "normalize": normalize, "reduction": reduction}
        for patch, images in ((16, torch.uint8), (7, dtype), (14, torch.uint8)):
            label = f"masked/{name}/{kind}/{'normalized' if normalize else 'raw'}/{reduction}/p{patch}"
            yield case(label, 2, (2, 3), patch, 4, images, dtype, layout="channels_last", **options)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of uint8 images, whose sizes depend on `number`; see :func:`mvlm_kernels.cases.properties`."""
    grid = 2 + number % 2, 2 + number % 2
    options: dict[str, Any] = {"mean": None, "std": None, "ids": torch.int64}
    for label, kind, reduction in (("loss", "mse", "mean"), ("loss, l1 of each patch", "l1", "none")):
        yield case(
            label, 2 + number, grid, 4, 3 + number, torch.uint8, dtype, kind=kind, reduction=reduction, **options
        )
