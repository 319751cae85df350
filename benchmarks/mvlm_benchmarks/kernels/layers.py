"""Peers of the layers around attention: residual with LayerNorm, the feed-forward's GELU, the LM head and the losses.

Their builders follow the rules of :mod:`mvlm_benchmarks.kernels.peers`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_benchmarks.unavailable import Missing, NotApplicable
from mvlm_kernels.case import PAPER, Inputs

Function = Callable[..., Any]


def cross_entropy_eager(inputs: Inputs) -> Function:
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: F.cross_entropy(F.linear(x, weight, bias).float(), targets)


def cross_entropy_liger(inputs: Inputs) -> Function:
    """Liger's fused linear layer and cross-entropy, the model of ours."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    _require_cuda(inputs)
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: liger_fused_linear_cross_entropy(x, weight, targets, bias)


def cross_entropy_quack(inputs: Inputs) -> Function:
    """torch's product, then QuACK's cross-entropy of the whole logits."""
    from quack import cross_entropy  # pyright: ignore[reportMissingImports]

    _require_cuda(inputs)
    targets = inputs.fixed["targets"]
    return lambda x, weight, bias: cross_entropy(F.linear(x, weight, bias), targets, reduction="mean")


def contrastive_eager(inputs: Inputs) -> Function:
    """Loss from kept logits, as open_clip's ClipLoss and SigLipLoss have it, in float32 as under autocast."""
    pairs = len(inputs.leaves["image"])
    own = torch.arange(pairs, device=inputs.leaves["image"].device)
    signs = 2 * torch.eye(pairs, device=own.device) - 1

    def run(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor | None = None) -> Tensor:
        logits = (image @ text.T).float() * log_scale.exp()
        if bias is not None:
            return -F.logsigmoid(signs * (logits + bias)).sum() / pairs
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    return run


def rotary_eager(inputs: Inputs) -> Any:
    """Queries and keys normed and rotated as timm's EvaAttention has it; leaves are the projection and the norms'."""
    given, names = inputs.fixed, list(inputs.leaves)[1:]
    sin, cos, prefix, width = given["sin"], given["cos"], given["prefix_tokens"], inputs.leaves["qkv"].shape[-1]

    def turned(x: Tensor) -> Tensor:
        if given["interleaved"]:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([-b, a], dim=-1)

    def run(qkv: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        by_name = dict(zip(names, vectors, strict=True))
        found = []
        for x, of in ((q, "q"), (k, "k")):
            if given["norm"] == "layer":  # in float32, as autocast has it
                x = F.layer_norm(x.float(), (width,), by_name[f"{of}_weight"], by_name[f"{of}_bias"], 1e-6)
            behind = x[:, :, prefix:]
            behind = (behind * cos + turned(behind) * sin).to(x.dtype)
            found.append(torch.cat([x[:, :, :prefix], behind], dim=2).type_as(v).transpose(1, 2))
        return found[0], found[1], v.transpose(1, 2)

    return run


def norm_eager(inputs: Inputs) -> Function:
    """The chain of torch ops that autocast runs: the linear layer's bias, add, LayerNorm in float32, cast.

    With gate, scale and shift it is that of a DiT block, and with a gate (C,) that of LayerScale.
    """
    fixed, names = inputs.fixed, list(inputs.leaves)
    eps, dtype = fixed["eps"], fixed["out_dtype"]
    if "gate" not in names and fixed.get("kind") != "rms":
        return _norm_chain(inputs, lambda x, weight, bias, eps: F.layer_norm(x, (PAPER.width,), weight, bias, eps))

    def compute(x: Tensor, y: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        of = {name: v if v.ndim == 1 else v[:, None] for name, v in zip(names[2:], vectors, strict=True)}
        total = x + (of["gate"] * y if "gate" in of else y)
        if fixed.get("kind") == "rms":
            normalised = F.rms_norm(total, (PAPER.width,), of.get("weight"), eps)
        else:
            normalised = F.layer_norm(total, (PAPER.width,), of.get("weight"), of.get("bias"), eps)
        if "scale" in of:
            normalised = normalised * (1 + of["scale"]) + of["shift"]
        return total, normalised.to(dtype)

    return compute


def _norm_chain(inputs: Inputs, layer_norm: Function) -> Function:
    eps, dtype, post_norm = (inputs.fixed[name] for name in ("eps", "out_dtype", "post_norm"))

    def compute(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + (y + y_bias.to(y))
        normalised = layer_norm(total, weight, bias, eps)
        return (normalised if post_norm else total), normalised.to(dtype)

    return compute


def norm_tri_dao(inputs: Inputs) -> Function:
    """flash-attn's Triton LayerNorm, which adds the residual in float32 in the same pass. It takes no bias of y."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn  # pyright: ignore[reportMissingImports]

    _require_unmodulated(inputs)
    _require_cuda(inputs)
    eps, dtype, post_norm = (inputs.fixed[name] for name in ("eps", "out_dtype", "post_norm"))

    def compute(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, y_bias: Tensor) -> tuple[Tensor, Tensor]:
        normalised, total = layer_norm_fn(
            y + y_bias.to(y), weight, bias, residual=x, eps=eps, prenorm=True, residual_in_fp32=True
        )
        return (normalised.float() if post_norm else total), normalised.to(dtype)

    return compute


def norm_liger(inputs: Inputs) -> Function:
    """The chain with Liger's LayerNorm. Liger fuses the residual with RMSNorm only."""
    from liger_kernel.transformers.functional import liger_layer_norm  # pyright: ignore[reportMissingImports]

    _require_unmodulated(inputs)
    _require_cuda(inputs)
    return _norm_chain(inputs, liger_layer_norm)


def _require_unmodulated(inputs: Inputs) -> None:
    if "gate" in inputs.leaves:
        raise NotApplicable("its norms have no gate, scale and shift of a sample")


def gelu_eager(inputs: Inputs) -> Function:
    """The chain of torch ops that autocast runs, with parameters cast to the dtype of h."""
    return lambda h, weight, bias, h_bias: F.linear(F.gelu(h + h_bias.to(h)), weight.to(h), bias.to(h))


def _require_cuda(inputs: Inputs) -> None:
    if not next(iter(inputs.leaves.values())).is_cuda:
        raise Missing("needs a CUDA device")
