"""The DALI graph: read, cut a window, decode, resize. One graph for the CPU and the GPU.

Shape legend: B batch, S image side, H and W of the picture as stored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dataset import IMAGE_EXTENSIONS
from .errors import need


class Decoding(StrEnum):
    """Where a picture is decoded."""

    CPU = "cpu"
    """On the CPU, only the window; the rest follows on the loader's device."""
    GPU_WINDOW = "gpu-window"
    """On the GPU, only the window."""
    GPU_WHOLE = "gpu-whole"
    """On the GPU, the whole picture, and the window is cut afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What becomes of a picture: a random window, or the whole (`random=False`), resized to a square."""

    image_size: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """The window's share of the picture's area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """The window's width over its height."""
    random: bool = True

    def __post_init__(self) -> None:
        for name, (low, high), limit in (("crop_scale", self.crop_scale, 1.0), ("crop_ratio", self.crop_ratio, np.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"wanted {name} as 0 < low <= high <= {limit}, got ({low}, {high})")


def build_pipeline(
    tars: Sequence[str],
    indices: Sequence[str],
    draws: Callable[[int], NDArray[np.float64]],
    geometry: Geometry,
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None = None,
    decoding: Decoding = Decoding.CPU,
    prefetch: int = 2,
) -> Any:
    """A built `nvidia.dali.Pipeline` over the samples that the index views name, in their order, again and again.

    Args:
        draws: gives for the k-th batch the uniform numbers of its windows, float64 (B, 4).
        device_id: a CUDA device, or None for the CPU.

    Each `run()` returns images uint8 (B, 3, S, S), and ragged uint8 vectors on the CPU: the encoded image, `.txt`,
    `.json` (empty if there is none). It raises RuntimeError if one of the batch's pictures cannot be decoded.
    """
    fn, types = need("nvidia.dali.fn"), need("nvidia.dali.types")
    pipeline = need("nvidia.dali.pipeline").Pipeline(
        batch_size=batch_size, num_threads=num_threads, device_id=device_id, prefetch_queue_depth=prefetch, seed=0
    )
    on_gpu = device_id is not None
    with pipeline:
        encoded, text, metadata = fn.readers.webdataset(
            paths=list(tars),
            index_paths=list(indices),
            ext=[";".join(IMAGE_EXTENSIONS), "txt", "json"],
            missing_component_behavior="empty",
            case_sensitive_extensions=False,
        )
        # The decoder gets a window also where that is the whole picture: so the header is read first and a file that is
        # no picture fails there. Given to the decoder of DALI 2.4 straight away, it was seen to kill the process.
        window = _window(fn.peek_image_shape(encoded), draws, geometry)
        decoder = {"device": "cpu" if decoding is Decoding.CPU else "mixed", "output_type": types.DALIImageType.RGB}
        if decoding is Decoding.GPU_WHOLE:
            image = fn.slice(fn.decoders.image(encoded, **decoder), start=window[0], shape=window[1], axes=[0, 1])
        else:
            image = fn.decoders.image_slice(encoded, start=window[0], shape=window[1], axes=[0, 1], **decoder)
        if on_gpu and decoding is Decoding.CPU:
            image = image.gpu()
        side = geometry.image_size
        image = fn.resize(image, size=[side, side], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
        pipeline.set_outputs(fn.transpose(image, perm=[2, 0, 1]), encoded, text, metadata, *window)
    pipeline.build()
    return pipeline


def _window(shape: Any, draws: Callable[[int], NDArray[np.float64]], geometry: Geometry) -> tuple[Any, Any]:
    """Corner (y, x) and size (h, w), int32 (2,) each, of the window to cut from a picture of shape (H, W, 3).

    From four uniform numbers u: area = H W (a0 + (a1 - a0) u0), ratio = r0 (r1 / r0)^u1; w = round(sqrt(area ratio))
    and h = round(sqrt(area / ratio)), each clamped to the picture; y = floor(u2 (H - h + 1)), x = floor(u3 (W - w +
    1)).
    """
    fn, types, math = need("nvidia.dali.fn"), need("nvidia.dali.types"), need("nvidia.dali.math")
    whole = fn.cast(fn.slice(shape, 0, 2, axes=[0]), dtype=types.DALIDataType.FLOAT64)  # (H, W)
    if not geometry.random:
        corner = fn.cast(whole * 0, dtype=types.DALIDataType.INT32)
        return corner, fn.cast(whole, dtype=types.DALIDataType.INT32)
    height, width = whole[0], whole[1]
    u = fn.external_source(source=draws, batch=True, dtype=types.DALIDataType.FLOAT64, ndim=1)
    (low, high), (narrow, wide) = geometry.crop_scale, geometry.crop_ratio
    area = height * width * (low + (high - low) * u[0])
    ratio = narrow * math.exp(float(np.log(wide / narrow)) * u[1])
    h = math.clamp(math.floor(math.sqrt(area / ratio) + 0.5), 1.0, height)
    w = math.clamp(math.floor(math.sqrt(area * ratio) + 0.5), 1.0, width)
    y = math.clamp(math.floor(u[2] * (height - h + 1.0)), 0.0, height - h)
    x = math.clamp(math.floor(u[3] * (width - w + 1.0)), 0.0, width - w)
    return (
        fn.cast(fn.stack(y, x), dtype=types.DALIDataType.INT32),
        fn.cast(fn.stack(h, w), dtype=types.DALIDataType.INT32),
    )
