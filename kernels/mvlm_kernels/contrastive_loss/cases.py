"""Cases of ``contrastive_terms`` and ``contrastive_loss``, and their oracle. Legend: n rows, G columns, E width."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_kernels.case import Case, Draw, Inputs
from mvlm_kernels.contrastive_loss import contrastive_loss, contrastive_terms

FAST = {"bf16/70x150x40/infonce/draws", "fp32/70x150x40/sigmoid/shared"}
"""Cases that are emulated in every suite."""
FORMS = list(itertools.product((False, True), repeat=3))
"""Sigmoid loss, shared right pairs and draws, each or not."""
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def oracle(
    image: Tensor, text: Tensor, log_scale: Tensor, rows: Tensor, image_id: Tensor, text_id: Tensor,
    bias: Tensor | None = None, shared_positives: bool = False, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The differentiable terms (n,) and (G,), from all logits at once."""
    logits = torch.einsum("ne,ge->ng", image, text) * log_scale.exp()
    matches = (image_id[:, None] == image_id) | (text_id[:, None] == text_id)
    right = matches if shared_positives else torch.eye(len(text), dtype=torch.bool, device=text.device)
    if bias is not None:
        signs = torch.where(right[rows], 1.0, -1.0).to(logits.dtype)
        return F.softplus(-signs * (logits + bias), threshold=500).sum(1), 0 * text[:, 0]
    share = right / right.sum(1, keepdim=True) + right / right.sum(0)
    return logits.logsumexp(1) - (logits * share[rows]).sum(1), logits.logsumexp(0)


def ours(**arguments: Any) -> tuple[Tensor, ...]:
    terms = contrastive_terms(**arguments)
    return terms.rows, terms.columns


def case(
    label: str, rows: int, columns: int, dtype: torch.dtype, parameters: torch.dtype, *, width: int = 5,
    bias: bool = False, shared_positives: bool = False, draws: bool = True, unit: bool = False,
) -> Case:  # fmt: skip
    """Rows with columns of which some share an image or a text. unit: embeddings have unit length."""

    def make(device: str, seed: int = 0) -> Inputs:
        draw, size = Draw(device, seed), width**-0.5 if unit else 1.0
        leaves = {"image": draw.normal(rows, width, dtype=dtype, scale=size)}
        leaves["text"] = draw.normal(columns, width, dtype=dtype, scale=size)
        leaves["log_scale"] = draw.normal(1, dtype=parameters, scale=0.1)
        if bias:
            leaves["bias"] = draw.normal(1, dtype=parameters)
        own = torch.arange(columns, device=leaves["image"].device).flip(0)[:rows]
        ids = {name: draw.integers(columns, columns) for name in ("image_id", "text_id")}
        keys = torch.arange(2, device=own.device) if draws else None
        return Inputs(leaves, {"rows": own, **ids, "noise_keys": keys, "shared_positives": shared_positives})

    # Terms of both signs cancel in the gradients of log_scale and bias, which are sums over all logits.
    terms: dict[str, float] = dict.fromkeys(("log_scale", "bias"), float(rows * columns))
    if dtype == torch.bfloat16:
        # The gradient of each logit is rounded to 8 bits before it is multiplied by the logit: four standard deviations
        # of the sum of so many errors.
        logit = width**0.5 / (width if unit else 1)
        terms["log_scale"] = 4 * 2**-9 * (rows * columns) ** 0.5 * logit / (2 * torch.finfo(torch.float32).eps)
    rounded: dict[str, float] = dict.fromkeys(("log_scale", "bias"), 1.0)
    return Case("contrastive_terms", label, dtype, make, ours, oracle, multiplies=True, terms=terms, rounded=rounded)


def loss(pairs: int, dtype: torch.dtype, width: int, *, bias: bool = False, core: bool = False) -> Case:
    """The loss of so many pairs, all on one device, at the temperature and the bias from which CLIP and SigLIP start.

    bias: sigmoid loss in place of InfoNCE.
    """

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {name: F.normalize(draw.normal(pairs, width, dtype=dtype), dim=1) for name in ("image", "text")}
        starts = {"log_scale": math.log(10), "bias": -10.0} if bias else {"log_scale": math.log(1 / 0.07)}
        leaves |= {name: torch.full((1,), value, device=device) for name, value in starts.items()}
        return Inputs(leaves, {})

    def of_logits(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        logits, own = image @ text.T * log_scale.exp(), torch.arange(pairs, device=image.device)
        if bias is not None:
            right = 2 * torch.eye(pairs, dtype=logits.dtype, device=image.device) - 1
            return -F.logsigmoid(right * (logits + bias)).sum() / pairs
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    # Forward saves the log-sum-exp of rows and of columns. Backward computes the logits again.
    embeddings, product = 2 * pairs * width * dtype.itemsize, 2 * pairs * pairs * width
    numbers, sums = 4 * (2 if bias else 1), 0 if bias else 8 * pairs
    minimum = embeddings + numbers + sums + 4, 2 * (embeddings + numbers) + sums + 4
    return Case(
        "contrastive_loss", f"{pairs} pairs of {width}, {'sigmoid' if bias else 'InfoNCE'}", dtype, make,
        contrastive_loss, of_logits, minimum, (product, 3 * product), core=core, product=(pairs, pairs, width),
        multiplies=True,
    )  # fmt: skip


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    """Sixteen pairs for each image of the batch: the op is for thousands of pairs."""
    return [loss(16 * batch, dtype, 256, core=True), loss(16 * batch, dtype, 256, bias=True)]


def small(dtype: torch.dtype) -> list[Case]:
    return [loss(37, dtype, 40), loss(37, dtype, 40, bias=True)]


def compiled() -> Iterator[Case]:
    """512 pairs of a rank and the global batch, in every form."""
    for (name, dtype), (bias, shared, draws) in itertools.product(TYPES.items(), FORMS):
        for width in (256, 768) if dtype == torch.bfloat16 else (256,):
            label = f"{name}/512x32768x{width}/{_form(bias, shared, draws)}"
            options: dict[str, Any] = {"width": width, "bias": bias, "shared_positives": shared, "draws": draws}
            yield case(label, 512, 32768, dtype, torch.float32, **options)


def emulated() -> Iterator[Case]:
    """Several tiles of rows and columns, and a width that is no multiple of a step of the product."""
    for (name, dtype), (rows, columns, width), (bias, shared, draws) in itertools.product(
        TYPES.items(), ((70, 150, 40), (150, 170, 64), (1, 1, 3)), FORMS
    ):
        label = f"{name}/{rows}x{columns}x{width}/{_form(bias, shared, draws)}"
        options: dict[str, Any] = {"width": width, "bias": bias, "shared_positives": shared, "draws": draws}
        yield case(label, rows, columns, dtype, torch.float32, unit=True, **options)


def _form(bias: bool, shared: bool, draws: bool) -> str:
    words = ["sigmoid" if bias else "infonce", "shared" if shared else "", "draws" if draws else ""]
    return "/".join(word for word in words if word)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    rows, columns = 3 + number, 7 + number
    yield case("contrast", rows, columns, dtype, parameters)
    yield case("contrast, sigmoid", rows, columns, dtype, parameters, bias=True, shared_positives=True)
    yield case("contrast, shared", rows, columns, dtype, parameters, shared_positives=True)
