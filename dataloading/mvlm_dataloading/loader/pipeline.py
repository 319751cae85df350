"""The DALI graph: read, crop, decode, resize, augment. One graph serves CPU and GPU.

Shape legend: B batch, S image side, H and W of the image as stored.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS
from mvlm_dataloading.errors import need

from .augment import AugmentParameters, apply_augmentations
from .crop import CropGeometry, CropWindows, check_file_ends
from .resize import Resize

# A black PNG of one pixel.
_BLACK = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148"
    "afa4710000000049454e44ae426082"
)


class Decoding(StrEnum):
    """Device that decodes images, and how much of them. The values are hashed into the loader's state."""

    CPU = "cpu"
    """On the CPU, the crop only. What follows runs on the loader's device."""
    GPU_CROP = "gpu-window"
    """On the GPU, the crop only."""
    GPU_FULL_IMAGE = "gpu-whole"
    """On the GPU, the whole image, which is then cropped."""


def build_pipeline(
    tars: Sequence[str],
    indices: Sequence[str],
    crops: Callable[[int], NDArray[np.float64]],
    geometry: CropGeometry,
    *,
    batch_size: int,
    num_threads: int,
    device_id: int | None = None,
    decoding: Decoding = Decoding.CPU,
    prefetch: int = 2,
    augment: Callable[[int], list[NDArray]] | None = None,
    tokens: bool = False,
    guard: bool = False,
) -> Any:
    """Build an `nvidia.dali.Pipeline` that cycles through the samples of the index views, in their order.

    Each `run()` returns images uint8 (B, 3, S, S), and on the CPU: ragged vectors of the encoded image, `.txt`, `.json`
    (uint8) and `.tok` (int32), empty where a sample has no such component; valid (B,), bool, False where the guard
    stepped in; the crops' corners and sizes, int32 (B, 2) each. On a CPU the outputs hold until the next `run()`.
    `run()` raises RuntimeError if an image of the batch cannot be decoded.

    Args:
        crops: uniform numbers of the k-th batch's crops, float64 (B, 4).
        device_id: a CUDA device, or None for the CPU.
        prefetch: batches that DALI makes ahead on a GPU.
        augment: fields of `AugmentParameters` for the k-th batch; None builds a graph without augmentations.
        tokens: read the component `tok`.
        guard: replace a file whose ends look wrong by a black image, and clear its `valid`.
    """
    need("nvidia.dali.fn")
    dali = need("nvidia.dali")
    define = need("nvidia.dali.pipeline").pipeline_def(enable_conditionals=guard or augment is not None)
    pipeline = define(_graph)(
        dali=dali,
        reader={"paths": list(tars), "index_paths": list(indices)},
        crops=crops,
        geometry=geometry,
        device={"on_gpu": device_id is not None, "decoding": decoding, "num_threads": num_threads},
        augment=augment,
        tokens=tokens,
        guard=guard,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        seed=0,
        **executor_arguments(device_id, prefetch),
    )
    pipeline.build()
    return pipeline


def executor_arguments(device_id: int | None, prefetch: int) -> dict[str, Any]:
    """Arguments of `nvidia.dali.Pipeline` that choose its executor.

    A CPU graph runs in DALI's older executor, which keeps its buffers from batch to batch. The newer one requests 70 MB
    for each batch and returns them, which fragments glibc's heap. The older one runs only when called; the loader's
    thread does the prefetching instead.
    """
    if device_id is not None:
        return {"prefetch_queue_depth": prefetch}
    # Keep buffers even when a batch needs less than half of them: the number of images in a stage varies. The setting
    # holds for all pipelines of the process.
    need("nvidia.dali.backend").SetHostBufferShrinkThreshold(0.0)
    return dict.fromkeys(("exec_dynamic", "exec_async", "exec_pipelined"), False) | {"prefetch_queue_depth": 1}


def _graph(
    dali: Any, reader: Any, crops: Any, geometry: Any, device: Any, augment: Any, tokens: bool, guard: bool
) -> Any:
    fn, types, as_is = dali.fn, dali.types, dali.pipeline.do_not_convert
    call = partial(fn.python_function, batch_processing=True)
    kinds, decoding, on_gpu = types.DALIDataType, device["decoding"], device["on_gpu"]
    encoded, text, metadata, ids = fn.readers.webdataset(
        paths=reader["paths"],
        index_paths=reader["index_paths"],
        ext=[";".join(IMAGE_EXTENSIONS), "txt", "json", "tok" if tokens else "json"],
        dtypes=[kinds.UINT8, kinds.UINT8, kinds.UINT8, kinds.INT32 if tokens else kinds.UINT8],
        missing_component_behavior="empty",
        case_sensitive_extensions=False,
    )
    valid, file = types.Constant(True), encoded
    if guard:
        valid = call(encoded, function=as_is(check_file_ends))
        if valid:  # noqa: SIM108 (DALI converts the statement, not the expression)
            file = encoded
        else:
            file = types.Constant(np.frombuffer(_BLACK, np.uint8))
    # Even a whole image is decoded as a crop, because that reads the header first and a file that is no image fails
    # there. DALI 2.4's decoder was seen to kill the process when it got such a file directly.
    corner, size = call(fn.peek_image_shape(file), function=as_is(CropWindows(geometry, crops)), num_outputs=2)
    decoder = {"device": "cpu" if decoding is Decoding.CPU else "mixed", "output_type": types.DALIImageType.RGB}
    if decoding is Decoding.GPU_FULL_IMAGE:
        image = fn.slice(fn.decoders.image(file, **decoder), start=corner, shape=size, axes=[0, 1])
    else:
        image = fn.decoders.image_slice(file, start=corner, shape=size, axes=[0, 1], **decoder)
    if on_gpu and decoding is Decoding.CPU:
        image = image.gpu()
    side = geometry.image_size
    if on_gpu:
        image = fn.resize(image, size=[side, side], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
    else:
        resize = Resize(side, device["num_threads"], planes=augment is None)
        image = call(image, function=resize, output_layouts=resize.layout)
    if augment is None and on_gpu:
        image = fn.transpose(image, perm=[2, 0, 1])
    if augment is not None:
        *parameters, flip = fn.external_source(source=augment, batch=True, num_outputs=len(AugmentParameters._fields))
        image = apply_augmentations(dali, image, [*parameters, flip])
        # The flip and the change of layout to planes share one pass.
        image = fn.crop_mirror_normalize(image, mirror=flip, dtype=kinds.UINT8, output_layout="CHW")
    return image, encoded, text, metadata, ids, valid, corner, size
