"""DALI's decoder for images in memory: the verdicts of builds and tools, and of the loader where its pipeline fails."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.errors import need

from .decode import check_image
from .limits import MAX_PIXELS, TOO_MANY_PIXELS, UNDECODABLE, ImageRefusedError, limits_of_build

_BATCH = 32
_BATCH_PIXELS = 1 << 24  # per decoded batch: some 50 MB


class ImageDecoder:
    """DALI's CPU decoder for images in memory. The loader uses the same decoder, so both accept the same images.

    DALI may read a header differently from ours. Therefore DALI reads the size too, and an image of more than
    `max_pixels` is not decoded.

    Args:
        max_pixels: largest image that is decoded, by default the largest that a build can store; None: any.
    """

    def __init__(self, max_pixels: int | None = MAX_PIXELS) -> None:
        self._limits = None if max_pixels is None else limits_of_build(max_pixels)
        self._max_pixels = sys.maxsize if max_pixels is None else max_pixels
        self._built: dict[bool, Any] = {}

    def __call__(self, images: Sequence[bytes]) -> Iterator[NDArray[np.uint8] | str]:
        """Pixels of each image in order, RGB uint8 (H, W, 3), or the reason as text if the image cannot be used."""
        refused = [self._refused(image) for image in images]
        usable = [image for image, reason in zip(images, refused, strict=True) if reason is None]
        decoded = self._decoded(usable)
        yield from (next(decoded) if reason is None else reason for reason in refused)

    def unreadable(self, images: Sequence[bytes]) -> list[int]:
        """Numbers of the images whose header DALI does not read. None is decoded, so each takes microseconds."""
        return [i for i, shape in enumerate(self._attempt(images, decode=False)) if shape is None]

    def _refused(self, image: bytes) -> str | None:
        """The reason for which an image is not given to DALI, or None.

        An image of a format that our header reader does not know is given to it, as DALI may know the format.
        """
        if self._limits is None:
            return None
        try:
            check_image(image, self._limits)
        except ImageRefusedError as refused:
            return None if refused.kind in ("empty", "format") else refused.reason
        return None

    def _decoded(self, images: Sequence[bytes]) -> Iterator[NDArray[np.uint8] | str]:
        shapes = self._attempt(images, decode=False)
        begin = 0
        while begin < len(images):
            group, pixels = [], 0
            for shape in shapes[begin : begin + _BATCH]:
                area = 0 if shape is None else int(shape[0]) * int(shape[1])
                usable = shape is not None and area <= self._max_pixels
                if group and usable and pixels + area > _BATCH_PIXELS:
                    break
                pixels += area if usable else 0
                group.append(usable)
            rows = range(begin, begin + len(group))
            decoded = iter(self._attempt([images[i] for i, usable in zip(rows, group, strict=True) if usable], True))
            for i, usable in zip(rows, group, strict=True):
                result = next(decoded) if usable else None
                if result is not None:
                    yield result
                else:
                    yield UNDECODABLE if usable or shapes[i] is None else TOO_MANY_PIXELS
            begin += len(group)

    def _attempt(self, images: Sequence[bytes], decode: bool) -> list[NDArray[Any] | None]:
        """Run the DALI pipeline on images: its output for each, None where it fails.

        Failed batches are halved until the failing image is alone, because DALI does not say which one failed.

        decode: True to decode the images, False to read their sizes.
        """
        if not images:
            return []
        if len(images) > _BATCH:
            half = _BATCH
        else:
            try:
                return self._run(images, decode)
            except RuntimeError:
                self._built.pop(decode, None)  # a failed pipeline cannot be used again
            if len(images) == 1:
                return [None]
            half = len(images) // 2
        return self._attempt(images[:half], decode) + self._attempt(images[half:], decode)

    def _run(self, images: Sequence[bytes], decode: bool) -> list[NDArray[Any] | None]:
        if not all(images):
            raise RuntimeError("an empty image")
        if decode not in self._built:
            self._built[decode] = _pipeline(decode)
        pipeline = self._built[decode]
        pipeline.feed_input("encoded", [np.frombuffer(image, np.uint8) for image in images])
        (found,) = pipeline.run()
        return [np.array(found.at(i)) for i in range(len(images))]


def _pipeline(decode: bool) -> Any:
    fn, types = need("nvidia.dali.fn"), need("nvidia.dali.types")
    pipeline = need("nvidia.dali.pipeline").Pipeline(
        batch_size=_BATCH,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        exec_async=False,
        exec_pipelined=False,
        seed=0,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", batch=True, dtype=types.DALIDataType.UINT8, ndim=1)
        shape = fn.peek_image_shape(encoded)
        if decode:
            # As in the loader: read the header, then decode a crop. Here the crop is the whole image.
            size = fn.cast(fn.slice(shape, 0, 2, axes=[0]), dtype=types.DALIDataType.INT32)
            output = fn.decoders.image_slice(
                encoded, start=size * 0, shape=size, axes=[0, 1], device="cpu", output_type=types.DALIImageType.RGB
            )
        else:
            output = shape
        pipeline.set_outputs(output)
    pipeline.build()
    return pipeline
