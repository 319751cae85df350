"""Cases of the ops that read images: gathered patches and the two pixel losses, at the paper's shapes."""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import configs
from mvlm_kernels.case import CHANNELS, FEATURES, MASKED, PATCH, PATCHES, SIDE, WIDTH, Case, Sizes, patch_ids
from mvlm_kernels.patch_gather import gather_patches
from mvlm_kernels.pixel_loss import linear_pixel_loss, masked_pixel_loss


def _images(batch: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.zeros(batch, CHANNELS, SIDE, SIDE, dtype=dtype, device=device)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _usual_patches(images: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise, patchify, gather, as the MAE family does."""
    shape = (1, CHANNELS, 1, 1)
    mean = torch.zeros(shape, device=images.device, dtype=dtype)
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    x = (x - mean) / (mean + 1)
    grid = SIDE // PATCH
    x = x.reshape(-1, CHANNELS, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCHES, FEATURES)
    return x.gather(1, ids.long()[:, :, None].expand(-1, -1, FEATURES))


def gather(dtype: torch.dtype) -> Case:
    floating = dtype != torch.uint8

    def inputs(sizes: Sizes, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
        images, ids = _images(sizes["B"], device, dtype), patch_ids(sizes["B"], MASKED, device)
        return ([images.requires_grad_()] if floating else []), images, ids

    def run(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda *_: gather_patches(images, ids, PATCH, mean=MEAN, std=STD, dtype=torch.bfloat16)

    def usual(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda *_: _usual_patches(images, ids, torch.bfloat16)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        ids, out = MASKED * 4, MASKED * FEATURES * 2
        read = MASKED * FEATURES * dtype.itemsize
        backward = out + ids + PATCHES * FEATURES * dtype.itemsize if floating else 0
        return sizes["B"] * (read + ids + out), sizes["B"] * backward

    name = f"B256 3x224x224 p16, 116 of 196, {str(dtype).removeprefix('torch.')} -> bfloat16"
    return Case("gather_patches", name, {"B": 256}, {"B": (1, 2)}, run, usual, minimum)


def masked(kind: str, normalize: bool) -> Case:
    def inputs(sizes: Sizes, device: str):
        pred = torch.zeros(sizes["B"], MASKED, FEATURES, dtype=torch.bfloat16, device=device, requires_grad=True)
        return pred, _images(sizes["B"], device, torch.uint8), patch_ids(sizes["B"], MASKED, device)

    def run(sizes: Sizes, device: str):
        pred, images, ids = inputs(sizes, device)
        options: Any = {"mean": MEAN, "std": STD, "kind": kind, "normalize_target": normalize}
        return [pred], lambda pred: masked_pixel_loss(pred, images, ids, PATCH, **options)

    def usual(sizes: Sizes, device: str):
        pred, images, ids = inputs(sizes, device)
        return [pred], lambda pred: _usual_loss(pred, images, ids, kind, normalize)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        pixels = sizes["B"] * MASKED * FEATURES
        slope = pixels if kind == "l1" else 2 * pixels
        return 2 * pixels + pixels + slope + sizes["B"] * MASKED * 4 + 4, slope + 4 + 2 * pixels

    name = f"B256 116 patches of 768, {kind}{', normalised' if normalize else ''}, uint8 images"
    return Case("masked_pixel_loss", name, {"B": 256}, {"B": (1, 2)}, run, usual, minimum)


def _usual_loss(pred: Tensor, images: Tensor, ids: Tensor, kind: str, normalize: bool) -> Tensor:
    target = _usual_patches(images, ids, torch.float32)
    if normalize:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    functional = torch.nn.functional
    loss = {"l1": functional.l1_loss, "mse": functional.mse_loss, "smooth_l1": functional.smooth_l1_loss}[kind]
    return loss(pred.float(), target)


def linear(kind: str) -> Case:
    def inputs(sizes: Sizes, device: str):
        bf16: Any = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
        leaves = [torch.zeros(sizes["B"], MASKED, WIDTH, **bf16), torch.zeros(FEATURES, WIDTH, **bf16)]
        leaves.append(torch.zeros(FEATURES, **bf16))
        return leaves, _images(sizes["B"], device, torch.uint8), patch_ids(sizes["B"], MASKED, device)

    def run(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda h, w, b: linear_pixel_loss(h, w, b, images, ids, PATCH, mean=MEAN, std=STD, kind=kind)  # pyright: ignore

    def usual(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        linear = torch.nn.functional.linear
        return leaves, lambda h, w, b: _usual_loss(linear(h, w, b), images, ids, kind, False)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        rows = sizes["B"] * MASKED
        parameters = 2 * FEATURES * (WIDTH + 1)
        slope = rows * FEATURES * (1 if kind == "l1" else 2)
        hidden = 2 * rows * WIDTH
        forward = hidden + parameters + rows * FEATURES + 4 * rows + slope + 4
        return forward, slope + 4 + 2 * hidden + 2 * parameters - 2 * FEATURES

    def flops(sizes: Sizes) -> tuple[int, int]:
        product = 2 * sizes["B"] * MASKED * FEATURES * WIDTH
        return product, 2 * product

    def implied(sizes: Sizes) -> tuple[int, int]:
        return linear_tiling_bytes(sizes["B"] * MASKED, FEATURES, WIDTH, kind)

    name = f"B256 116 rows of 768 -> 768, {kind}, uint8 images"
    return Case("linear_pixel_loss", name, {"B": 256}, {"B": (1, 2)}, run, usual, minimum, flops, implied)


def linear_tiling_bytes(rows: int, features: int, width: int, kind: str, arch: int = 80) -> tuple[int, int]:
    """(forward, backward) bytes that the tiling of ``linear_pixel_loss`` implies for bfloat16 operands, uint8 images,
    a mean loss and all three gradients."""
    from mvlm_kernels.pixel_loss.linear_backward import parts_of

    def tile(kernel: str) -> tuple[int, int, int]:
        found = configs.lookup("linear_pixel_loss", arch, f"{kernel}/16")
        return found["BLOCK_M"], found["BLOCK_F"], found["BLOCK_D"]

    def tiles(n: int, block: int) -> int:
        return -(-n // block)

    slope = rows * features * (1 if kind == "l1" else 2)
    hidden, weight = 2 * rows * width, 2 * features * width
    block_m, block_f, _ = tile("forward")
    across, down = tiles(features, block_f), tiles(rows, block_m)
    forward = across * (hidden + 4 * rows) + down * (weight + 2 * features)
    forward += rows * features + slope + 2 * (4 * across * rows) + 4  # pixels, slopes, partial losses twice, the loss
    block_m, _, block_d = tile("backward_hidden")
    backward = tiles(width, block_d) * (slope + 4 * tiles(rows, block_m)) + tiles(rows, block_m) * weight + hidden
    _, block_f, block_d = tile("backward_weight")
    across, down = tiles(width, block_d), tiles(features, block_f)
    parts = parts_of(rows, across * down)
    backward += across * slope + down * hidden
    backward += slope + 2 * 4 * parts * across * features + 2 * features  # the bias: its sums' pass, partials twice
    backward += 2 * 4 * parts * features * width + weight  # the weight's partials twice, its gradient
    return forward, backward
