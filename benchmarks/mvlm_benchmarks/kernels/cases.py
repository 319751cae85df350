"""Benchmark cases: the shapes at which each op is timed, with reference, minimum bytes and operations.

Inputs are seeded, so that two processes get equal ones. Their values make a wrong result visible.

Shape legend: B batch, H heads, D head width, N patches, K chosen patches, C channels, P patch side, F = C*P*P.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mvlm_kernels
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
    Inputs,
    RandomInputs,
)
from mvlm_kernels.cross_attention.reference import cross_attention_reference
from mvlm_kernels.pixel_loss import reference as pixels
from mvlm_kernels.place_tokens import reference as placement


def _import_gather_reference() -> Any:
    """Import the reference of gather_patches from this or an older revision of the kernels.

    `--base` runs these cases on other revisions. Older ones have the op in `patch_gather/`.
    """
    try:
        return importlib.import_module("mvlm_kernels.gather_patches.reference")
    except ModuleNotFoundError:
        return importlib.import_module("mvlm_kernels.patch_gather.reference")


gathering = _import_gather_reference()


@dataclass(frozen=True)
class Case:
    """One op at one shape and dtype."""

    op: str
    shape: str
    """Shape as text, for results."""
    dtype: torch.dtype
    make: Callable[[str], Inputs]
    """Device -> inputs."""
    ours: Callable[..., Tensor]
    """Our op. Takes all arguments by name."""
    reference: Callable[..., Tensor]
    """The op in plain torch. Takes all arguments by name, the leaves in float64."""
    minimum: tuple[int, int]
    """Bytes of (forward, backward) if each input is read once and each output written once. A tensor that forward saves
    for backward counts as an output of forward and an input of backward."""
    flops: tuple[int, int] = (0, 0)
    """Floating-point operations of (forward, backward)."""
    core: bool = False
    """Included with `--quick`."""


def cases(batch: int, dtype: torch.dtype) -> list[Case]:
    """All cases for a batch of `batch` images."""
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
    """Cross-attention of `len_q` queries to `len_k` keys.

    keys: dense; padded (key_lengths); packed (cu_seqlens_k); indexed (key_index: three query sequences share one key
    sequence).
    """
    heads, width = 12, 64
    shared = 3 if keys == "indexed" else 1
    shortest = len_k // 4
    lengths = RandomInputs("cpu", dtype).lengths(batch, shortest, len_k) if keys in ("padded", "packed") else None

    def make(device: str) -> Inputs:
        random = RandomInputs(device, dtype)
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

    def reference(q: Tensor, k: Tensor, v: Tensor, max_len_k: int | None = None, **options: Any) -> Tensor:
        return cross_attention_reference(q, k, v, **options)

    queries = shared * batch * len_q
    existing = batch * len_k if lengths is None else int(lengths.sum())
    # Padding of k and v is not read, but its zero gradients are written.
    stored = batch * len_k if keys == "padded" else existing
    row, lse = heads * width * dtype.itemsize, 4 * heads * queries
    index = {"dense": 0, "padded": 4 * batch, "packed": 4 * (batch + 1), "indexed": 4 * shared * batch}[keys]
    minimum = (
        row * (2 * queries + 2 * existing) + lse + index,
        # With at most 128 keys, a kernel holds all keys of a query at once, and its backward does not read the output.
        row * ((3 if len_k <= 128 else 4) * queries + 2 * existing + 2 * stored) + lse + index,
    )
    product = 2 * heads * width * len_q * shared * existing
    shape = f"B{batch} H{heads} D{width} {len_q}x{len_k}"
    ragged = f", {shortest} to {len_k} keys long"
    shape += {
        "dense": "",
        "padded": f"{ragged}, padded",
        "packed": f"{ragged}, packed",
        "indexed": f", {shared} query sequences per key sequence (key_index)",
    }[keys]
    ours = mvlm_kernels.cross_attention
    return Case("cross_attention", shape, dtype, make, ours, reference, minimum, (2 * product, 5 * product), core)


def _channels(like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the channels, float64 (C,) each, on the device of `like`."""
    mean, std = (torch.tensor(values, dtype=torch.float64, device=like.device) for values in (MEAN, STD))
    return mean, std


def _gather(batch: int, dtype: torch.dtype, image_dtype: torch.dtype, count: int, *, core: bool = False) -> Case:
    floating = image_dtype != torch.uint8

    def make(device: str) -> Inputs:
        random = RandomInputs(device, dtype)
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
    def make(device: str) -> Inputs:
        random = RandomInputs(device, dtype)
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


def _linear_loss(batch: int, dtype: torch.dtype, kind: Any, *, core: bool = False) -> Case:
    def make(device: str) -> Inputs:
        random = RandomInputs(device, dtype)
        leaves = {
            "hidden": random.normal(batch, MASKED, WIDTH),
            "weight": random.normal(FEATURES, WIDTH, scale=0.5 * WIDTH**-0.5),
            # The bias keeps predictions away from the pixels, so that rounding cannot flip the sign of an L1 term.
            "bias": random.far_from_pixels(FEATURES).requires_grad_() if kind == "l1" else random.normal(FEATURES),
        }
        fixed = {"images": random.images(batch, torch.uint8), "patch_ids": random.patch_ids(batch, MASKED)}
        return Inputs(leaves, {**fixed, "patch_size": PATCH, "mean": MEAN, "std": STD, "kind": kind})

    def reference(hidden, weight, bias, images: Tensor, patch_ids: Tensor, patch_size: int, **_: Any) -> Tensor:
        target = images, patch_ids, patch_size, *_channels(images)
        return pixels.linear_pixel_loss(hidden, weight, bias, *target, kind, False, True)[0]

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
    """place_tokens. mode: `masked` has a token for every patch, half of them masked; `visible` for a quarter only."""
    visible = PATCHES // 4

    def make(device: str) -> Inputs:
        random = RandomInputs(device, dtype)
        leaves = {
            "tokens": random.normal(batch, visible if mode == "visible" else PATCHES, WIDTH),
            "mask_token": random.normal(WIDTH),
            "pos_embed": random.normal(1 + PATCHES, WIDTH),
            "cls_token": random.normal(WIDTH),
        }
        if mode == "visible":
            return Inputs(leaves, {"visible_ids": random.patch_ids(batch, visible)})
        masked = torch.zeros(batch, PATCHES, dtype=torch.bool, device=device)
        return Inputs(leaves, {"masked": masked.scatter(1, random.patch_ids(batch, PATCHES // 2).long(), True)})

    def reference(tokens, mask_token, pos_embed, cls_token, masked=None, visible_ids=None) -> Tensor:
        return placement.place_tokens(tokens, mask_token, pos_embed, cls_token, masked, visible_ids)

    row = dtype.itemsize * WIDTH
    read = visible if mode == "visible" else PATCHES // 2
    written = visible if mode == "visible" else PATCHES
    index = batch * (read * 4 if mode == "visible" else PATCHES)
    parameters, whole = row * (PATCHES + 3), batch * (1 + PATCHES) * row
    minimum = batch * read * row + index + parameters + whole, whole + index + batch * written * row + parameters
    tokens = f"{visible} of {PATCHES} visible" if mode == "visible" else f"half of {PATCHES} masked"
    shape = f"B{batch} width {WIDTH}, {tokens}"
    return Case("place_tokens", shape, dtype, make, mvlm_kernels.place_tokens, reference, minimum, core=core)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
