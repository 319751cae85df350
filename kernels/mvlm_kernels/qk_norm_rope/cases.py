"""Cases of ``qk_norm_rope``, and its oracle. Legend: B samples, N tokens, H heads, D width of a head."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mvlm_kernels.case import Case, Draw, Inputs
from mvlm_kernels.qk_norm_rope import qk_norm_rope

FAST = {"dinov3/bf16/2x21x6x64", "all/bf16/2x21x6x64", "eva02/bf16/2x5x3x40", "rms/fp32/2x21x6x64"}
"""Cases that are emulated in every suite."""
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def oracle(
    qkv: Tensor, sin: Tensor | None, cos: Tensor | None, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    q_bias: Tensor | None = None, k_bias: Tensor | None = None, eps: float = 1e-6, norm: str = "none",
    interleaved: bool = False, prefix_tokens: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Each head by itself, and each pair of it as a product with a matrix of two rows."""

    def of_head(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """Rows (.., N, D) of one head."""
        if norm != "none":
            x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
            x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
            x = x * (1 if weight is None else weight) + (0 if bias is None else bias)
        if sin is None or cos is None:
            return x
        half, turned = x.shape[-1] // 2, []
        pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
        behind, columns = x[..., prefix_tokens:, :], {}
        for i, j in pairs:
            columns[i] = behind[..., i] * cos[..., i] - behind[..., j] * sin[..., i]
            columns[j] = behind[..., j] * cos[..., j] + behind[..., i] * sin[..., j]
        turned = torch.stack([columns[i] for i in range(2 * half)], dim=-1)
        return torch.cat([x[..., :prefix_tokens, :], turned], dim=-2)

    q, k, v = qkv.unbind(-3)
    q, k = (
        torch.stack([of_head(head, weight, bias) for head in x.unbind(-2)], dim=-2)
        for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias))
    )
    return q, k, v


@dataclass(frozen=True)
class Form:
    """Parts of the op that a case has."""

    norm: str = "none"
    affine: str = ""
    """Names of the vectors of both norms."""
    interleaved: bool = False
    prefix: int = 0
    tables: str = "of all"
    """Tables of angles: "of all" samples, "of each", or "none"."""
    packed: bool = False


DINOV3, EVA02 = Form(prefix=5), Form(interleaved=True, prefix=1)
LAYER = Form("layer", "weight bias", prefix=1)
FORMS = {
    "dinov3": DINOV3,
    "eva02": EVA02,
    "layer": LAYER,
    "rms": Form("rms", "weight"),
    "all": Form("layer", "weight bias", interleaved=True, prefix=2, tables="of each"),
    "packed": Form("rms", packed=True),
    "norm-alone": Form("layer", "bias", tables="none"),
}


def case(
    label: str, shape: tuple[int, int, int, int], form: Form, dtype: torch.dtype = BF16,
    parameters: torch.dtype = FP32, *, grad_heads_first: bool = False, multiprocessors: int = 0,
) -> Case:  # fmt: skip
    """qkv of shape (B, N, H, D); packed, its samples are one. parameters: dtype of vectors and tables.

    grad_heads_first: the gradients of q, k and v lie in memory as (B, H, N, D), as SDPA may give them.
    """
    batch, tokens, heads, width = shape
    rows, leading = batch * tokens, (batch * tokens,) if form.packed else (batch, tokens)
    names = [f"{of}_{name}" for name in form.affine.split() for of in "qk"]

    def make(device: str, seed: int = 0) -> Inputs:
        draw = Draw(device, seed)
        leaves = {"qkv": draw.normal(*leading, 3, heads, width, dtype=dtype)}
        leaves |= {name: draw.normal(width, dtype=parameters) for name in names}
        sin = cos = None
        if form.tables != "none":
            of_samples = leading[:-1] if form.tables == "of each" else ()
            angles = draw.normal(*of_samples, leading[-1] - form.prefix, width // 2, dtype=parameters, scale=3.0)
            angles = (
                angles.repeat_interleave(2, -1) if form.interleaved else angles.repeat([1] * len(of_samples) + [1, 2])
            )
            # As timm has them: slices of one tensor.
            sin, cos = torch.cat([angles.sin(), angles.cos()], dim=-1).chunk(2, dim=-1)
        options = {"norm": form.norm, "interleaved": form.interleaved, "prefix_tokens": form.prefix}
        return Inputs(leaves, {"sin": sin, "cos": cos, **options})

    values, item = rows * heads * width, dtype.itemsize
    angles = 2 * (rows if form.tables == "of each" or form.packed else tokens) - 2 * form.prefix
    tables = 0 if form.tables == "none" else angles * width * parameters.itemsize
    vectors, normed = len(names) * width * parameters.itemsize, 0 if form.norm == "none" else 2 * values * item
    read = vectors if "weight" in form.affine else 0
    return Case(
        "qk_norm_rope", label, dtype, make, qk_norm_rope, oracle,
        (4 * values * item + tables + vectors, 6 * values * item + normed + tables + vectors + read),
        multiprocessors=multiprocessors,
        incoming=(lambda grad: grad.transpose(-3, -2).contiguous().transpose(-3, -2)) if grad_heads_first else _as_is,
        terms=dict.fromkeys(names, 4 * math.sqrt(rows * heads)) | dict.fromkeys(("out 0", "out 1", "qkv"), 8.0),
    )  # fmt: skip


def _as_is(grad: Tensor) -> Tensor:
    return grad


def of_images(batch: int, dtype: torch.dtype, form: Form, name: str, tokens: int = 197) -> Case:
    """Projection of a layer of ViT-base, with tables in float32."""
    return case(f"{batch} x {tokens} tokens of 12 x 64, {name}", (batch, tokens, 12, 64), form, dtype)


def timed(batch: int, dtype: torch.dtype) -> list[Case]:
    return [
        replace(of_images(batch, dtype, DINOV3, "rotated halves", 201), core=True),
        of_images(batch, dtype, EVA02, "rotated pairs"),
        of_images(batch, dtype, LAYER, "LayerNorm and rotated halves"),
    ]


def small(dtype: torch.dtype) -> list[Case]:
    return [case("3 x 7 tokens of 3 x 24", (3, 7, 3, 24), LAYER, dtype), case("eva", (3, 7, 3, 24), EVA02, dtype)]


def compiled() -> Iterator[Case]:
    for name, form in FORMS.items():
        yield case(f"bf16/12x64/{name}", (64, 197, 12, 64), form)
    for heads, width in ((16, 64), (16, 80), (16, 72), (12, 128), (3, 64), (8, 32), (8, 256)):
        for name in ("dinov3", "all"):
            yield case(f"bf16/{heads}x{width}/{name}", (64, 197, heads, width), FORMS[name])
    for dtype, name in ((FP16, "fp16"), (FP32, "fp32")):
        yield case(f"{name}/12x64/layer", (64, 197, 12, 64), LAYER, dtype)
    yield case("bf16/12x64/layer, parameters in bf16", (64, 197, 12, 64), LAYER, BF16, BF16)


def emulated() -> Iterator[Case]:
    """Each program of the backward pass takes several tiles."""
    sizes = ((2, 21, 6, 64), (2, 5, 3, 40), (1, 197, 4, 32), (3, 7, 1, 6), (2, 6, 2, 128))
    types = {"bf16": BF16, "fp16": FP16, "fp32": FP32}
    for (name, form), (kind, dtype), shape in itertools.product(FORMS.items(), types.items(), sizes):
        form = replace(form, prefix=min(form.prefix, shape[1] - 1))
        label = f"{name}/{kind}/{'x'.join(map(str, shape))}"
        yield case(label, shape, form, dtype, grad_heads_first=name in ("eva02", "layer"), multiprocessors=1)


def properties(number: int, dtype: torch.dtype, parameters: torch.dtype) -> Iterator[Case]:
    """Few narrow heads. Another `number` has other sizes.

    Their width is no number of tokens that a test asks for: a compiler takes sizes that are equal for one size.
    """
    shape = (2 + number, 4 + number, 3, 10)
    yield case("qk-norm, rotated halves", shape, replace(LAYER, tables="of each"), dtype, parameters)
    yield case("rotated pairs", shape, EVA02, dtype, parameters)
    yield case("packed qk-norm", shape, FORMS["packed"], dtype, parameters)
