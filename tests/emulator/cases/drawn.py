"""Cases drawn at random. A seed is one case, the same in every run."""

import random
from functools import partial
from typing import Any

import torch
from torch import Tensor

from emulator.cases import Cases
from emulator.cases.attention import check
from support.kernels import pixel_losses, token_placement
from support.kernels.attention import Case
from support.kernels.patches import LAYOUTS, MEAN, STD, check_gather, make_ids, make_images

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def attention(seed: int) -> None:
    draw = random.Random(seed)
    short, long = draw.choice([2, 3, 15, 16, 17, 31, 32, 33, 63, 64]), draw.choice([2, 5, 15, 64, 65, 97, 129, 197])
    short_keys, packed = draw.random() < 0.5, draw.choice(["", "", "q", "k", "both"])
    packed_k = packed in ("k", "both")
    case = Case(
        len_q=long if short_keys else short, len_k=short if short_keys else long, batch=draw.randint(1, 4),
        readers=draw.choice([0, 0, 1, 3, 5]), width=draw.choice([32, 64, 64, 80, 96, 128]),
        heads=draw.choice([1, 2, 3]), dtype=draw.choice([BF16, F16, F32]),
        packed_q=packed in ("q", "both"), packed_k=packed_k,
        lengths=draw.random() < 0.5 and not packed_k, mask=draw.random() < 0.4 and not packed_k,
        layout=draw.choice(["contiguous", "strided", "expanded"]), ids=draw.choice([torch.int32, torch.int64]),
        bounded=draw.random() < 0.7, seed=seed,
    )  # fmt: skip
    try:
        check(case, draw.choice([0, 1, 12, 40]))
    except AssertionError as error:
        error.add_note(str(case))
        raise


def patches(seed: int) -> None:
    """gather_patches and masked_pixel_loss."""
    draw = random.Random(seed)
    batch, channels, side = draw.randint(1, 3), draw.randint(1, 5), draw.choice([1, 2, 3, 5, 7, 8, 14, 16])
    rows, columns, count = draw.randint(1, 3), draw.randint(1, 4), draw.randint(-1, 9)
    pixels, layout = draw.choice([torch.uint8, F32, F16, BF16]), draw.choice(LAYOUTS)
    images = make_images((batch, channels, rows * side, columns * side), pixels, layout)
    ids = None if count < 0 else make_ids(batch, count, rows * columns, draw.choice([torch.int32, torch.int64]))
    mean = MEAN[:channels] if draw.random() < 0.5 else None
    check_gather(images, ids, side, mean, STD[:channels] if draw.random() < 0.5 else None)
    features, kind, reduction = channels * side**2, draw.choice(pixel_losses.KINDS), draw.choice(["mean", "none"])
    strided = draw.random() < 0.5
    shape = (batch, rows * columns if count < 0 else count, features * (1 + strided))
    pred = pixel_losses.random(shape, draw.choice([BF16, F16, F32]))[..., :: 1 + strided]
    normalize = features > 1 and draw.random() < 0.5
    pixel_losses.check_masked(pred, images, ids, side, mean, None, kind, normalize, reduction)


def placement(seed: int) -> None:
    draw = random.Random(seed)
    batch, count, width = draw.randint(0, 20), draw.randint(0, 9), draw.choice([1, 3, 65, 128, 200])
    mode, dtype = draw.choice(["all", "masked", "visible"]), draw.choice([F32, BF16, F16])
    visible = min(draw.randint(0, 9), count)
    inputs: list[Tensor]
    options: dict[str, Any]
    inputs, options = token_placement.case(
        batch, count, width, mode, dtype, None, visible, draw.choice([0.0, 0.5, 1.0])
    )
    layout = draw.choice(["contiguous", "transposed", "expanded", "strided"])
    grad = token_placement.random((batch, 1 + count, width), torch.float64, 5)
    if layout == "transposed":
        inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
        grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        inputs[0] = inputs[0][:1].expand_as(inputs[0])
        inputs[1], inputs[3] = (inputs[i][:1].expand(width) for i in (1, 3))
        grad = grad[:, :1, :1].expand_as(grad)
    elif layout == "strided":
        *inputs, grad = (torch.stack([x, x], dim=-1).flatten(-2)[..., ::2] for x in (*inputs, grad))
    token_placement.check_placement(inputs, options, grad=grad)


def cases() -> Cases:
    for name, draw, count in (
        ("attention", attention, 60), ("patches", patches, 40), ("placement", placement, 25),
    ):  # fmt: skip
        for seed in range(count):
            yield f"{name}/{seed}", partial(draw, seed)
