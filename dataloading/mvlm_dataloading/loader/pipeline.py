"""The DALI graph: read, crop, decode, resize, augment. One graph serves CPU and GPU.

Shape legend: B batch, S image side, H and W of the image as stored.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS, KINDS, Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import need

from .augment import AugmentParameters, apply_augmentations
from .pixels import CropGeometry, CropWindows, FileEnds, Resize

# Bytes that views of a segment take, many times over: a page for each of its thousand runs, and 150 for each sample.
_ROOM_FOR_VIEWS = 64 << 20

# A black PNG of one pixel.
BLACK = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148"
    "afa4710000000049454e44ae426082"
)


class Decoding(StrEnum):
    """Device that decodes images, and how much of them. The values are hashed into the loader's state."""

    CPU = "cpu"
    """The CPU decodes only the crop. Later stages run on the loader's device."""
    GPU_CROP = "gpu-window"
    """The GPU decodes only the crop."""
    GPU_FULL_IMAGE = "gpu-whole"
    """The GPU decodes the whole image, which is then cropped."""


@contextmanager
def index_views(dataset: Dataset, ids: Int64) -> Iterator[tuple[list[str], list[str]]]:
    """Paths of tars and of their indices, with which DALI's reader delivers the samples `ids` in this order.

    The reader accepts index lines in any order and repeated, and the same tar several times. The indices are there
    inside the `with` block. They lie in memory if it has room: a segment has hundreds, which DALI reads once, and on a
    disk each costs up to a millisecond, while the loader waits.
    """
    memory = Path("/dev/shm")
    try:
        room = shutil.disk_usage(memory).free if os.access(memory, os.W_OK | os.X_OK) else 0
    except OSError:  # there is no such folder
        room = 0
    shard = dataset.shard_of(ids)
    # The reader chooses components by extension and decodes by content, so any extension of the right kind will do.
    parts = [(KINDS[kind][0], *(values.tolist() for values in dataset.locate(kind, ids))) for kind in KINDS]
    cuts = np.flatnonzero(np.diff(shard)) + 1
    tars, indices = [], []
    place = str(memory) if room >= _ROOM_FOR_VIEWS else None
    with tempfile.TemporaryDirectory(prefix="mvlm-index-", dir=place) as folder:
        for begin, end in pairwise([0, *cuts.tolist(), len(ids)]):
            lines = [
                " ".join(f"{name} {offset[k]} {size[k]} {k}.{name}" for name, offset, size in parts if size[k] >= 0)
                for k in range(begin, end)
            ]
            path = Path(folder, f"{begin}.idx")
            path.write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
            tars.append(str(dataset.tars[shard[begin]]))
            indices.append(str(path))
        yield tars, indices


def build_pipeline(
    dataset: Dataset,
    ids: Int64,
    crop_uniforms: Callable[[int], NDArray[np.float64]],
    geometry: CropGeometry | None,
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None = None,
    decoding: Decoding = Decoding.CPU,
    prefetch: int = 2,
    augment: Callable[[int], list[NDArray]] | None = None,
    tokens: bool = False,
    file_ends: FileEnds | None = None,
    images_into: Callable[[int], NDArray[np.uint8]] | None = None,
    encoded: Callable[[int], list[NDArray[np.uint8]]] | None = None,
) -> Any:
    """Build an `nvidia.dali.Pipeline` that cycles through the samples `ids` of a data set, in their order.

    Each `run()` returns, in this order:

    - images, uint8 (B, 3, S, S), on the pipeline's device; everything else is on the CPU;
    - the encoded image, and unless `encoded` is given `.txt` and `.json`, ragged uint8, and `.tok`, ragged int32. A
      component that a sample lacks is empty;
    - valid, bool (B,): False where the image was replaced because of `file_ends`;
    - corners (y, x) and sizes (h, w) of the crops, int32 (B, 2) each; with `geometry.strip` = n above 1, of the boxes
      around the n crops, and then the sizes of the stored strips. Images are (B, 3, S, n S) then.

    CPU outputs are valid until the next `run()`. It raises RuntimeError if an image of the batch cannot be decoded.

    Args:
        crop_uniforms: batch number k -> uniform numbers, float64 (B, 4), from which the crops are computed.
        geometry: None decodes whole images and returns them as they are: uint8 (H, W, 3), of several sizes, on a CPU.
        device_id: a CUDA device, or None for the CPU.
        prefetch: batches that DALI prepares in advance on a GPU.
        augment: batch number k -> fields of `AugmentParameters`. None builds a graph without augmentations.
        tokens: read the component `tok`.
        file_ends: replace an image file that does not pass by a black image, and clear its `valid`. None: all pass.
        images_into: number of images -> array (B, 3, S, S) that they are written to, in place of the first output. On a
            CPU, without `augment` and strips.
        encoded: batch number k -> encoded images, which are read in place of the tars of `dataset`.
    """
    with nullcontext(([], [])) if encoded is not None else index_views(dataset, ids) as (tars, indices):
        return _built(
            _graph,
            enable_conditionals=file_ends is not None or augment is not None,
            batch_size=batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch=prefetch,
            reader={"paths": tars, "index_paths": indices, "encoded": encoded},
            crop_uniforms=crop_uniforms,
            geometry=geometry,
            device={"on_gpu": device_id is not None, "decoding": decoding, "num_threads": num_threads},
            augment=augment,
            tokens=tokens,
            file_ends=file_ends,
            images_into=images_into,
        )


def build_augment_pipeline(
    images: Callable[[int], list[NDArray[np.uint8]]],
    augment: Callable[[int], list[NDArray]],
    *,
    batch_size: int,
    num_threads: int,
) -> Any:
    """Build the last stages of `build_pipeline`'s graph on a CPU, for images that are already resized.

    Each `run()` returns images, uint8 (B, 3, S, S), valid until the next one.

    Args:
        images: batch number k -> B images, uint8 (S, S, 3).
        augment: batch number k -> fields of `AugmentParameters`.
    """
    return _built(
        _augment_graph,
        enable_conditionals=True,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=None,
        prefetch=1,
        images=images,
        augment=augment,
    )


def _built(
    graph: Any,
    *,
    enable_conditionals: bool,
    batch_size: int,
    num_threads: int,
    device_id: int | None,
    prefetch: int,
    **inputs: Any,
) -> Any:
    need("nvidia.dali.fn")
    define = need("nvidia.dali.pipeline").pipeline_def(enable_conditionals=enable_conditionals)
    executor = {"batch_size": batch_size, "num_threads": num_threads, "device_id": device_id, "seed": 0}
    pipeline = define(graph)(dali=need("nvidia.dali"), **inputs, **executor, **executor_arguments(device_id, prefetch))
    pipeline.build()
    return pipeline


def executor_arguments(device_id: int | None, prefetch: int) -> dict[str, Any]:
    """Arguments of `nvidia.dali.Pipeline` that choose its executor.

    A CPU graph runs in DALI's older executor, which reuses its buffers. The newer one allocates and frees 70 MB per
    batch, which fragments glibc's heap. The older one does not prefetch, so the loader's thread does.
    """
    if device_id is not None:
        return {"prefetch_queue_depth": prefetch}
    # Never shrink a buffer: the number of images in a stage varies from batch to batch. The setting applies to all
    # pipelines of the process.
    need("nvidia.dali.backend").SetHostBufferShrinkThreshold(0.0)
    return dict.fromkeys(("exec_dynamic", "exec_async", "exec_pipelined"), False) | {"prefetch_queue_depth": 1}


def _graph(
    dali: Any,
    reader: Any,
    crop_uniforms: Any,
    geometry: CropGeometry | None,
    device: Any,
    augment: Any,
    tokens: bool,
    file_ends: FileEnds | None,
    images_into: Any,
) -> Any:
    fn, types, as_is = dali.fn, dali.types, dali.pipeline.do_not_convert
    call = partial(fn.python_function, batch_processing=True)
    kinds, decoding, on_gpu = types.DALIDataType, device["decoding"], device["on_gpu"]
    if reader["encoded"] is not None:
        encoded, others = fn.external_source(source=reader["encoded"], batch=True, dtype=kinds.UINT8, ndim=1), []
    else:
        encoded, *others = fn.readers.webdataset(
            paths=reader["paths"],
            index_paths=reader["index_paths"],
            ext=[";".join(IMAGE_EXTENSIONS), "txt", "json", "tok" if tokens else "json"],
            dtypes=[kinds.UINT8, kinds.UINT8, kinds.UINT8, kinds.INT32 if tokens else kinds.UINT8],
            missing_component_behavior="empty",
            case_sensitive_extensions=False,
        )
    valid, file = types.Constant(True), encoded
    if file_ends is not None:
        valid = call(encoded, function=as_is(file_ends))
        if valid:  # noqa: SIM108 (DALI converts the statement, not the expression)
            file = encoded
        else:
            file = types.Constant(np.frombuffer(BLACK, np.uint8))
    # An uncropped image is decoded as a crop too: reading the header for its size fails on a file that is no image.
    # Given such a file directly, DALI 2.4's decoder has killed the process.
    strip = 1 if geometry is None else geometry.strip
    windows = CropWindows(geometry or CropGeometry(image_size=1, random=False), crop_uniforms)
    corner, size, *of_strip = call(
        fn.peek_image_shape(file), function=as_is(windows), num_outputs=5 if strip > 1 else 2
    )
    decoder = {"device": "cpu" if decoding is Decoding.CPU else "mixed", "output_type": types.DALIImageType.RGB}
    if decoding is Decoding.GPU_FULL_IMAGE:
        image = fn.slice(fn.decoders.image(file, **decoder), start=corner, shape=size, axes=[0, 1])
    else:
        image = fn.decoders.image_slice(file, start=corner, shape=size, axes=[0, 1], **decoder)
    if on_gpu and decoding is Decoding.CPU:
        image = image.gpu()
    if geometry is not None:
        threads, planes = device["num_threads"], augment is None
        resize = partial(_resized, dali, call, geometry.image_size, threads, on_gpu, planes, images_into)
        if strip > 1:
            tile, step, whole = of_strip
            tiles = [resize(fn.slice(image, start=step * k, shape=tile, axes=[0, 1])) for k in range(strip)]
            image, of_strip = fn.cat(*tiles, axis=2), [whole]  # along the width of (3, S, S)
        else:
            image = resize(image)
    if augment is not None:
        image = _augmented(dali, image, augment)
    return image, encoded, *others, valid, corner, size, *of_strip


def _resized(dali: Any, call: Any, side: int, threads: int, on_gpu: bool, planes: bool, into: Any, image: Any) -> Any:
    """Resize a crop to a square of S pixels, in a DALI graph: uint8 (3, S, S) if `planes`, else (S, S, 3)."""
    fn, types = dali.fn, dali.types
    if not on_gpu:
        resize = Resize(side, threads, planes=planes, into=into)
        return call(image, function=resize, output_layouts=resize.layout)
    image = fn.resize(image, size=[side, side], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
    return fn.transpose(image, perm=[2, 0, 1]) if planes else image


def _augment_graph(dali: Any, images: Any, augment: Any) -> Any:
    return _augmented(dali, dali.fn.external_source(source=images, batch=True, layout="HWC"), augment)


def _augmented(dali: Any, image: Any, augment: Any) -> Any:
    fn = dali.fn
    *parameters, flip = fn.external_source(source=augment, batch=True, num_outputs=len(AugmentParameters._fields))
    image = apply_augmentations(dali, image, [*parameters, flip])
    # The flip and the change of layout to planes share one pass.
    return fn.crop_mirror_normalize(image, mirror=flip, dtype=dali.types.DALIDataType.UINT8, output_layout="CHW")
