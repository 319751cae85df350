"""Cases of the byte counter (:mod:`mvlm_kernels.traffic`): each op at the paper's shapes.

A case holds the op, the same computation in eager torch, and formulas for the fewest bytes and the floating-point
operations of each pass. Images are 224 px in patches of 16, 116 of 196 patches are masked, and the dtype is bfloat16
unless a case has another one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.add_layer_norm import add_layer_norm
from mvlm_kernels.cache_model import caching
from mvlm_kernels.cross_attention import cross_attention
from mvlm_kernels.dispatch import use_backend
from mvlm_kernels.gather_patches import gather_patches
from mvlm_kernels.gelu_linear import gelu_linear
from mvlm_kernels.pixel_loss import masked_pixel_loss
from mvlm_kernels.place_tokens import place_tokens

BF16, FP32 = torch.bfloat16, torch.float32
CHANNELS, PATCH, SIDE, PATCHES, MASKED, WIDTH = 3, 16, 224, 196, 116, 768
FEATURES = CHANNELS * PATCH * PATCH
L2 = 50_000_000
"""Bytes of the second-level cache of an H100: NVIDIA H100 Tensor Core GPU architecture, white paper."""
ROWS = 256 * 197
Sizes = dict[str, int]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    sizes: the paper's sizes by name.
    samples: for each size two small values at which bytes are counted. The count is extrapolated linearly to ``sizes``.
    run: ``run(sizes, device)`` returns the inputs that get gradients, and a function of them that calls the op.
    eager: the same computation in eager torch.
    minimum, flops: fewest bytes, and floating-point operations, of (forward, backward).
    moved: formula for the bytes of (forward, backward), used instead of counting.
    """

    op: str
    shape: str
    sizes: Sizes
    samples: dict[str, tuple[int, int]]
    run: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    eager: Callable[[Sizes, str], tuple[list[Tensor], Callable[..., Tensor]]]
    minimum: Callable[[Sizes], tuple[int, int]]
    flops: Callable[[Sizes], tuple[int, int]] = lambda sizes: (0, 0)
    moved: Callable[[Sizes], tuple[int, int]] | None = None


def attention(queries: int, keys: int) -> Case:
    """Dense attention of ``queries`` rows to ``keys`` rows, 256 times 12 heads."""
    width = 64  # of a head; batch times heads is one size, because the programs of all heads are alike

    def run(sizes: Sizes, device: str):
        shapes = [(sizes["B*H"], n, 1, width) for n in (queries, keys, keys)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes]
        return leaves, lambda q, k, v: cross_attention(q, k, v)

    def eager(sizes: Sizes, device: str):
        leaves, _ = run(sizes, device)

        def attend(q, k, v):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            p = ((q @ k.transpose(2, 3)) * width**-0.5).softmax(dim=-1)
            return (p @ v).transpose(1, 2).contiguous()

        return leaves, attend

    def minimum(sizes: Sizes) -> tuple[int, int]:
        per_row = sizes["B*H"] * width * 2
        lse = 4 * sizes["B*H"] * queries
        # The short-KV backward sees every key of a query at once and does not read the output.
        read = 3 * queries if keys <= 128 else 4 * queries
        return per_row * (2 * queries + 2 * keys) + lse, per_row * (read + 4 * keys) + lse

    def flops(sizes: Sizes) -> tuple[int, int]:
        product = 2 * sizes["B*H"] * queries * keys * width
        return 2 * product, 5 * product

    name = f"B256 H12 D64 {queries}x{keys}"
    return Case("cross_attention", name, {"B*H": 256 * 12}, {"B*H": (1, 2)}, run, eager, minimum, flops)


def pair_index(images: int, device: str = "cpu") -> Tensor:
    """Images of ITM's pairs (3 * images,): each caption's own, and two drawn ones."""
    draw = torch.Generator().manual_seed(0)
    drawn = [torch.randint(0, images, (images,), generator=draw) for _ in range(2)]
    return torch.cat([torch.arange(images), *drawn]).to(device)


def indexed_attention(queries: int, keys: int) -> Case:
    """Three captions read each image by key_index; bytes by the model of the cache.

    Batch and cache are 1/192 of an H100's, so that the images' keys and values are as many times larger than the cache.
    The backward is two kernels that read every input. The minimum is that of one.
    """
    heads, width, share = 2, 64, 192

    def run(sizes: Sizes, device: str):
        shapes = [(n, rows, heads, width) for n, rows in ((3 * sizes["B"], queries), *[(sizes["B"], keys)] * 2)]
        leaves = [torch.zeros(s, dtype=torch.bfloat16, device=device, requires_grad=True) for s in shapes]
        index = pair_index(sizes["B"], device)
        return leaves, lambda q, k, v: cross_attention(q, k, v, key_index=index)

    def eager(sizes: Sizes, device: str):
        leaves, _ = run(sizes, device)
        index = pair_index(sizes["B"], device)

        def attend(q, k, v):
            q, k, v = q.transpose(1, 2), k[index].transpose(1, 2), v[index].transpose(1, 2)
            p = ((q @ k.transpose(2, 3)) * width**-0.5).softmax(dim=-1)
            return (p @ v).transpose(1, 2).contiguous()

        return leaves, attend

    def minimum(sizes: Sizes) -> tuple[int, int]:
        row = heads * width * 2
        q, lse = 3 * sizes["B"] * queries * row, 4 * 3 * sizes["B"] * queries * heads
        read = 2 * len(pair_index(sizes["B"]).unique()) * keys * row
        return 2 * q + read + lse, 4 * q + read + 2 * sizes["B"] * keys * row + lse

    def moved(sizes: Sizes) -> tuple[int, int]:
        leaves, call = run(sizes, "cpu")
        with use_backend("triton"):
            with caching(L2 // share) as forward:
                out = call(*leaves)
            with caching(L2 // share) as backward:
                out.backward(torch.zeros_like(out))
        return forward.bytes, backward.bytes

    name = f"B8 H{heads} D{width} {queries}x{keys}, 3 readers by key_index, L2 of 50 MB / {share}"
    return Case("cross_attention", name, {"B": 8}, {}, run, eager, minimum, moved=moved)


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
    def inputs(sizes: Sizes, device: str) -> tuple[Tensor, Tensor]:
        return _images(sizes["B"], device, dtype), patch_ids(sizes["B"], MASKED, device)

    def run(sizes: Sizes, device: str):
        images, ids = inputs(sizes, device)
        return [], lambda: gather_patches(images, ids, PATCH, mean=MEAN, std=STD, dtype=torch.bfloat16)

    def eager(sizes: Sizes, device: str):
        images, ids = inputs(sizes, device)
        return [], lambda: _eager_patches(images, ids, torch.bfloat16)

    def minimum(sizes: Sizes) -> tuple[int, int]:
        return sizes["B"] * MASKED * (FEATURES * dtype.itemsize + 4 + FEATURES * 2), 0  # its backward is torch's

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


class _Used(torch.autograd.Function):
    """A scalar that all given tensors are used for: their gradients are tensors of their own sizes, read in full."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        ctx.like = [(t.shape, t.dtype, t.device) for t in tensors]
        return tensors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def layer_norm(post_norm: bool) -> Case:
    """A float32 stream, a bfloat16 addend with its bias, and a bfloat16 norm. Rows are sampled past one wave."""
    width = 768

    def leaves(sizes: Sizes, device: str) -> list[Tensor]:
        stream = torch.zeros(sizes["R"], width, device=device)
        vectors = [torch.zeros(width, device=device) for _ in range(3)]
        return [t.requires_grad_() for t in (stream, torch.zeros_like(stream, dtype=BF16), *vectors)]

    def run(sizes: Sizes, device: str) -> Any:
        def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return _Used.apply(*add_layer_norm(x, y, weight, bias, y_bias=y_bias, post_norm=post_norm))  # pyright: ignore[reportReturnType]

        return leaves(sizes, device), call

    def eager(sizes: Sizes, device: str) -> Any:
        def call(x: Tensor, y: Tensor, y_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            total = x + (y + y_bias.to(BF16))  # a linear layer adds its bias in its product, and sums its gradient
            normalised = F.layer_norm(total, (width,), weight, bias)
            return _Used.apply(normalised if post_norm else total, normalised.to(BF16))  # pyright: ignore[reportReturnType]

        return leaves(sizes, device), call

    def minimum(sizes: Sizes) -> tuple[int, int]:
        rows, values = sizes["R"], sizes["R"] * width
        moments, vectors = 8 * rows, 4 * width
        forward = values * (4 + 2 + 4 + 2 + 4 * post_norm) + moments + 3 * vectors
        return forward, values * (2 + 4 + 4 + 4 + 2) + moments + 4 * vectors

    shape = f"B256 197 rows width 768, {'post' if post_norm else 'pre'}-norm"
    return Case("add_layer_norm", shape, {"R": ROWS}, {"R": (2112, 3168)}, run, eager, minimum)


def gelu() -> Case:
    """bfloat16 rows of four times the width, with a float32 bias. The products are torch's and are not counted."""
    width = 3072

    def leaves(sizes: Sizes, device: str) -> list[Tensor]:
        h = torch.zeros(sizes["R"], width, dtype=BF16, device=device)
        return [t.requires_grad_() for t in (h, torch.zeros(width, device=device))]

    def run(sizes: Sizes, device: str) -> Any:
        weight = torch.zeros(1, width, dtype=BF16, device=device)
        return leaves(sizes, device), lambda h, bias: _Used.apply(gelu_linear(h, weight, h_bias=bias))

    def eager(sizes: Sizes, device: str) -> Any:
        return leaves(sizes, device), lambda h, bias: _Used.apply(F.gelu(h + bias.to(BF16)))

    def minimum(sizes: Sizes) -> tuple[int, int]:
        values, vectors = sizes["R"] * width, 4 * width
        return 4 * values + vectors, 8 * values + 2 * vectors

    return Case("gelu_linear", "B256 197 rows width 3072", {"R": ROWS}, {"R": (1408, 2112)}, run, eager, minimum)


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
        _place("masked"),
        _place("masked", torch.float32),
        _place("both", torch.float32),
        _place("visible"),
        layer_norm(post_norm=False),
        layer_norm(post_norm=True),
        gelu(),
    ]
