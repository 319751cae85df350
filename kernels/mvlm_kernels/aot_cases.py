# pyright: reportArgumentType=false
"""Calls of every op's launchers on meta tensors, which :mod:`mvlm_kernels.aot` compiles.

A function lists (label, call) of each case of its op. Images are those of the paper: 224 px in patches of 16, of which
116 are masked; widths are those of the presets.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mvlm_kernels import dispatch
from mvlm_kernels.add_layer_norm.triton import add_layer_norm, add_layer_norm_backward
from mvlm_kernels.cross_attention.arguments import Options, Sides, short_sides_up_to
from mvlm_kernels.cross_attention.launch import backward, forward
from mvlm_kernels.cross_attention.tiles import has_tiles
from mvlm_kernels.gather_patches.triton import gather_patches
from mvlm_kernels.gelu_linear.triton import gelu, gelu_backward
from mvlm_kernels.pixel_loss.triton import masked_pixel_loss, masked_pixel_loss_backward
from mvlm_kernels.place_tokens.triton import place_tokens, place_tokens_backward
from mvlm_kernels.split_linear.triton import stack_rows

Cases = Iterator[tuple[str, Callable[[], Any]]]

# Widths of each tile width (16, 32, 64, 128), also such that are no multiple of 16.
_WIDTHS = (16, 32, 40, 64, 72, 80, 96, 128)
# Calls of a training step: 256 images of 197 rows, their captions masked and not, 768 pairs. Totals of packed rows are
# odd, as they come.
_STEP: dict[str, dict[str, Any]] = {
    "text to text": {"batch": 512, "len_q": 32, "len_k": 32, "rows_q": 6001, "rows_k": 6001},
    "long text to text": {"batch": 512, "len_q": 48, "len_k": 48, "rows_q": 6001, "rows_k": 6001},
    "image to text": {"batch": 256, "len_q": 197, "len_k": 32, "rows_k": 3001},
    "image to text, masked patches": {"batch": 256, "len_q": 116, "len_k": 32, "rows_k": 3001},
    "image to text, pairs": {"batch": 768, "len_q": 197, "len_k": 32, "rows_k": 3001, "indexed": 256},
    "image to text, first rows of pairs": {"batch": 768, "len_q": 1, "len_k": 32, "rows_k": 3001, "indexed": 256},
    "text to image": {"batch": 256, "len_q": 32, "len_k": 197, "rows_q": 3001},
    "long text to image": {"batch": 256, "len_q": 48, "len_k": 197, "rows_q": 3001},
    "text to image, pairs": {"batch": 768, "len_q": 32, "len_k": 197, "rows_q": 9001, "indexed": 256},
    "long text to image, pairs": {"batch": 768, "len_q": 48, "len_k": 197, "rows_q": 9001, "indexed": 256},
    "text to image, first rows of pairs": {"batch": 768, "len_q": 1, "len_k": 197, "indexed": 256},
    "one image to text": {"batch": 1, "len_q": 197, "len_k": 32, "rows_k": 17},
    "one text to image": {"batch": 1, "len_q": 32, "len_k": 197, "rows_q": 17},
    "unaligned, image to text": {"batch": 256, "len_q": 197, "len_k": 32, "rows_k": 3001, "unaligned": True},
    "unaligned, text to image": {"batch": 256, "len_q": 32, "len_k": 197, "rows_q": 3001, "unaligned": True},
}


def cross_attention_cases() -> Cases:
    """(label, call) of each case.

    Labels ``dtype/width/short length/lengths`` have every dtype, width and short length: a batch with key_lengths,
    197 patches to text and text to 197 patches. The other labels of that form have bfloat16, width 64 and short length
    32 only. Labels ``step/...`` are the calls of a training step in bfloat16 with 12 heads of 64.
    """
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for width in _WIDTHS:
            for short in (16, 32, 64, 128):
                if has_tiles(dtype, width, short, 80):
                    options = {"dtype": dtype, "width": width, "lengths": True}
                    yield f"{name}/{width}/{short}/lengths", partial(_both, short, **options)
    for variant in ("mask", "index", "splits", "grouped", "dropout"):
        yield f"bfloat16/64/32/{variant}", partial(_both, 32, **{variant: True})
    # The widest tiles, which would spill first.
    for dtype, width, short in ((torch.bfloat16, 64, 64), (torch.bfloat16, 128, 64), (torch.float32, 64, 32)):
        options = {"dtype": dtype, "width": width, "dropout": True}
        name = str(dtype).removeprefix("torch.")
        yield f"{name}/{width}/{short}/dropout", partial(_both, short, **options)
    for name, options in _STEP.items():
        yield f"step/{name}", partial(_call, **options)
    yield "bfloat16/64/256/image to image", _image_to_image


def _both(short: int, *, splits: bool = False, index: bool = False, grouped: bool = False, **options: Any) -> None:
    """Both kernel families: 197 patches attend to ``short`` text rows, and the reverse."""
    batch = 2 if splits else 256
    for len_q, len_k in ((197, short), (short, 197)):
        _call(batch, len_q, len_k, indexed=batch if index else None, key_heads=4 if grouped else 12, **options)


def _image_to_image() -> None:
    """Self-attention of 197 patches in a tile of 256, an option that is not the default."""
    if has_tiles(torch.bfloat16, 64, 197, dispatch.arch(torch.device("meta"))):
        with short_sides_up_to(256):
            _call(512, 197, 197)


def _call(
    batch: int, len_q: int, len_k: int, *, rows_q: int | None = None, rows_k: int | None = None,
    indexed: int | None = None, lengths: bool = False, mask: bool = False, unaligned: bool = False,
    dropout: bool = False,
    dtype: torch.dtype = torch.bfloat16, width: int = 64, key_heads: int = 12,
) -> None:  # fmt: skip
    """Forward and backward of one call. rows_q, rows_k: packed rows. indexed: key sequences that queries share."""
    k_seqs, first = indexed or batch, 1 if unaligned else 0

    def heads(shape: tuple[int, ...], count: int = 12) -> torch.Tensor:
        # A view that begins at an odd element is not aligned to 16 bytes.
        size = torch.Size((*shape, count, width)).numel()
        return torch.empty(size + first, dtype=dtype, device="meta")[first:].view(*shape, count, width)

    def vector(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = heads((batch, len_q) if rows_q is None else (rows_q,))
    k, v = (heads((k_seqs, len_k) if rows_k is None else (rows_k,), key_heads) for _ in range(2))
    long = torch.int64
    sides = Sides(
        vector(k_seqs) if lengths else None,
        vector(k_seqs, (len_k + 63) // 64, dtype=long) if mask else None,
        vector(batch, dtype=long) if indexed else None,
        None if rows_q is None else vector(batch + 1),
        None if rows_k is None else vector(k_seqs + 1),
        vector(batch, dtype=long) if indexed else None,
        vector(k_seqs, 3, dtype=long) if indexed else None,
    )
    options = Options(width**-0.5, len_q, len_k, *((0.1, vector(dtype=long)) if dropout else ()))
    out, lse = forward(q, k, v, sides, options)
    backward(out, q, k, v, out, lse, sides, options)


def gather_patches_cases() -> Cases:
    ids = torch.empty(64, 116, dtype=torch.int32, device="meta")
    values = torch.empty(3, device="meta")

    def gather(images: Tensor, dtype: torch.dtype, patch_size: int) -> None:
        gather_patches(images, ids, patch_size, values, values, dtype)

    for name, images_dtype, dtype in (
        ("uint8-bf16", torch.uint8, torch.bfloat16),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("fp16", torch.float16, torch.float16),
        ("fp32", torch.float32, torch.float32),
    ):
        for patch_size in (14, 16, 32) if name == "uint8-bf16" else (16,):
            images = torch.empty(64, 3, 224, 224, dtype=images_dtype, device="meta")
            yield f"{name}/p{patch_size}", partial(gather, images, dtype, patch_size)
    images = torch.empty(64, 3, 224, 224, dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    yield "bf16/p16/channels-last", partial(gather, images, torch.bfloat16, 16)


def masked_pixel_loss_cases() -> Cases:
    ids = torch.empty(64, 116, dtype=torch.int32, device="meta")
    values = torch.empty(3, device="meta")

    def both(images: Tensor, dtype: torch.dtype, patch_size: int, kind: str, normalize_target: bool) -> None:
        pred = torch.empty(64, 116, 3 * patch_size**2, dtype=dtype, device="meta")
        loss, slope = masked_pixel_loss(
            pred, images, ids, patch_size, values, values, kind, normalize_target, True, True
        )
        masked_pixel_loss_backward(loss, slope, dtype)

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        for kind in ("l1", "mse"):
            images = torch.empty(64, 3, 224, 224, dtype=torch.uint8 if kind == "l1" else dtype, device="meta")
            yield f"{name}/{kind}/p16", partial(both, images, dtype, 16, kind, False)
    for patch_size in (14, 32):
        images = torch.empty(64, 3, 224, 224, dtype=torch.uint8, device="meta")
        yield f"bf16/mse/p{patch_size}/normalized", partial(both, images, torch.bfloat16, patch_size, "mse", True)


def place_tokens_cases() -> Cases:
    def both(mode: str, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
        count = 49 if mode == "visible" else 196
        tokens = torch.empty(64, count, 768, dtype=dtype, device="meta")
        token = torch.empty(768, dtype=parameter_dtype, device="meta")
        positions = torch.empty(197, 768, dtype=parameter_dtype, device="meta")
        masked = torch.empty(64, 196, dtype=torch.bool, device="meta") if mode in ("masked", "both") else None
        ids = torch.empty(64, 49, dtype=torch.int32, device="meta") if mode == "visible" else None
        out = place_tokens(tokens, token, positions, token, masked, ids, mode == "both")
        place_tokens_backward(out, masked, ids, mode == "both", count, (dtype, *(parameter_dtype,) * 3), (True,) * 4)

    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, dtype in types.items():
        yield f"{name}/masked", partial(both, "masked", dtype, dtype)
    for mode in ("all", "visible"):
        yield f"bf16/{mode}", partial(both, mode, torch.bfloat16, torch.bfloat16)
    for mode in ("masked", "both"):
        yield f"bf16/{mode}/fp32-parameters", partial(both, mode, torch.bfloat16, torch.float32)


def add_layer_norm_cases() -> Cases:
    def both(width: int, y_dtype: torch.dtype | None, post_norm: bool, parameters: torch.dtype, bias: bool) -> None:
        x_dtype = torch.bfloat16 if parameters == torch.bfloat16 else torch.float32
        x = torch.empty(64, 197, width, dtype=x_dtype, device="meta")
        y = None if y_dtype is None else torch.empty(64, 197, width, dtype=y_dtype, device="meta")
        weight = torch.empty(width, dtype=parameters, device="meta")
        out_dtype = y_dtype or torch.bfloat16
        outputs = add_layer_norm(x, y, weight if bias else None, weight, weight, 1e-5, out_dtype, post_norm)
        total, _, normalised, mean, rstd = outputs
        sum_ = x if y is None else total
        add_layer_norm_backward(
            normalised, sum_, sum_, mean, rstd, weight, x_dtype, y_dtype or x_dtype, post_norm, bias
        )

    bf16, fp32 = torch.bfloat16, torch.float32
    for width in (192, 384, 768, 1024):
        for post_norm in (False, True):
            yield f"bf16/{width}/{'post' if post_norm else 'pre'}", partial(both, width, bf16, post_norm, fp32, True)
    yield "fp16/768/pre", partial(both, 768, torch.float16, False, fp32, True)
    yield "fp32/768/pre", partial(both, 768, fp32, False, fp32, True)
    yield "bf16/768/without-y", partial(both, 768, None, False, fp32, False)
    yield "bf16/768/bf16-stream", partial(both, 768, bf16, False, bf16, True)
    yield "bf16/1000/pre", partial(both, 1000, bf16, False, fp32, True)


def gelu_linear_cases() -> Cases:
    def both(width: int, dtype: torch.dtype, bias: torch.dtype | None, frozen: bool = False) -> None:
        h = torch.empty(64, 197, width, dtype=dtype, device="meta")
        h_bias = None if bias is None else torch.empty(width, dtype=bias, device="meta")
        gelu(h, h_bias)
        gelu_backward(h, h, h_bias, not frozen)

    for width in (768, 3072):
        yield f"bf16/{width}/fp32-bias", partial(both, width, torch.bfloat16, torch.float32)
    yield "bf16/3072/fp32-bias/frozen", partial(both, 3072, torch.bfloat16, torch.float32, frozen=True)
    yield "bf16/3072/no-bias", partial(both, 3072, torch.bfloat16, None)
    yield "fp16/3072/fp16-bias", partial(both, 3072, torch.float16, torch.float16)
    yield "fp32/3072/fp32-bias", partial(both, 3072, torch.float32, torch.float32)


def split_linear_cases() -> Cases:
    """Gradients of queries, keys and values, and of keys and values alone."""
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for count in (2, 3):
            parts = [torch.empty(64 * 197, 768, dtype=dtype, device="meta")] * count
            yield f"{name}/768/{count}", partial(stack_rows, *parts)


CASES: dict[str, Callable[[], Cases]] = {
    "cross_attention": cross_attention_cases,
    "gather_patches": gather_patches_cases,
    "masked_pixel_loss": masked_pixel_loss_cases,
    "place_tokens": place_tokens_cases,
    "add_layer_norm": add_layer_norm_cases,
    "gelu_linear": gelu_linear_cases,
    "split_linear": split_linear_cases,
}
"""By op, in the order of the table."""
