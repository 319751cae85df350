"""Images loaded from files, and images with masked patches painted grey.

Shape legend: B batch, S image side, K masked patches.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mvlm.errors import RunError
from mvlm.model.patches import patchify, unpatchify

GREY = 190  # of masked patches


def load_image(path: Path, side: int) -> Tensor:
    """An image file as uint8 (3, S, S), squeezed to a square of `side` pixels, transparent areas white.

    Raises:
        RunError: the file is missing or is not an image.
    """
    try:
        with Image.open(path) as file:
            rgba = file.convert("RGBA")
    except FileNotFoundError:
        raise RunError(f"{path}: wanted an image, found no such file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise RunError(f"{path}: wanted an image, could not read it: {error}") from None
    white = Image.new("RGBA", rgba.size, "white")
    image = Image.alpha_composite(white, rgba).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def hide_patches(images: Tensor, patch_ids: Tensor, patch_size: int) -> Tensor:
    """uint8 images (B, 3, S, S) with the patches int64 (B, K) painted grey."""
    patches = patchify(images, patch_size)
    return unpatchify(patches.scatter(1, patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), GREY), patch_size)
