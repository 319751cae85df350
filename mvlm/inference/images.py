"""Images in any form as pixels of the model's size, and images with masked patches painted grey.

Shape legend: B batch, n images, S image side, H and W of an image as given, K masked patches.
"""

import io
import itertools
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvlm.errors import RunError
from mvlm.model.patches import patchify, unpatchify
from mvlm_dataloading.loader.resize import Resize
from mvlm_dataloading.sources.strip import to_rgb, turn

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are decoded. Pillow would hand others, such as EPS, to programs of the system."""
GREY = 190  # of masked patches
MAX_PIXELS = 100_000_000
"""Largest image that is decoded, width times height: a small file may hold an image that fills the memory."""
ImageLike = str | Path | bytes | Image.Image | NDArray[Any] | Tensor
"""An image: a path; an encoded file; a PIL image; an array (H, W), (H, W, 3) or (H, W, 4); a tensor (1, H, W) or
(3, H, W). Numbers are uint8, or floats from 0 to 1, which are rounded to 8 bits."""
Images = ImageLike | Iterable[ImageLike]
"""One image, or an iterable of images. An array or a tensor with one more axis in front is a batch of images."""
T = TypeVar("T")


def load_image(image: ImageLike, side: int, name: str = "image") -> Tensor:
    """An image as uint8 (3, S, S), squeezed to a square of `side` pixels, turned as its EXIF data say.

    The resize is the loader's (bilinear, antialiased), so a PNG has the pixels that it has in a data set. Transparent
    areas become white, as where a data set is built; in tars that are used in place they are not.

    Args:
        name: noun for the image in an error, unless it is a path.

    Raises:
        RunError: the image is missing, is not an image, or has too many pixels.
    """
    pixels = image if isinstance(image, np.ndarray | Tensor) else decode_image(image, name)
    rgb = _as_rgb(pixels, name)
    return torch.from_numpy(Resize(side, 1, planes=True)([rgb])[0])


def is_single_image(images: Images) -> bool:
    """True for one image, False for a sequence or a batch of images, however many."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, str | Path | bytes | Image.Image)


def each_image(images: Images) -> Iterator[ImageLike]:
    """The images one by one. A single image is a sequence of one.

    Raises:
        RunError: the value is neither an image nor a sequence of images.
    """
    if is_single_image(images):
        return iter([cast(ImageLike, images)])
    if not isinstance(images, Iterable):
        raise RunError(f"images: wanted an image or a sequence of images, got {type(images).__name__}")
    return iter(cast(Iterable[ImageLike], images))


def load_batches(images: Iterable[ImageLike], side: int, batch_size: int) -> Iterator[Tensor]:
    """Batches uint8 (B, 3, S, S) of images. A thread loads the next batch while the caller works on one."""
    numbered = enumerate(images)

    def batches() -> Iterator[Tensor]:
        while batch := list(itertools.islice(numbered, batch_size)):
            yield torch.stack([load_image(image, side, f"image {number}") for number, image in batch])

    return one_ahead(batches())


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items. A thread makes the next one while the caller works on one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mvlm-ahead") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield cast(T, item)


def decode_image(
    image: str | Path | bytes | Image.Image, name: str = "image", max_pixels: int = MAX_PIXELS
) -> NDArray[np.uint8]:
    """Pixels uint8 (H, W, 3) of a path, an encoded file or a PIL image. RunError as for `load_image`."""
    name = str(image) if isinstance(image, str | Path) else name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is MAX_PIXELS
            opened = (
                nullcontext(image)
                if isinstance(image, Image.Image)
                else Image.open(_source(image, name), formats=FORMATS)
            )
        with opened as file:
            width, height = file.size
            if width * height > max_pixels:
                raise RunError(f"{name}: wanted at most {max_pixels} pixels, found {width} x {height}; make it smaller")
            return np.array(to_rgb(turn(file)))
    except FileNotFoundError:
        raise RunError(f"{name}: wanted an image, found no such file; check the path") from None
    except Image.DecompressionBombError as error:
        raise RunError(f"{name}: wanted at most {max_pixels} pixels, found more ({error}); make it smaller") from None
    except RunError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        reason = str(error).replace(str(image), "the file") if isinstance(image, str | Path) else str(error)
        raise RunError(f"{name}: wanted an image, could not read it: {reason[:200]}; use a PNG, JPEG or WebP") from None


def _source(image: object, name: str) -> str | Path | io.BytesIO:
    if isinstance(image, bytes | bytearray | memoryview):
        return io.BytesIO(image)
    if isinstance(image, str | Path):
        return image
    raise RunError(
        f"{name}: wanted a path, bytes, a PIL image, an array or a tensor, got {type(image).__name__}; convert it"
    )


def _as_rgb(pixels: NDArray[Any] | Tensor, name: str) -> NDArray[np.uint8]:
    """Pixels uint8 (H, W, 3) of an array, channels last, or a tensor, channels first."""
    given = tuple(pixels.shape)
    if isinstance(pixels, Tensor):
        array = pixels.detach().cpu().float() if pixels.is_floating_point() else pixels.detach().cpu()
        array = array.permute(1, 2, 0).numpy() if array.ndim == 3 else array.numpy()
        wanted, fits = "(3, H, W) or (1, H, W)", len(given) == 3 and given[0] in (1, 3)
    else:
        array = pixels[:, :, None] if pixels.ndim == 2 else pixels
        wanted, fits = "(H, W, 3), (H, W, 4) or (H, W)", array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if not fits or 0 in given:
        kind = "a tensor" if isinstance(pixels, Tensor) else "an array"
        raise RunError(f"{name}: wanted {kind} {wanted}, got {given}; change its shape")
    if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise RunError(f"{name}: wanted uint8, or floats from 0 to 1, got {array.dtype}; convert it")
    if array.shape[2] == 4:
        return decode_image(Image.fromarray(np.ascontiguousarray(array)), name)
    return np.array(np.broadcast_to(array, (*array.shape[:2], 3)))


def hide_patches(images: Tensor, patch_ids: Tensor, patch_size: int) -> Tensor:
    """uint8 images (B, 3, S, S) with the patches int64 (B, K) painted grey."""
    patches = patchify(images, patch_size)
    return unpatchify(patches.scatter(1, patch_ids.unsqueeze(-1).expand(-1, -1, patches.shape[-1]), GREY), patch_size)
