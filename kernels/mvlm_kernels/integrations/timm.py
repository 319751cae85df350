"""timm: a patch embedding that reads chosen patches straight from uint8 or float images.

Nothing here imports timm: :class:`GatherPatchEmbed` is built from the ``PatchEmbed`` of a model that the caller has.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mvlm_kernels import gather_patches
from mvlm_kernels.gather_patches.arguments import ChannelValues


class GatherPatchEmbed(nn.Module):
    """Takes the place of ``timm.layers.PatchEmbed``, with the same parameters under the same names.

    ``forward(images)`` is what the original gives on normalised images; ``forward(images, patch_ids)`` embeds the
    chosen patches alone, (B, K) ids -> (B, K, embed_dim), so that an MAE-style encoder never computes a masked patch.
    images may be uint8; mean and std, where given, normalise on the way (see :func:`mvlm_kernels.gather_patches`).
    """

    def __init__(self, original: nn.Module, *, mean: ChannelValues = None, std: ChannelValues = None) -> None:
        """Raises ValueError where the original is not a plain embedding: a square conv with stride equal to its kernel,
        without padding, groups or dilation, whose output is flattened to (B, N, C) and whose input is not padded."""
        super().__init__()
        proj: Any = getattr(original, "proj", None)
        if not isinstance(proj, nn.Conv2d):
            raise ValueError(
                f"original must be a timm PatchEmbed with a Conv2d named proj, got {type(original).__name__}"
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
                "original must flatten its output and not pad its input, got flatten or dynamic_img_pad set"
            )
        self.proj = proj
        self.norm = getattr(original, "norm", nn.Identity())
        # timm's vision transformer reads these of its patch embedding.
        for name in ("img_size", "patch_size", "grid_size", "num_patches", "flatten", "output_fmt", "strict_img_size"):
            if hasattr(original, name):
                setattr(self, name, getattr(original, name))
        self.dynamic_img_pad = False
        self._original_feat_ratio = (side, side)
        self.mean, self.std = mean, std

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels to a token along a side, as timm asks for it."""
        return self._original_feat_ratio[0] if as_scalar else self._original_feat_ratio

    def forward(self, images: Tensor, patch_ids: Tensor | None = None) -> Tensor:
        """images (B, C, H, W), patch_ids (B, K) or None for all N -> (B, K, embed_dim).

        Raises ValueError for images of another size than the embedding was built for, where that was strict.
        """
        size = getattr(self, "img_size", None)
        if getattr(self, "strict_img_size", False) and size is not None and tuple(images.shape[-2:]) != tuple(size):
            raise ValueError(f"images must be {tuple(size)} pixels, got {tuple(images.shape[-2:])}")
        dtype = self.proj.weight.dtype
        if torch.is_autocast_enabled(images.device.type):
            dtype = torch.get_autocast_dtype(images.device.type)
        patches = gather_patches(
            images, patch_ids, self._original_feat_ratio[0], mean=self.mean, std=self.std, dtype=dtype
        )  # (B, K, C*P*P)
        return self.norm(nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias))


def swap_patch_embed(model: nn.Module, *, mean: ChannelValues = None, std: ChannelValues = None) -> nn.Module:
    """Replace ``model.patch_embed`` of a timm model by a :class:`GatherPatchEmbed` of its parameters.

    Returns the model. Raises ValueError where it has none, or one that cannot be replaced.
    """
    original = getattr(model, "patch_embed", None)
    if not isinstance(original, nn.Module):
        raise ValueError(f"model must have a patch_embed, got {type(model).__name__}")
    model.patch_embed = GatherPatchEmbed(original, mean=mean, std=std)
    return model
