"""Peers: other implementations of each op.

Those of attention are in :mod:`mvlm_benchmarks.kernels.attention_peers` and
:mod:`mvlm_benchmarks.kernels.packed_attention_peers`, those of the layers around it in
:mod:`mvlm_benchmarks.kernels.layers`.

A builder takes a case's inputs and returns a function that takes the leaves, in order, and computes the op's output.
The builder also makes masks and index tensors. They are not timed, because a model makes them once per batch for all
layers.

A builder raises ImportError or `Missing` if the peer cannot run on this machine, and `NotApplicable` if the peer does
not implement the op. Any other exception of the builder or its function is reported as an error of the peer.

Shape legend: B images, C channels, H and W their sides, P patch side, N patches, K chosen patches, F = C*P*P.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mvlm_kernels
from mvlm_benchmarks.kernels import attention_peers as attention
from mvlm_benchmarks.kernels import layers
from mvlm_benchmarks.kernels import packed_attention_peers as packed_attention
from mvlm_benchmarks.unavailable import NotApplicable
from mvlm_kernels.case import PAPER, Case, Inputs
from mvlm_kernels.cross_attention.arguments import short_sides_up_to

Function = Callable[..., Any]
Builder = Callable[[Inputs], Function]


@dataclass(frozen=True)
class Peer:
    """A named implementation of some ops."""

    name: str
    builders: dict[str, Builder]
    """Op -> builder. The peer is left out of the cases of other ops."""
    distribution: str = "torch"
    """Package whose version is stored with the results."""
    context: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)
    """Context in which the function is always called, also while it is timed."""


def _normalize(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise images (B, C, H, W) or patches (B, K, C, P, P): (x - mean) / std, with mean and std broadcast."""
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    return (x - mean) / std


def _patchify(images: Tensor) -> Tensor:
    """Cut images (B, C, H, W) into patches (B, N, C*P*P)."""
    patch, grid = PAPER.patch, PAPER.side // PAPER.patch
    x = images.reshape(-1, PAPER.channels, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, PAPER.patches, PAPER.features)


def _select(patches: Tensor, patch_ids: Tensor | None) -> Tensor:
    """Select patches: (B, N, F) -> (B, K, F)."""
    return patches if patch_ids is None else patches.gather(1, patch_ids[:, :, None].expand(-1, -1, patches.shape[2]))


def _ids_and_channels(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """Patch ids as int64, as torch.gather requires, and mean and std of the channels, (C, 1, 1) each."""
    ids = inputs.fixed["patch_ids"]
    images = inputs.fixed.get("images", inputs.leaves.get("images"))
    assert images is not None
    mean, std = (
        torch.tensor(inputs.fixed[k], device=images.device, dtype=dtype)[:, None, None] for k in ("mean", "std")
    )
    return None if ids is None else ids.long(), mean, std


def gather_eager(inputs: Inputs) -> Function:
    """Normalise, patchify, then gather, as MAE and its successors do."""
    dtype = inputs.fixed["dtype"]
    ids, mean, std = _ids_and_channels(inputs, dtype)

    def gather(images: Tensor) -> Tensor:
        return _select(_patchify(_normalize(images, mean, std, dtype)), ids)

    return _with_images(gather, inputs)


def gather_first(inputs: Inputs) -> Function:
    """Patchify, gather, then normalise only the chosen patches. Moves the fewest bytes that torch ops can."""
    dtype = inputs.fixed["dtype"]
    ids, mean, std = _ids_and_channels(inputs, dtype)

    def gather(images: Tensor) -> Tensor:
        chosen = _select(_patchify(images), ids).unflatten(2, (PAPER.channels, PAPER.patch, PAPER.patch))
        return _normalize(chosen, mean, std, dtype).flatten(2)

    return _with_images(gather, inputs)


def _with_images(gather: Function, inputs: Inputs) -> Function:
    """Bind uint8 images as an argument. They have no gradient, so they are not a leaf."""
    if "images" in inputs.leaves:
        return gather
    images = inputs.fixed["images"]
    return lambda: gather(images)


def masked_loss_eager(inputs: Inputs) -> Function:
    """Loss of predictions (B, K, F) by torch's loss function, with the target in float32."""
    fixed = inputs.fixed
    images, kind = fixed["images"], fixed["kind"]
    ids, mean, std = _ids_and_channels(inputs, torch.float32)
    loss = {"l1": F.l1_loss, "mse": F.mse_loss}[kind]

    def compute(pred: Tensor) -> Tensor:
        target = _select(_patchify(_normalize(images, mean, std, torch.float32)), ids)  # (B, K, F)
        if fixed.get("normalize_target"):
            var, center = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - center) / (var + 1e-6).sqrt()
        return loss(pred.float(), target)

    return compute


def place_eager(inputs: Inputs) -> Function:
    """Place mask tokens by multiplying and adding, as SimMIM does, or by concatenation and gather, as MAE does."""
    masked, ids = inputs.fixed.get("masked"), inputs.fixed.get("visible_ids")
    batch = inputs.leaves["tokens"].shape[0]
    restore = None
    if ids is not None:
        hidden = torch.ones(batch, PAPER.patches, dtype=torch.bool, device=ids.device).scatter(1, ids.long(), False)
        # A stable sort moves visible patches (False) to the front in order. Its inverse maps each patch to its token.
        restore = hidden.byte().argsort(dim=1, stable=True).argsort(dim=1)

    def place(tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        if restore is not None:
            fill = mask_token.expand(batch, PAPER.patches - tokens.shape[1], -1)
            x = torch.cat([tokens, fill], dim=1).gather(1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        else:
            assert masked is not None
            weight = masked[:, :, None].to(tokens.dtype)
            x = tokens * (1 - weight) + mask_token * weight
        sequences = batch
        if inputs.fixed.get("with_unmasked"):
            sequences, x = 2 * batch, torch.cat([tokens.to(x), x])
        return torch.cat([cls_token.expand(sequences, 1, -1), x], dim=1) + pos_embed

    return place


def ours(case: Case, inputs: Inputs) -> Function:
    """Function of a case's leaf tensors that calls our op, on the backend that the op chooses on this machine."""
    op, names = case.ours, list(inputs.leaves)
    return lambda *leaves: op(**dict(zip(names, leaves, strict=True)), **inputs.fixed)


def ours_as_peer(case: Case) -> Peer:
    """Our op as the contender `ours`."""
    return Peer("ours", {case.op: lambda inputs: ours(case, inputs)})


def _ours_with_long_sides(inputs: Inputs) -> Function:
    """Our kernels where both sides are longer than 128, as between image patches. By default SDPA runs there."""
    attention.require_cuda(inputs)
    if min(attention.Side(inputs, "q").longest, attention.Side(inputs, "k").longest) <= 128:
        raise NotApplicable("one side is short, and `ours` has the figures")
    return lambda q, k, v: mvlm_kernels.cross_attention(q, k, v, **inputs.fixed)


def _long_sides() -> contextlib.AbstractContextManager[Any]:
    return short_sides_up_to(256)


def compiled(builder: Builder) -> Builder:
    """Wrap the function of a builder in torch.compile, for static shapes."""
    return lambda inputs: torch.compile(builder(inputs), dynamic=False)


def _not_in(library: str, why: str) -> Builder:
    def build(inputs: Inputs) -> Function:
        raise NotApplicable(f"{library} {why}")

    return build


EAGER: dict[str, Builder] = {
    "cross_attention": attention.eager,
    "gather_patches": gather_eager,
    "masked_pixel_loss": masked_loss_eager,
    "place_tokens": place_eager,
    "add_layer_norm": layers.norm_eager,
    "gelu_linear": layers.gelu_eager,
    "linear_cross_entropy": layers.cross_entropy_eager,
    "qk_norm_rope": layers.rotary_eager,
    "contrastive_loss": layers.contrastive_eager,
}
LIGER: dict[str, Builder] = {
    "cross_attention": attention.liger,
    "gather_patches": _not_in("liger-kernel", "has no kernel that reads images"),
    "masked_pixel_loss": _not_in("liger-kernel", "has losses over tokens and preferences, none over pixels"),
    "place_tokens": _not_in("liger-kernel", "has no kernel that inserts tokens or adds a position embedding"),
    "add_layer_norm": layers.norm_liger,
    "gelu_linear": _not_in("liger-kernel", "fuses GELU with a gate, not with the linear layer behind it"),
    "linear_cross_entropy": layers.cross_entropy_liger,
}


def _attention_peer(name: str, build: Builder, distribution: str, **options: Any) -> Peer:
    return Peer(name, {"cross_attention": build}, distribution, **options)


PEERS = [
    _attention_peer("ours-256", _ours_with_long_sides, "torch", context=_long_sides),
    Peer("eager", EAGER),
    Peer("gather-first", {"gather_patches": gather_first}),
    Peer("compile", {op: compiled(builder) for op, builder in EAGER.items()}),
    _attention_peer("sdpa-math", attention.sdpa, "torch", context=attention.math_backend),
    _attention_peer("sdpa-efficient", attention.sdpa_cuda, "torch", context=attention.efficient_backend),
    _attention_peer("sdpa-flash", attention.sdpa, "torch", context=attention.flash_backend),
    _attention_peer("sdpa-cudnn", attention.sdpa_cuda, "torch", context=attention.cudnn_backend),
    _attention_peer("flex", attention.flex, "torch"),
    _attention_peer("varlen", packed_attention.varlen, "torch"),
    _attention_peer("xformers", packed_attention.xformers, "xformers"),
    _attention_peer("flash-attn-2", packed_attention.flash_attn_2, "flash-attn"),
    _attention_peer("flash-attn-4", packed_attention.flash_attn_4, "flash-attn-4"),
    Peer("tri-dao", {"add_layer_norm": layers.norm_tri_dao}, "flash-attn"),
    Peer("liger", LIGER, "liger-kernel"),
    Peer("quack", {"linear_cross_entropy": layers.cross_entropy_quack}, "quack-kernels"),
]
