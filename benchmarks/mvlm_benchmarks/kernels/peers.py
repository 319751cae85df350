"""What each op is timed against. Peers of attention are in :mod:`mvlm_benchmarks.kernels.attention_peers`.

A builder takes a case's inputs and returns a function of the leaves, in their order, that gives the op's output. What
can be made once a batch and used by every layer (masks, index tensors) is made by the builder and not timed. A builder
raises ImportError or :class:`Missing` where the peer cannot run here, and :class:`NotApplicable` where it has nothing
that computes the op; anything else that it or its function raises is reported as an error of that peer.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm_benchmarks.kernels import attention_peers as attention
from mvlm_benchmarks.kernels.cases import Case
from mvlm_benchmarks.kernels.inputs import CHANNELS, FEATURES, PATCH, PATCHES, SIDE, Inputs
from mvlm_benchmarks.reasons import NotApplicable

Function = Callable[..., Tensor]
Builder = Callable[[Inputs], Function]


@dataclass(frozen=True)
class Peer:
    """One contender. builders: by op; an op that is not among them is none of this peer's business.

    distribution: the package whose version the results name. context: entered around every use, timing included.
    """

    name: str
    builders: dict[str, Builder]
    distribution: str = "torch"
    context: Callable[[], contextlib.AbstractContextManager[Any]] = field(default=contextlib.nullcontext)


def _normalized(images: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """images (B, C, H, W) or patches (B, K, C, P, P) -> the same, normalised; mean, std of a shape that broadcasts."""
    x = images.to(dtype)
    if images.dtype == torch.uint8:
        x = x / 255
    return (x - mean) / std


def _patchified(images: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C*P*P)."""
    grid = SIDE // PATCH
    x = images.reshape(-1, CHANNELS, grid, PATCH, grid, PATCH).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, PATCHES, FEATURES)


def _chosen(patches: Tensor, patch_ids: Tensor | None) -> Tensor:
    """(B, N, F) -> (B, K, F)."""
    return patches if patch_ids is None else patches.gather(1, patch_ids[:, :, None].expand(-1, -1, patches.shape[2]))


def _fixed(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor | None, Tensor, Tensor]:
    """int64 ids, as torch.gather wants them, and the channels' mean and std (C, 1, 1)."""
    ids = inputs.fixed["patch_ids"]
    images = inputs.fixed.get("images", inputs.leaves.get("images"))
    assert images is not None
    mean, std = (
        torch.tensor(inputs.fixed[k], device=images.device, dtype=dtype)[:, None, None] for k in ("mean", "std")
    )
    return None if ids is None else ids.long(), mean, std


def gather_eager(inputs: Inputs) -> Function:
    """Normalise, patchify, gather, as the MAE family does."""
    dtype = inputs.fixed["dtype"]
    ids, mean, std = _fixed(inputs, dtype)

    def gather(images: Tensor) -> Tensor:
        return _chosen(_patchified(_normalized(images, mean, std, dtype)), ids)

    return _with_images(gather, inputs)


def gather_first(inputs: Inputs) -> Function:
    """Patchify, gather, and normalise only what was chosen: the fewest bytes that torch ops can move here."""
    dtype = inputs.fixed["dtype"]
    ids, mean, std = _fixed(inputs, dtype)

    def gather(images: Tensor) -> Tensor:
        chosen = _chosen(_patchified(images), ids).unflatten(2, (CHANNELS, PATCH, PATCH))
        return _normalized(chosen, mean, std, dtype).flatten(2)

    return _with_images(gather, inputs)


def _with_images(gather: Function, inputs: Inputs) -> Function:
    """uint8 images get no gradient, so they are not among the leaves."""
    if "images" in inputs.leaves:
        return gather
    images = inputs.fixed["images"]
    return lambda: gather(images)


def _pixel_loss(inputs: Inputs) -> Callable[[Tensor], Tensor]:
    """The loss of predictions (B, K, F): target in float32, then torch's own loss."""
    fixed = inputs.fixed
    images, kind = fixed["images"], fixed["kind"]
    ids, mean, std = _fixed(inputs, torch.float32)
    loss = {"l1": F.l1_loss, "mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind]

    def of(pred: Tensor) -> Tensor:
        target = _chosen(_patchified(_normalized(images, mean, std, torch.float32)), ids)
        if fixed.get("normalize_target"):
            var, center = torch.var_mean(target, dim=2, keepdim=True)
            target = (target - center) / (var + 1e-6).sqrt()
        return loss(pred.float(), target)

    return of


def masked_loss_eager(inputs: Inputs) -> Function:
    return _pixel_loss(inputs)


def linear_loss_eager(inputs: Inputs) -> Function:
    loss = _pixel_loss(inputs)
    return lambda hidden, weight, bias: loss(F.linear(hidden, weight, bias))


def place_eager(inputs: Inputs) -> Function:
    """SimMIM's blend with the mask, or MAE's appended mask tokens put in order by a gather."""
    masked, ids = inputs.fixed.get("masked"), inputs.fixed.get("visible_ids")
    batch = inputs.leaves["tokens"].shape[0]
    restore = None
    if ids is not None:
        hidden = torch.ones(batch, PATCHES, dtype=torch.bool, device=ids.device).scatter(1, ids.long(), False)
        # Stable: visible patches (False) first and in order, so that its inverse finds each patch's token.
        restore = hidden.byte().argsort(dim=1, stable=True).argsort(dim=1)

    def place(tokens: Tensor, mask_token: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Tensor:
        if restore is not None:
            fill = mask_token.expand(batch, PATCHES - tokens.shape[1], -1)
            x = torch.cat([tokens, fill], dim=1).gather(1, restore[:, :, None].expand(-1, -1, tokens.shape[2]))
        else:
            assert masked is not None
            weight = masked[:, :, None].to(tokens.dtype)
            x = tokens * (1 - weight) + mask_token * weight
        return torch.cat([cls_token.expand(batch, 1, -1), x], dim=1) + pos_embed

    return place


def ours(case: Case, inputs: Inputs) -> Function:
    """The op of this library, on whichever backend it takes here."""
    names = list(inputs.leaves)
    return lambda *leaves: case.ours(**dict(zip(names, leaves, strict=True)), **inputs.fixed)


def ours_as_peer(case: Case) -> Peer:
    return Peer("ours", {case.op: lambda inputs: ours(case, inputs)})


def compiled(builder: Builder) -> Builder:
    """torch.compile of what builder returns, for these very shapes."""
    return lambda inputs: torch.compile(builder(inputs), dynamic=False)


def _not_in_liger(why: str) -> Builder:
    def build(inputs: Inputs) -> Function:
        raise NotApplicable(f"liger-kernel {why}")

    return build


EAGER: dict[str, Builder] = {
    "cross_attention": attention.eager,
    "gather_patches": gather_eager,
    "masked_pixel_loss": masked_loss_eager,
    "linear_pixel_loss": linear_loss_eager,
    "place_tokens": place_eager,
}
LIGER: dict[str, Builder] = {
    "cross_attention": attention.liger,
    "gather_patches": _not_in_liger("has no kernel that reads images"),
    "masked_pixel_loss": _not_in_liger("has losses over tokens and preferences, none over pixels"),
    "linear_pixel_loss": _not_in_liger("fuses a linear layer with losses over tokens, not over pixels"),
    "place_tokens": _not_in_liger("has no kernel that inserts tokens or adds a position embedding"),
}


def _only_attention(name: str, build: Builder, distribution: str, **options: Any) -> Peer:
    return Peer(name, {"cross_attention": build}, distribution, **options)


PEERS = [
    Peer("eager", EAGER),
    Peer("gather-first", {"gather_patches": gather_first}),
    Peer("compile", {op: compiled(builder) for op, builder in EAGER.items()}),
    _only_attention("sdpa-math", attention.sdpa, "torch", context=attention.math_backend),
    _only_attention("sdpa-efficient", attention.sdpa_cuda, "torch", context=attention.efficient_backend),
    _only_attention("sdpa-flash", attention.sdpa, "torch", context=attention.flash_backend),
    _only_attention("sdpa-cudnn", attention.sdpa_cuda, "torch", context=attention.cudnn_backend),
    _only_attention("flex", attention.flex, "torch"),
    _only_attention("xformers", attention.xformers, "xformers"),
    _only_attention("flash-attn-2", attention.flash_attn_2, "flash-attn"),
    _only_attention("flash-attn-4", attention.flash_attn_4, "flash-attn-4"),
    Peer("liger", LIGER, "liger-kernel"),
]
