"""Cases drawn at random. A seed is one case, the same in every run."""

import random
from functools import partial
from typing import Any

import torch

from emulator.edges import Calls
from emulator.library import check_compiled
from mvlm_kernels.case import LAYOUTS, MEAN, STD
from mvlm_kernels.cross_attention.cases import Shape
from mvlm_kernels.gather_patches import cases as patches
from mvlm_kernels.pixel_loss import cases as pixel_loss
from mvlm_kernels.place_tokens import cases as place_tokens

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def attention(seed: int) -> None:
    draw = random.Random(seed)
    short, long = draw.choice([2, 3, 15, 16, 17, 31, 32, 33, 63, 64]), draw.choice([2, 5, 15, 64, 65, 97, 129, 197])
    short_keys, packed = draw.random() < 0.5, draw.choice(["", "", "q", "k", "both"])
    packed_k = packed in ("k", "both")
    shape = Shape(
        len_q=long if short_keys else short, len_k=short if short_keys else long, batch=draw.randint(1, 4),
        readers=draw.choice([0, 0, 1, 3, 5]), width=draw.choice([32, 64, 64, 80, 96, 128]),
        heads=draw.choice([1, 2, 3]), dtype=draw.choice([BF16, F16, F32]),
        packed_q=packed in ("q", "both"), packed_k=packed_k,
        lengths=draw.random() < 0.5 and not packed_k, mask=draw.random() < 0.4 and not packed_k,
        layout=draw.choice(["contiguous", "strided", "expanded"]), ids=draw.choice([torch.int32, torch.int64]),
        bounded=draw.random() < 0.7, seed=seed,
    )  # fmt: skip
    check_compiled(shape.case(str(shape), draw.choice([0, 1, 12, 40])))


def pixels(seed: int) -> None:
    """gather_patches and masked_pixel_loss."""
    draw = random.Random(seed)
    batch, channels, side = draw.randint(1, 3), draw.randint(1, 5), draw.choice([1, 2, 3, 5, 7, 8, 14, 16])
    rows, columns, count = draw.randint(1, 3), draw.randint(1, 4), draw.randint(-1, 9)
    images, layout = draw.choice([torch.uint8, F32, F16, BF16]), draw.choice(LAYOUTS)
    mean, std = ([*x, 0.5, 0.25][:channels] if draw.random() < 0.5 else None for x in (MEAN, STD))
    shape = batch, (rows, columns), side, None if count < 0 else count, images
    ids = draw.choice([torch.int32, torch.int64])
    options: dict[str, Any] = {"channels": channels, "layout": layout, "ids": ids, "mean": mean}
    check_compiled(patches.case(f"drawn {seed}", *shape, std=std, **options))
    options |= {"kind": draw.choice(pixel_loss.KINDS), "reduction": draw.choice(["mean", "none"])}
    options |= {"strided": draw.random() < 0.5, "normalize": channels * side**2 > 1 and draw.random() < 0.5}
    check_compiled(pixel_loss.case(f"drawn {seed}", *shape, draw.choice([BF16, F16, F32]), std=None, **options))


def placement(seed: int) -> None:
    draw = random.Random(seed)
    batch, count, width = draw.randint(0, 20), draw.randint(0, 9), draw.choice([1, 3, 65, 128, 200])
    mode: Any = draw.choice(["all", "masked", "both", "visible"])
    dtype, visible = draw.choice([F32, BF16, F16]), min(draw.randint(0, 9), count)
    options = {
        "share": draw.choice([0.0, 0.5, 1.0]),
        "layout": draw.choice(["contiguous", "transposed", "expanded", "strided"]),
    }
    check_compiled(place_tokens.case(f"drawn {seed}", batch, count, width, mode, dtype, visible=visible, **options))


def calls() -> Calls:
    for name, draw, count in (("attention", attention, 60), ("pixels", pixels, 40), ("placement", placement, 25)):
        for seed in range(count):
            yield f"{name}/{seed}", partial(draw, seed)
