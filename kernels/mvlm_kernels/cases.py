"""Cases of the byte counter (:mod:`mvlm_kernels.traffic`): each op at the paper's shapes.

A case holds the op, the same computation in eager torch, and formulas for the fewest bytes and the floating-point
operations of each pass. Images are 224 px in patches of 16, 116 of 196 patches are masked, and the dtype is bfloat16
unless a case has another one.
"""

from typing import Any

import torch
from torch import Tensor

from mvlm_kernels.attention_cases import attention, indexed_attention
from mvlm_kernels.case import Case, Sizes
from mvlm_kernels.gather_patches import gather_patches
from mvlm_kernels.norm_cases import gelu, layer_norm
from mvlm_kernels.pixel_loss import linear_pixel_loss, masked_pixel_loss
from mvlm_kernels.pixel_loss.linear_bytes import linear_bytes
from mvlm_kernels.place_tokens import place_tokens

CHANNELS, PATCH, SIDE, PATCHES, MASKED, WIDTH = 3, 16, 224, 196, 116, 768
FEATURES = CHANNELS * PATCH * PATCH


def patch_ids(batch: int, count: int, device: str, patches: int = PATCHES) -> Tensor:
    """Distinct patch ids (batch, count) int32. The kernels read repeated ids once, so they would count fewer bytes."""
    return (
        torch.arange(count, dtype=torch.int32, device=device)
        .mul(5)
        .remainder(patches)
        .expand(batch, count)
        .contiguous()
    )


def _images(batch: int, device: str, dtype: torch.dtype) -> Tensor:
    return torch.zeros(batch, CHANNELS, SIDE, SIDE, dtype=dtype, device=device)


MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _eager_patches(images: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise, patchify and gather in eager torch, as MAE implementations do."""
    shape = (1, CHANNELS, 1, 1)
    mean = torch.zeros(shape, device=images.device, dtype=dtype)
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    x = (x - mean) / (mean + 1)
    grid = SIDE // PATCH
    x = x.reshape(-1, CHANNELS, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5).reshape(-1, PATCHES, FEATURES)
    return x.gather(1, ids.long()[:, :, None].expand(-1, -1, FEATURES))


def _gather(dtype: torch.dtype) -> Case:
    floating = dtype != torch.uint8

    def inputs(sizes: Sizes, device: str) -> tuple[list[Tensor], Tensor, Tensor]:
        images, ids = _images(sizes["B"], device, dtype), patch_ids(sizes["B"], MASKED, device)
        return ([images.requires_grad_()] if floating else []), images, ids

    def run(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda *_: gather_patches(images, ids, PATCH, mean=MEAN, std=STD, dtype=torch.bfloat16)

    def eager(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda *_: _eager_patches(images, ids, torch.bfloat16)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        ids, out = MASKED * 4, MASKED * FEATURES * 2
        read = MASKED * FEATURES * dtype.itemsize
        backward = out + ids + PATCHES * FEATURES * dtype.itemsize if floating else 0
        return sizes["B"] * (read + ids + out), sizes["B"] * backward

    name = f"B256 3x224x224 p16, 116 of 196, {str(dtype).removeprefix('torch.')} -> bfloat16"
    return Case("gather_patches", name, {"B": 256}, {"B": (1, 2)}, run, eager, minimum)


def _masked(kind: str, normalize: bool) -> Case:
    def inputs(sizes: Sizes, device: str):
        pred = torch.zeros(sizes["B"], MASKED, FEATURES, dtype=torch.bfloat16, device=device, requires_grad=True)
        return pred, _images(sizes["B"], device, torch.uint8), patch_ids(sizes["B"], MASKED, device)

    def run(sizes: Sizes, device: str):
        pred, images, ids = inputs(sizes, device)
        options: Any = {"mean": MEAN, "std": STD, "kind": kind, "normalize_target": normalize}
        return [pred], lambda pred: masked_pixel_loss(pred, images, ids, PATCH, **options)

    def eager(sizes: Sizes, device: str):
        pred, images, ids = inputs(sizes, device)
        return [pred], lambda pred: _eager_loss(pred, images, ids, kind, normalize)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        pixels = sizes["B"] * MASKED * FEATURES
        slope = pixels if kind == "l1" else 2 * pixels
        return 2 * pixels + pixels + slope + sizes["B"] * MASKED * 4 + 4, slope + 4 + 2 * pixels

    name = f"B256 116 patches of 768, {kind}{', normalised' if normalize else ''}, uint8 images"
    return Case("masked_pixel_loss", name, {"B": 256}, {"B": (1, 2)}, run, eager, minimum)


def _eager_loss(pred: Tensor, images: Tensor, ids: Tensor, kind: str, normalize: bool) -> Tensor:
    target = _eager_patches(images, ids, torch.float32)
    if normalize:
        target = (target - target.mean(dim=-1, keepdim=True)) / (target.var(dim=-1, keepdim=True) + 1e-6) ** 0.5
    functional = torch.nn.functional
    loss = {"l1": functional.l1_loss, "mse": functional.mse_loss, "smooth_l1": functional.smooth_l1_loss}[kind]
    return loss(pred.float(), target)


def _linear(kind: str) -> Case:
    def inputs(sizes: Sizes, device: str):
        bf16: Any = {"dtype": torch.bfloat16, "device": device, "requires_grad": True}
        leaves = [torch.zeros(sizes["B"], MASKED, WIDTH, **bf16), torch.zeros(FEATURES, WIDTH, **bf16)]
        leaves.append(torch.zeros(FEATURES, **bf16))
        return leaves, _images(sizes["B"], device, torch.uint8), patch_ids(sizes["B"], MASKED, device)

    def run(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        return leaves, lambda h, w, b: linear_pixel_loss(h, w, b, images, ids, PATCH, mean=MEAN, std=STD, kind=kind)  # pyright: ignore

    def eager(sizes: Sizes, device: str):
        leaves, images, ids = inputs(sizes, device)
        linear = torch.nn.functional.linear
        return leaves, lambda h, w, b: _eager_loss(linear(h, w, b), images, ids, kind, False)

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
        return linear_bytes(sizes["B"], MASKED, FEATURES, WIDTH, kind)

    name = f"B256 116 rows of 768 -> 768, {kind}, uint8 images"
    return Case("linear_pixel_loss", name, {"B": 256}, {"B": (1, 2)}, run, eager, minimum, flops, implied)


def _place(mode: str, parameter_dtype: torch.dtype = torch.bfloat16) -> Case:
    def inputs(sizes: Sizes, device: str):
        batch, patches = sizes["B"], sizes["N"]
        count = patches // 4 if mode == "visible" else patches
        tokens = torch.zeros(batch, count, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=True)
        parameter: Any = {"dtype": parameter_dtype, "device": device, "requires_grad": True}
        leaves = [tokens, *(torch.zeros(s, **parameter) for s in ((WIDTH,), (1 + patches, WIDTH), (WIDTH,)))]
        masked = (torch.arange(batch, device=device)[:, None] + torch.arange(patches, device=device)) % 2 == 0
        return leaves, masked, patch_ids(batch, patches // 4, device, patches)

    def run(sizes: Sizes, device: str):
        leaves, masked, ids = inputs(sizes, device)
        options: Any = {"visible_ids": ids} if mode == "visible" else {"masked": masked}
        return leaves, lambda *x: place_tokens(*x, **options, with_unmasked=mode == "both")

    def eager(sizes: Sizes, device: str):
        leaves, masked, _ = inputs(sizes, device)
        batch, patches = sizes["B"], sizes["N"]

        def place(tokens, mask_token, pos_embed, cls_token):
            if mode == "visible":  # as in MAE: append mask tokens and unshuffle by a gather
                fill = mask_token.expand(batch, patches - tokens.shape[1], -1)
                order = torch.zeros(batch, patches, dtype=torch.int64, device=tokens.device)
                x = torch.cat([tokens, fill], dim=1).gather(1, order[:, :, None].expand(-1, -1, WIDTH))
            else:  # as in SimMIM: blend with the mask
                w = masked[:, :, None].to(tokens.dtype)
                x = tokens * (1 - w) + mask_token.expand_as(tokens) * w
            return torch.cat([cls_token.expand(batch, 1, -1), x], dim=1) + pos_embed

        def place_both(tokens, mask_token, pos_embed, cls_token):
            unmasked = torch.cat([cls_token.expand(batch, 1, -1), tokens], dim=1) + pos_embed
            return torch.cat([unmasked, place(tokens, mask_token, pos_embed, cls_token)])

        return leaves, place_both if mode == "both" else place

    def minimum(sizes: Sizes) -> tuple[int, int]:
        batch, patches = sizes["B"], sizes["N"]
        row, parameter_row = 2 * WIDTH, parameter_dtype.itemsize * WIDTH
        seen = {"visible": patches // 4, "masked": patches // 2, "both": patches}[mode]
        written = patches // 4 if mode == "visible" else patches
        index = batch * (seen * 4 if mode == "visible" else patches)
        parameters = parameter_row * (patches + 3)
        output = batch * (1 + patches) * parameter_row * (2 if mode == "both" else 1)
        return batch * seen * row + index + parameters + output, output + index + batch * written * row + parameters

    what = {"visible": "49 of 196 visible", "masked": "half of 196 masked", "both": "unmasked and half of 196 masked"}[
        mode
    ]
    what += ", fp32 parameters" if parameter_dtype == torch.float32 else ""
    samples = {"B": (2, 4), "N": (4, 8)}
    return Case("place_tokens", f"B256 width 768, {what}", {"B": 256, "N": 196}, samples, run, eager, minimum)


def cases() -> list[Case]:
    """Every case that ``python -m mvlm_kernels.traffic`` counts."""
    return [
        attention(197, 32),
        attention(32, 197),
        indexed_attention(32, 197),
        _gather(torch.uint8),
        _gather(torch.bfloat16),
        _masked("l1", False),
        _masked("mse", True),
        _linear("l1"),
        _linear("mse"),
        _place("masked"),
        _place("masked", torch.float32),
        _place("both", torch.float32),
        _place("visible"),
        layer_norm(post_norm=False),
        layer_norm(post_norm=True),
        gelu(),
    ]
