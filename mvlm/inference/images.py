"""Images in any form as pixels of the model's size, and images with masked patches painted grey.

Shape legend: B batch, n images, S image side, H and W of an image as given, K masked patches.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mvlm.errors import RunError, shown
from mvlm.model.encoders import patchify, unpatchify
from mvlm_dataloading.images.colours import BAND, RgbRows
from mvlm_dataloading.images.decode import check_memory, check_size, decode
from mvlm_dataloading.images.limits import ImageLimits, ImageRefusedError
from mvlm_dataloading.loader.pixels import Resize

GREY = 190  # of masked patches
LIMITS = ImageLimits()
"""Largest size in bytes and pixels of an image that is decoded, and the memory that it may take (SECURITY.md)."""
ImageLike = str | Path | bytes | Image.Image | NDArray[Any] | Tensor
"""An image: a path; an encoded file; a PIL image; an array (H, W), (H, W, 3) or (H, W, 4); a tensor (1, H, W) or
(3, H, W). Numbers are uint8, or floats from 0 to 1, which are rounded to 8 bits."""
Images = ImageLike | Iterable[ImageLike]
"""One image, or an iterable of images. An array or a tensor with one more axis in front is a batch of images."""
T = TypeVar("T")


def load_image(image: ImageLike, side: int, name: str | None = None, limits: ImageLimits = LIMITS) -> Tensor:
    """An image as uint8 (3, S, S), squeezed to a square of `side` pixels, turned as its EXIF data say.

    The resize is the loader's (bilinear, antialiased), so a PNG has the pixels that it has in a data set. Transparent
    areas become white, as where a data set is built; in tars that are used in place they are not. A JPEG that would
    take more memory than `limits` allow is decoded at 1/2, 1/4 or 1/8 of its sides.

    Args:
        name: noun for the image in an error. Default: its path, or "image".

    Raises:
        RunError: the image is missing, is not a whole image, or is beyond `limits`.
    """
    with _refusals(image, name):
        if not isinstance(image, np.ndarray | Tensor):
            return torch.from_numpy(_squeezed(_decoded(image, name, limits, 3 * side), side))
        if isinstance(image, Tensor):
            _check_dense(image, name or "image")
        height, width = _size_of(image)
        check_size(width, height, limits)
        check_memory(width, height, 3 * side * height, limits)
        return torch.from_numpy(Resize(side, 1, planes=True)([_as_rgb(image, name or "image")])[0])


@contextmanager
def _refusals(image: object, name: str | None) -> Iterator[None]:
    """Context in which an error of decoding becomes a RunError that names the image.

    name: noun for the image. Default: its path, or "image".
    """
    try:
        yield
    except ImageRefusedError as refused:
        raise RunError(f"{name or (image if isinstance(image, str | Path) else 'image')}: {refused}") from None


def _squeezed(rows: RgbRows, side: int) -> NDArray[np.uint8]:
    """Resize a decoded image to pixels uint8 (3, S, S), S = `side`.

    A large image is decoded in bands of rows, each resized to its final width at once; torch resizes widths first too.
    """
    resize = Resize(side, 1, planes=True)
    if rows.width * rows.height <= 2 * BAND:
        return resize([rows.pixels()])[0]
    narrow = np.empty((rows.height, side, 3), np.uint8)
    for first, end in rows.bands():
        band = torch.from_numpy(rows.rows(first, end).copy()).permute(2, 0, 1)[None]
        band = torch.nn.functional.interpolate(band, (end - first, side), mode="bilinear", antialias=True)
        narrow[first:end] = band[0].permute(1, 2, 0).numpy()
    return resize([narrow])[0]


def is_single_image(images: Images) -> bool:
    """True for one image, False for a sequence or a batch of images, however many."""
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim < 4
    return isinstance(images, str | Path | bytes | bytearray | memoryview | Image.Image)


def each_image(images: Images) -> Iterator[ImageLike]:
    """The images one by one. A single image is a sequence of one.

    Raises:
        RunError: the value is neither an image nor a sequence of images.
    """
    if is_single_image(images):
        return iter([cast(ImageLike, images)])
    # An open file is an iterable of its lines, a dictionary one of its keys.
    if hasattr(images, "read") or isinstance(images, Mapping) or not isinstance(images, Iterable):
        kind = "an open file" if hasattr(images, "read") else shown(images)
        hint = "; read it" if hasattr(images, "read") else ""
        raise RunError(f"images: wanted an image or a sequence of images, got {kind}{hint}")
    return iter(cast(Iterable[ImageLike], images))


def load_batches(images: Iterable[ImageLike], side: int, batch_size: int) -> Iterator[Tensor]:
    """Batches uint8 (B, 3, S, S) of images. A thread loads the next batch while the caller works on one."""
    numbered = enumerate(images)

    def load(number: int, image: ImageLike) -> Tensor:
        return load_image(image, side, None if isinstance(image, str | Path) else f"image {number}")

    def batches() -> Iterator[Tensor]:
        while batch := list(itertools.islice(numbered, batch_size)):
            yield torch.stack([load(number, image) for number, image in batch])

    return one_ahead(batches())


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items unchanged. A thread makes the next one while the caller works on one."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="mvlm-ahead") as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield cast(T, item)


def decode_image(image: str | Path | bytes | Image.Image, name: str | None = None) -> NDArray[np.uint8]:
    """Pixels uint8 (H, W, 3) of a path, an encoded file or a PIL image. RunError as for `load_image`."""
    with _refusals(image, name):
        return _decoded(image, name, LIMITS).pixels()


def rgb_image(
    image: str | Path | bytes | Image.Image, name: str | None = None, limits: ImageLimits = LIMITS
) -> Image.Image:
    """Decode an image file, its path or its bytes, or convert a PIL image: a PIL image in RGB. RunError if it cannot.

    It is turned as its EXIF data say, and transparent areas are white. It takes less memory than `decode_image`, and
    `load_image` takes it without a copy.
    """
    with _refusals(image, name):
        return _decoded(image, name, limits).image()


def _decoded(image: object, name: str | None, limits: ImageLimits, further: int = 0) -> RgbRows:
    if isinstance(image, bytearray | memoryview):
        image = bytes(image)
    if not isinstance(image, str | Path | bytes | Image.Image):
        raise RunError(
            f"{name or 'image'}: wanted a path, bytes, a PIL image, an array or a tensor, got {shown(image)}; "
            f"convert it"
        )
    return decode(image, limits, further=further, may_shrink=True)


def _size_of(pixels: NDArray[Any] | Tensor) -> tuple[int, int]:
    """Height and width of an array or a tensor; zeros where it has none."""
    sides = tuple(pixels.shape[-2:] if isinstance(pixels, Tensor) else pixels.shape[:2])
    return sides if len(sides) == 2 else (0, 0)


def _check_dense(pixels: Tensor, name: str) -> None:
    """Raise RunError for a tensor whose numbers cannot be had: sparse, nested, quantized, or without a memory."""
    kinds = {"sparse": pixels.layout != torch.strided, "nested": pixels.is_nested, "quantized": pixels.is_quantized,
             "meta": pixels.is_meta}  # fmt: skip
    if found := next((kind for kind, is_one in kinds.items() if is_one), None):
        raise RunError(f"{name}: wanted a dense tensor with values, got a {found} one; convert it")


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
