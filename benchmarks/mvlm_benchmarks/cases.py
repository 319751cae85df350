"""The ops at the shapes they are timed at: inputs, the float64 reference, and the fewest bytes and operations.

Legend: B batch, H heads, D head width, L rows, N patches, K chosen patches, C channels, P patch side, F = C*P*P.
Every input has values that a wrong result shows on; all of them come from a seed, so that two processes see the same.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.case_inputs import (
    CHANNELS,
    FEATURES,
    MASKED,
    MEAN,
    PATCH,
    PATCHES,
    SIDE,
    STD,
    WIDTH,
    Inputs,
    Random,
)
from mvlm_kernels.cross_attention.reference import cross_attention_reference
from mvlm_kernels.gather_patches import reference as patches
from mvlm_kernels.pixel_loss import reference as pixels
from mvlm_kernels.place_tokens import reference as placement


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype. ``ours`` and ``reference`` take all of ``make(device)``'s arguments by name.

    minimum: bytes of (forward, backward) when every input is read once and every output written once, with what forward
    saves among its outputs. flops: floating-point operations of both. core: run also where time is short.
    """

    op: str
    shape: str
    dtype: torch.dtype
    make: Callable[[str], Inputs]
    ours: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    minimum: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    core: bool = False


def cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """Every case; batch is the number of images."""
    return [
        _attention(batch, 197, 32, dtype, core=True),
        _attention(batch, 32, 197, dtype, core=True),
        _attention(batch, 577, 64, dtype),
        _attention(batch, 197, 32, dtype, keys="padded"),
        _attention(batch, 197, 32, dtype, keys="packed", core=True),
        _attention(batch, 32, 197, dtype, keys="indexed", core=True),
        _gather(batch, dtype, torch.uint8, MASKED, core=True),
        _gather(batch, dtype, torch.uint8, PATCHES),
        _gather(batch, dtype, dtype, MASKED),
        _masked_loss(batch, dtype, "l1", False, core=True),
        _masked_loss(batch, dtype, "mse", True),
        _linear_loss(batch, dtype, "l1", core=True),
        _linear_loss(batch, dtype, "mse"),
        _place(batch, dtype, "masked", core=True),
        _place(batch, dtype, "visible"),
    ]


def _attention(
    batch: int, len_q: int, len_k: int, dtype: torch.dtype, *, keys: str = "dense", core: bool = False
) -> Case:
    """keys: dense; padded (key_lengths); packed (cu_seqlens_k); indexed (three queries share a row of keys)."""
    heads, width = 12, 64
    shared = 3 if keys == "indexed" else 1
    shortest = len_k // 4
    lengths = Random("cpu", dtype).lengths(batch, shortest, len_k) if keys in ("padded", "packed") else None

    def make(device: str) -> Inputs:
        random = Random(device, dtype)
        fixed: dict[str, Any] = {}
        key_shape = (batch, len_k, heads, width)
        if lengths is not None and keys == "padded":
            fixed["key_lengths"] = lengths.to(device)
        elif lengths is not None:
            ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            fixed = {"cu_seqlens_k": ends.to(device), "max_len_k": len_k}
            key_shape = (int(ends[-1]), heads, width)
        elif keys == "indexed":
            fixed["key_index"] = torch.arange(shared * batch, dtype=torch.int32, device=device) % batch
        q = random.normal(shared * batch, len_q, heads, width)
        return Inputs({"q": q, "k": random.normal(*key_shape), "v": random.normal(*key_shape)}, fixed)

    def reference(q: Tensor, k: Tensor, v: Tensor, max_len_k: int | None = None, **sides: Any) -> Tensor:
        return cross_attention_reference(q, k, v, **sides)

    queries = shared * batch * len_q
    existing = batch * len_k if lengths is None else int(lengths.sum())
    # Rows that exist are read; a padded row has no part in the result but gets its zero gradient written.
    stored = batch * len_k if keys == "padded" else existing
    row, lse = heads * width * dtype.itemsize, 4 * heads * queries
    index = {"dense": 0, "padded": 4 * batch, "packed": 4 * (batch + 1), "indexed": 4 * shared * batch}[keys]
    minimum = (
        row * (2 * queries + 2 * existing) + lse + index,
        # Where every key of a query is seen at once, the backward does without the output.
        row * ((3 if len_k <= 128 else 4) * queries + 2 * existing + 2 * stored) + lse + index,
    )
    product = 2 * heads * width * len_q * shared * existing
    shape = f"B{batch} H{heads} D{width} {len_q}x{len_k}"
    ragged = f", {shortest} to {len_k} keys long"
    shape += {
        "dense": "",
        "padded": f"{ragged}, padded",
        "packed": f"{ragged}, packed",
        "indexed": f", {shared} queries to a row by key_index",
    }[keys]
    ours = mvlm_kernels.cross_attention
    return Case("cross_attention", shape, dtype, make, ours, reference, minimum, (2 * product, 5 * product), core)


def _channels(like: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=torch.float64, device=like.device) for values in (MEAN, STD))
    return mean, std


def _gather(batch: int, dtype: torch.dtype, image_dtype: torch.dtype, count: int, *, core: bool = False) -> Case:
    floating = image_dtype != torch.uint8

    def make(device: str) -> Inputs:
        random = Random(device, dtype)
        images = random.images(batch, image_dtype)
        ids = random.ids(batch, count) if count < PATCHES else None
        fixed = {"patch_ids": ids, "patch_size": PATCH, "mean": MEAN, "std": STD, "dtype": dtype}
        if floating:
            return Inputs({"images": images.requires_grad_()}, fixed)
        return Inputs({}, {"images": images, **fixed})

    def reference(images: Tensor, patch_ids: Tensor | None, patch_size: int, **_: Any) -> Tensor:
        return patches.gather_patches(images, patch_ids, patch_size, *_channels(images), torch.float64)

    ids = 4 * count if count < PATCHES else 0
    out = count * FEATURES * dtype.itemsize
    forward = count * FEATURES * image_dtype.itemsize + ids + out
    backward = out + ids + PATCHES * FEATURES * image_dtype.itemsize if floating else 0
    chosen = f"{count} of {PATCHES}" if count < PATCHES else f"all {PATCHES}"
    shape = f"B{batch} {CHANNELS}x{SIDE}x{SIDE} p{PATCH}, {chosen}, {_name(image_dtype)} -> {_name(dtype)}"
    minimum = batch * forward, batch * backward
    return Case("gather_patches", shape, dtype, make, mvlm_kernels.gather_patches, reference, minimum, core=core)


def _masked_loss(batch: int, dtype: torch.dtype, kind: Any, normalize: bool, *, core: bool = False) -> Case:
    def make(device: str) -> Inputs:
        random = Random(device, dtype)
        pred = random.far(batch, MASKED, FEATURES) if kind == "l1" else random.normal(batch, MASKED, FEATURES)
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.ids(batch, MASKED)}
        options = {"patch_size": PATCH, "mean": MEAN, "std": STD, "kind": kind, "normalize_target": normalize}
        return Inputs({"pred": pred.detach().requires_grad_()}, {**fixed, **options})

    def reference(pred: Tensor, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        channels = _channels(images)
        return pixels.masked_pixel_loss(pred, images, patch_ids, patch_size, *channels, kind, normalize, True)[0]

    count = batch * MASKED * FEATURES
    slope = count * (1 if kind == "l1" else dtype.itemsize)
    pred = count * dtype.itemsize
    minimum = pred + count + slope + batch * MASKED * 4 + 4, slope + 4 + pred
    shape = f"B{batch} {MASKED} patches of {FEATURES}, {kind}{', normalised' if normalize else ''}, uint8 images"
    return Case("masked_pixel_loss", shape, dtype, make, mvlm_kernels.masked_pixel_loss, reference, minimum, core=core)


def _linear_loss(batch: int, dtype: torch.dtype, kind: Any, *, core: bool = False) -> Case:
    def make(device: str) -> Inputs:
        random = Random(device, dtype)
        leaves = {
            "hidden": random.normal(batch, MASKED, WIDTH),
            "weight": random.normal(FEATURES, WIDTH, scale=0.5 * WIDTH**-0.5),
            # The bias keeps predictions away from the pixels, so that rounding them cannot turn a sign of L1.
            "bias": random.far(FEATURES).requires_grad_() if kind == "l1" else random.normal(FEATURES),
        }
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.ids(batch, MASKED)}
        return Inputs(leaves, {**fixed, "patch_size": PATCH, "mean": MEAN, "std": STD, "kind": kind})

    def reference(hidden, weight, bias, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        where = images, patch_ids, patch_size, *_channels(images)
        return pixels.linear_pixel_loss(hidden, weight, bias, *where, kind, False, True)[0]

    rows, item = batch * MASKED, dtype.itemsize
    parameters, hidden = item * FEATURES * (WIDTH + 1), item * rows * WIDTH
    slope = rows * FEATURES * (1 if kind == "l1" else item)
    forward = hidden + parameters + rows * FEATURES + 4 * rows + slope + 4
    # Backward reads the weight but not the bias, and writes the gradients of both.
    minimum = forward, slope + 4 + 2 * hidden + 2 * parameters - item * FEATURES
    product = 2 * rows * FEATURES * WIDTH
    shape = f"B{batch} {MASKED} rows of {WIDTH} -> {FEATURES}, {kind}, uint8 images"
    ours = mvlm_kernels.linear_pixel_loss
    return Case("linear_pixel_loss", shape, dtype, make, ours, reference, minimum, (product, 2 * product), core)


def _place(batch: int, dtype: torch.dtype, mode: str, *, core: bool = False) -> Case:
    visible = PATCHES // 4

    def make(device: str) -> Inputs:
        random = Random(device, dtype)
        leaves = {
            "tokens": random.normal(batch, visible if mode == "visible" else PATCHES, WIDTH),
            "mask_token": random.normal(WIDTH),
            "pos_embed": random.normal(1 + PATCHES, WIDTH),
            "cls_token": random.normal(WIDTH),
        }
        if mode == "visible":
            return Inputs(leaves, {"visible_ids": random.ids(batch, visible)})
        masked = torch.zeros(batch, PATCHES, dtype=torch.bool, device=device)
        return Inputs(leaves, {"masked": masked.scatter(1, random.ids(batch, PATCHES // 2).long(), True)})

    def reference(tokens, mask_token, pos_embed, cls_token, masked=None, visible_ids=None) -> Tensor:
        return placement.place_tokens(tokens, mask_token, pos_embed, cls_token, masked, visible_ids)

    row = dtype.itemsize * WIDTH
    seen = visible if mode == "visible" else PATCHES // 2
    written = visible if mode == "visible" else PATCHES
    index = batch * (seen * 4 if mode == "visible" else PATCHES)
    parameters, whole = row * (PATCHES + 3), batch * (1 + PATCHES) * row
    minimum = batch * seen * row + index + parameters + whole, whole + index + batch * written * row + parameters
    what = f"{visible} of {PATCHES} visible" if mode == "visible" else f"half of {PATCHES} masked"
    shape = f"B{batch} width {WIDTH}, {what}"
    return Case("place_tokens", shape, dtype, make, mvlm_kernels.place_tokens, reference, minimum, core=core)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
