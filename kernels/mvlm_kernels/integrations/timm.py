"""Patch embeddings of timm models that read patches directly from uint8 or floating images.

from mvlm_kernels.integrations.timm import swap
print(swap(model, mean=mean, std=std))  # what was swapped, and what not and why
model(images)                           # uint8 images; `undo()` of the report puts everything back
"""

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers.format import Format, nchw_to
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mvlm_kernels import dispatch, gather_patches, registration
from mvlm_kernels.dispatch import Refusal, refusal
from mvlm_kernels.integrations.calls import ALREADY_SWAPPED, OTHER_FORWARD, Part, SwapReport, listening, note
from mvlm_kernels.integrations.classes import in_torchscript, node_of_call, put_back, scripted_as, traced


class GatherPatchEmbed(PatchEmbed):
    """``timm.layers.PatchEmbed`` that normalises and gathers patches in one pass; made by :func:`swap`.

    ``forward(images)`` equals the original on normalised images, in every output format and for dynamic sizes.
    ``forward(images, patch_ids)`` embeds only the chosen patches, (B, K) ids -> (B, K, embed_dim), so that an MAE-style
    encoder never computes a masked patch. images may be uint8. mean and std normalise the pixels as they are read (see
    :func:`mvlm_kernels.gather_patches`).

    Where a gather cannot give the original's result, its own forward runs on normalised images: if ``proj`` has hooks
    or was wrapped (LoRA), if the image is padded or cut, or if patches are not square.
    """

    swapped_from = PatchEmbed
    # Without annotations, which would hide those of PatchEmbed from TorchScript.
    mean = cast("tuple[float, ...] | None", None)
    std = cast("tuple[float, ...] | None", None)
    range_is_known = False

    def __prepare_scriptable__(self) -> "GatherPatchEmbed":
        """``torch.jit.script`` compiles the original forward. ValueError for mean or std, which that has not."""
        self._refuse_values("torch.jit.script")
        return self

    def _refuse_values(self, tool: str) -> None:
        if self.mean is not None or self.std is not None:
            raise ValueError(
                f"{tool}: wanted a patch embedding that was swapped without mean and std, found one that normalises; "
                "undo() the swap first, and normalise the images"
            )

    def why_not_gathered(self, images: Tensor) -> Refusal | None:
        """Reason why the original forward runs for these images; None if the patches are gathered."""
        reason = why_not_read(self.proj)
        if reason is None and any(n % patch for n, patch in zip(images.shape[2:], self.proj.kernel_size, strict=True)):
            sides = f"images of {tuple(images.shape[2:])} pixels are padded or cut to patches of {self.patch_size}"
            return refusal(sides, "the original forward runs; give images of whole patches")
        return reason

    @scripted_as(PatchEmbed.forward)
    def forward(self, x: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """images x (B, C, H, W) and patch_ids (B, K), or None for all N patches, -> (B, K, embed_dim).

        Without patch_ids the result has the original's output format. Raises ValueError for images of another rank or
        number of channels, and, if the original was strict, of another size.
        """
        tracer = traced(x)
        if tracer is not None:
            node: Any = node_of_call(tracer, self, (x,) if patch_ids is None else (x, patch_ids), {})
            if node is None:
                self._refuse_values("torch.fx")
            return super().forward(x) if node is None else node
        channels = getattr(self.proj, "in_channels", None)  # a wrapper need not show it
        if x.ndim != 4 or channels not in (None, x.shape[1]):
            raise ValueError(f"images must have shape (B, {channels or 'C'}, H, W), got {tuple(x.shape)}")
        if self.strict_img_size and self.img_size is not None and tuple(x.shape[2:]) != self.img_size:
            raise ValueError(f"images must be {self.img_size} pixels, got {tuple(x.shape[2:])}")
        self._check_range(x)
        dtype = dispatch.autocast_dtype(x.device)
        if listening():
            patch = getattr(self.proj, "kernel_size", self.patch_size)[0]
            note(self, gather_patches, [self.why_not_gathered(x)], x, patch_ids, patch, mean=self.mean, std=self.std)
        if in_torchscript() or self.why_not_gathered(x) is not None:
            own = next(p.dtype for p in self.proj.parameters() if p.is_floating_point())
            return self._by_original_forward(x, patch_ids, _computed_in(own, dtype))
        weight = self.proj.weight  # once: a parametrization, such as a spectral norm, changes with each read
        dtype = _computed_in(weight.dtype, dtype)
        patch = self.proj.kernel_size[0]
        patches = gather_patches(x, patch_ids, patch, mean=self.mean, std=self.std, dtype=dtype)
        tokens = nn.functional.linear(patches, weight.flatten(1), self.proj.bias)  # (B, K, embed_dim)
        if patch_ids is None and not self.flatten:
            tokens = tokens.unflatten(1, (x.shape[2] // patch, x.shape[3] // patch))
            if self.output_fmt != Format.NHWC:
                tokens = nchw_to(tokens.permute(0, 3, 1, 2), self.output_fmt).contiguous()  # models call view on it
        return self.norm(tokens)

    def _check_range(self, x: Tensor) -> None:
        """Warn once of images whose values are not those that the weights expect.

        Floating images that :func:`swap` normalises have to be in 0..1; on a GPU, whose host would wait for the
        numbers, the first ones alone are looked at. Of uint8 images, of which nobody else can have normalised the
        values, mean and std have to be known.
        """
        normalises = self.mean is not None or self.std is not None
        if self.range_is_known or x.is_floating_point() != normalises or not x.numel():
            return
        if not registration.called_directly(x) or x.is_meta or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if not normalises:
            self.range_is_known = True
            warnings.warn(
                "uint8 images are read as x / 255 and not normalised: give the model's mean and std to swap()",
                stacklevel=2,
            )
            return
        low, high = (float(value) for value in x.detach().aminmax())
        outside = low < 0 or high > 1
        self.range_is_known = outside or x.is_cuda
        if outside:
            warnings.warn(
                f"images must be uint8, or floating in 0..1, got values in [{low:.3g}, {high:.3g}]: since "
                "swap(mean, std) the model normalises them itself; leave out the normalisation before it",
                stacklevel=2,
            )

    def _by_original_forward(self, x: Tensor, patch_ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        if patch_ids is not None and not self.flatten:
            raise ValueError(
                "patch_ids must be None where the output format is not (B, N, C), got a tensor: "
                f"{self.why_not_gathered(x)}"
            )
        if x.dtype == torch.uint8:
            x = x / 255
        for values, operation in ((self.mean, torch.sub), (self.std, torch.div)):
            if values is not None:
                x = operation(x, torch.stack([x.new_full((1, 1), value) for value in values]))
        tokens = super().forward(x.to(dtype))
        if patch_ids is None:
            return tokens
        return tokens.gather(1, patch_ids.long()[:, :, None].expand(-1, -1, tokens.shape[2]))


def _computed_in(weights: torch.dtype, autocast: torch.dtype | None) -> torch.dtype:
    """Dtype of a product with weights of a dtype: that of autocast, which leaves float64 alone."""
    return autocast if autocast is not None and weights != torch.float64 else weights


def why_not_read(proj: nn.Module) -> Refusal | None:
    """Reason why the weight of ``proj`` cannot be used without calling it; None if it can.

    Weights computed by ``torch.nn.utils.parametrizations`` can be read. Wrapped modules and hooks must be called.
    """
    if type(proj) is not nn.Conv2d and not (isinstance(proj, nn.Conv2d) and parametrize.is_parametrized(proj)):
        reason = f"proj must be a Conv2d, got {type(proj).__name__}"
        return refusal(reason, "the original forward runs; unwrap it, or merge its adapter")
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(proj, name) for name in hooks) or "forward" in vars(proj):
        return refusal("proj has hooks", "the original forward calls them; remove them")
    side = proj.kernel_size[0]
    plain = proj.kernel_size == proj.stride == (side, side) and proj.groups == 1 and proj.dilation == (1, 1)
    if not plain or proj.padding not in ((0, 0), "valid"):
        reason = f"proj must be a square conv of disjoint patches, got {proj}"
        return refusal(reason, "the original forward runs; use another patch embedding")
    return None


def why_not_swapped(module: nn.Module, *values: Sequence[float] | Tensor | None) -> Refusal | None:
    """Reason why a module cannot become a :class:`GatherPatchEmbed`; None if it can.

    values: its mean and std, one number for each channel, or None.
    """
    if isinstance(module, GatherPatchEmbed):
        return ALREADY_SWAPPED
    if type(module) is not PatchEmbed:
        kind = f"{type(module).__module__}.{type(module).__name__}"
        reason = f"it must be a timm.layers.PatchEmbed itself, got {kind}, whose forward may differ"
        return refusal(reason, "it stays; call gather_patches in its forward")
    if "forward" in vars(module):
        return OTHER_FORWARD
    reason = why_not_read(module.proj)
    if reason is not None:
        return reason
    for given in (len(x) for x in values if x is not None):
        if given != module.proj.in_channels:  # a PatchEmbed within a model reads features
            reason = f"proj reads {module.proj.in_channels} channels, and mean or std has {given} values"
            return refusal(
                reason, "the original forward runs without them; give one value for each channel of the images"
            )
    return None


def swap(
    model: nn.Module, *, mean: Sequence[float] | Tensor | None = None, std: Sequence[float] | Tensor | None = None
) -> SwapReport:
    """Make every patch embedding of a timm model a :class:`GatherPatchEmbed`, in place.

    The modules stay the same objects: parameters, hooks and the state dict do not change. mean, std: one value for each
    channel, in the units of pixels in 0..1; ValueError for those of pixels in 0..255. Without them uint8 images are
    divided by 255 alone, with a warning. The report lists each module that
    is a ``PatchEmbed`` or is named ``patch_embed``.
    """
    if any(isinstance(given, int | float) for given in (mean, std)):
        raise ValueError(f"mean and std must have one value for each channel, got {mean} and {std}")
    values = tuple(None if x is None else tuple(float(v) for v in x) for x in (mean, std))
    for name, given in zip(("mean", "std"), values, strict=True):
        if given is not None and max(given, default=0) > 1:
            raise ValueError(f"{name} must be that of pixels in 0..1, got {given}; divide those of 0..255 by 255")
    parts: list[Part] = []
    swapped: list[GatherPatchEmbed] = []
    for path, module in model.named_modules():
        if not isinstance(module, PatchEmbed) and path.rsplit(".", 1)[-1] != "patch_embed":
            continue
        reason = why_not_swapped(module, *values)
        parts.append(Part(path, type(module).__name__, reason))
        if reason is None:
            module.__class__ = GatherPatchEmbed
            embed = cast(GatherPatchEmbed, module)
            embed.mean, embed.std = values
            swapped.append(embed)

    def restore() -> None:
        put_back(swapped)
        for embed in swapped:
            for name in ("mean", "std", "range_is_known"):
                vars(embed).pop(name, None)

    return SwapReport(parts, restore, model)


def swap_patch_embed(
    model: nn.Module, *, mean: Sequence[float] | Tensor | None = None, std: Sequence[float] | Tensor | None = None
) -> nn.Module:
    """Swap ``model.patch_embed`` as :func:`swap` does, and return the model.

    Raises ValueError for a model without a patch_embed, or with one that cannot be swapped.
    """
    original = getattr(model, "patch_embed", None)
    if not isinstance(original, nn.Module):
        raise ValueError(f"model must have a patch_embed, got {type(model).__name__}")
    reason = why_not_swapped(original, mean, std)
    if reason is not None:
        raise ValueError(f"model.patch_embed cannot be swapped: {reason}")
    swap(original, mean=mean, std=std)
    return model
