"""Patch embedding for timm models that reads chosen patches directly from uint8 or floating images.

This module does not import timm: :class:`GatherPatchEmbed` is built from the ``PatchEmbed`` of the caller's model.
"""

from typing import Any

from torch import Tensor, nn

from mvlm_kernels import dispatch, gather_patches
from mvlm_kernels.gather_patches.arguments import ChannelValues


class GatherPatchEmbed(nn.Module):
    """Replacement for ``timm.layers.PatchEmbed`` with the same parameters under the same names.

    ``forward(images)`` equals the original on normalised images. ``forward(images, patch_ids)`` embeds only the chosen
    patches, (B, K) ids -> (B, K, embed_dim), so that an MAE-style encoder never computes a masked patch. images may be
    uint8. mean and std normalise the pixels as they are read (see :func:`mvlm_kernels.gather_patches`).

    The weight of ``proj`` is read directly, so forward hooks on ``proj`` are not called.
    """

    def __init__(self, original: nn.Module, *, mean: ChannelValues = None, std: ChannelValues = None) -> None:
        """Take over the parameters of ``original``.

        Raises ValueError if it is not a plain embedding: a square conv with stride equal to its kernel, without
        padding, groups or dilation, whose output is flattened to (B, N, C) and whose input is not padded.
        """
        super().__init__()
        proj: Any = getattr(original, "proj", None)
        if not isinstance(proj, nn.Conv2d):
            raise ValueError(
                f"original must be a timm PatchEmbed whose proj is a Conv2d, got {type(original).__name__} with a proj "
                f"of type {type(proj).__name__}"
            )
        side = proj.kernel_size[0]
        plain = (
            proj.kernel_size == proj.stride == (side, side)
            and proj.groups == 1
            and proj.padding in ((0, 0), "valid")
            and proj.dilation == (1, 1)
        )
        if not plain:
            raise ValueError(f"original.proj must be a square conv of disjoint patches, got {proj}")
        if not getattr(original, "flatten", True) or getattr(original, "dynamic_img_pad", False):
            raise ValueError(
                "original must have flatten=True and dynamic_img_pad=False, got "
                f"flatten={getattr(original, 'flatten', True)}, "
                f"dynamic_img_pad={getattr(original, 'dynamic_img_pad', False)}"
            )
        self.proj = proj
        self.norm = getattr(original, "norm", nn.Identity())
        # timm's vision transformer reads these attributes of its patch embedding.
        for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt", "strict_img_size"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.dynamic_img_pad = False
        self._original_feat_ratio = (side, side)
        self.mean, self.std = mean, std

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token along a side: timm's interface."""
        return self._original_feat_ratio[0] if as_scalar else self._original_feat_ratio

    def forward(self, images: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """images (B, C, H, W), patch_ids (B, K) or None for all N patches -> (B, K, embed_dim).

        Raises ValueError for images of another size than the embedding was built for, if the original was strict.
        """
        size = getattr(self, "img_size", None)
        if getattr(self, "strict_img_size", False) and size is not None and tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(f"images must be {tuple(size)} pixels, got {tuple(images.shape[-2:])}")
        dtype = dispatch.autocast_dtype(images.device) or self.proj.weight.dtype
        patches = gather_patches(
            images, patch_ids, self._original_feat_ratio[0], mean=self.mean, std=self.std, dtype=dtype
        )  # (B, K, C*P*P)
        return self.norm(nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


def swap_patch_embed(model: nn.Module, *, mean: ChannelValues = None, std: ChannelValues = None) -> nn.Module:
    """Replace ``model.patch_embed`` of a timm model by a :class:`GatherPatchEmbed` with its parameters.

    mean, std: one value for each channel, in the units of pixels in 0..1. Returns the model. Raises ValueError for a
    model without a patch_embed, or with one that cannot be replaced.
    """
    original = getattr(model, "patch_embed", None)
    if not isinstance(original, nn.Module):
        raise ValueError(f"model must have a patch_embed, got {type(model).__name__}")
    model.patch_embed = GatherPatchEmbed(original, mean=mean, std=std)
    return model
