"""Cases of ``gather_patches``, and its oracle.

Legend: B images, C channels, P patch side, N patches, K chosen patches, F = C*P*P.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels.case import LAYOUTS, MEAN, PAPER, SMALL, STD, Case, Draw, Inputs, Layout, Sizes, name_of
from mvlm_kernels.gather_patches import gather_patches

FAST = {"bf16/channels_last/p7"}
"""Labels of the cases that the PTX emulator runs in every run of the tests; longer runs take all emulated cases."""
PIXELS = {"uint8": torch.uint8, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def oracle(
    images: Tensor, patch_ids: Tensor | None, patch_size: int, mean: Any = None, std: Any = None, **_: Any
) -> Tensor:
    """All patches of the normalised images as windows of them, then the chosen ones: float64 (B, K, F)."""
    pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    for values, change in ((mean, torch.sub), (std, torch.div)):
        if values is not None:
            pixels = change(pixels, torch.as_tensor(values, dtype=torch.float64, device=images.device)[:, None, None])
    windows = pixels.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # (B, C, H/P, W/P, P, P)
    patches = windows.flatten(2, 3).transpose(1, 2).flatten(2)
    if patch_ids is None:
        return patches
    return patches.gather(1, patch_ids.long()[:, :, None].expand(-1, -1, patches.shape[2]))


def case(
    label: str,
    batch: int,
    grid: tuple[int, int],
    patch: int,
    count: int | None,
    images: torch.dtype,
    dtype: torch.dtype | None = None,
    *,
    channels: int = 3,
    layout: Layout = "contiguous",
    ids: torch.dtype = torch.int32,
    mean: Sequence[float] | None = MEAN,
    std: Sequence[float] | None = STD,
    ascending: bool = False,
) -> Case:
    """Case of `gather_patches` on images of `grid` patches, of which `count` are gathered, None for all.

    images: dtype of the pixels; in uint8 they have no gradient. dtype: of the result.
    """
    patches, features = grid[0] * grid[1], channels * patch**2
    chosen, made = patches if count is None else count, dtype or (torch.float32 if images == torch.uint8 else images)

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        pixels = draw.images(batch, channels, grid[0] * patch, grid[1] * patch, images, layout)
        numbers = None if count is None else draw.patch_ids(batch, count, patches, ids, ascending)
        fixed = {"patch_ids": numbers, "patch_size": patch, "mean": mean, "std": std, "dtype": dtype}
        return (
            Inputs({"images": pixels}, fixed) if pixels.is_floating_point() else Inputs({}, {"images": pixels, **fixed})
        )

    of_ids, out = 0 if count is None else ids.itemsize * chosen, chosen * features * made.itemsize
    forward = chosen * features * images.itemsize + of_ids + out
    backward = 0 if images == torch.uint8 else out + of_ids + patches * features * images.itemsize
    return Case(
        "gather_patches", label, made, make, gather_patches, oracle, (batch * forward, batch * backward),
        terms={} if mean is None else {"out": 1 / min(std or (1.0,))},
    )  # fmt: skip


def _sized(
    batch: int, dtype: torch.dtype, images: torch.dtype, sizes: Sizes = PAPER, whole: bool = False, core: bool = False
) -> Case:
    """Case of images of these sizes, of which the masked patches are gathered, or all if `whole`."""
    chosen = f"all {sizes.patches}" if whole else f"{sizes.masked} of {sizes.patches}"
    label = f"B{batch} {sizes.channels}x{sizes.side}x{sizes.side} p{sizes.patch}, {chosen}, {name_of(images)}"
    count = None if whole else sizes.masked
    made = case(f"{label} -> {name_of(dtype)}", batch, sizes.grid, sizes.patch, count, images, dtype, ascending=True)
    return replace(made, core=core)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return [
        _sized(batch, dtype, torch.uint8, core=True),
        _sized(batch, dtype, torch.uint8, whole=True),
        _sized(batch, dtype, dtype),
    ]


def small(dtype: torch.dtype) -> list[Case]:
    return [_sized(2, dtype, dtype, SMALL)]


def compiled() -> Iterator[Case]:
    for name, images, dtype in (
        ("uint8-bf16", torch.uint8, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("fp32", torch.float32, torch.float32),
    ):
        for patch in (14, 16, 32) if name == "uint8-bf16" else (16,):
            yield case(
                f"{name}/p{patch}", 64, (224 // patch, 224 // patch), patch, 116 if patch < 32 else 40, images, dtype
            )
    yield case("bf16/p16/channels-last", 64, (14, 14), 16, 116, torch.bfloat16, torch.bfloat16, layout="channels_last")


def emulated() -> Iterator[Case]:
    for name, images in PIXELS.items():
        for layout in LAYOUTS:
            for patch in (7, 16):
                yield case(f"{name}/{layout}/p{patch}", 2, (2, 3), patch, 9 if patch == 7 else 4, images, layout=layout)
        for patch in (1, 14, 32):
            yield case(f"{name}/every-patch/p{patch}", 2, (2, 3), patch, None, images, mean=None, std=None)
        out = torch.bfloat16 if images == torch.uint8 else None
        yield case(f"{name}/224px", 2, (14, 14), 16, 116, images, out)
    yield case("p64", 1, (1, 2), 64, 3, torch.bfloat16)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Small cases of patches of 4 x 4 pixels, whose sizes depend on `number`; see `mvlm_kernels.cases.properties`."""
    batch, count, rows = 2 + number, 3 + number, 2 + number % 2
    values: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.3, 0.5, 0.7], "ids": torch.int64}
    none: dict[str, Any] = {"mean": None, "std": None}
    yield case("patches", batch, (rows, rows), 4, count, dtype, **values)
    yield case("patches, all", batch, (rows, rows), 4, None, dtype, **none)
    yield case("patches, whole images", batch, (1, 1), 4 * rows, None, dtype, **none)
    yield case("patches, whole images by ids", batch, (1, 1), 4 * rows, count, dtype, **values)
