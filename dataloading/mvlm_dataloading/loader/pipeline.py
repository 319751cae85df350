"""The DALI graph: read, cut a window, decode, resize, augment. One graph for the CPU and the GPU.

Shape legend: B batch, S image side, H and W of the picture as stored.
"""

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS
from mvlm_dataloading.errors import need

from .augment import Drawn, apply
from .crop import Geometry, Windows, looks_whole
from .resize import Resize

# A black picture of one pixel, as PNG.
_BLACK = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c636000000002000148"
    "afa4710000000049454e44ae426082"
)


class Decoding(StrEnum):
    """Where a picture is decoded."""

    CPU = "cpu"
    """On the CPU, only the window; the rest follows on the loader's device."""
    GPU_WINDOW = "gpu-window"
    """On the GPU, only the window."""
    GPU_WHOLE = "gpu-whole"
    """On the GPU, the whole picture, and the window is cut afterwards."""


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
    drawn: Callable[[int], list[NDArray]] | None = None,
    tokens: bool = False,
    guard: bool = False,
) -> Any:
    """A built `nvidia.dali.Pipeline` over the samples that the index views name, in their order, again and again.

    Args:
        draws: gives for the k-th batch the uniform numbers of its windows, float64 (B, 4).
        device_id: a CUDA device, or None for the CPU.
        drawn: gives for the k-th batch the parts of `augment.Drawn`; None leaves the augmentations out of the graph.
        prefetch: batches made ahead on a GPU.
        tokens: read the component `tok`.
        guard: give the decoder a black picture in place of one whose ends look wrong, and say so in `fine`.

    Each `run()` returns images uint8 (B, 3, S, S), and on the CPU ragged vectors, empty where a sample has no such
    component: the encoded image, `.txt`, `.json` (uint8), `.tok` (int32); then fine (B,), bool, False where the guard
    stepped in; then the window's corners and sizes, int32 (B, 2) each. On a CPU they hold until the next `run()`. It
    raises RuntimeError if one of the batch's pictures cannot be decoded.
    """
    need("nvidia.dali.fn")
    dali = need("nvidia.dali")
    define = need("nvidia.dali.pipeline").pipeline_def(enable_conditionals=guard or drawn is not None)
    pipeline = define(_graph)(
        dali=dali,
        reader={"paths": list(tars), "index_paths": list(indices)},
        draws=draws,
        geometry=geometry,
        device={"on_gpu": device_id is not None, "decoding": decoding, "num_threads": num_threads},
        drawn=drawn,
        tokens=tokens,
        guard=guard,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        seed=0,
        **executor(device_id, prefetch),
    )
    pipeline.build()
    return pipeline


def executor(device_id: int | None, prefetch: int) -> dict[str, Any]:
    """How a `nvidia.dali.Pipeline` is to run: its arguments.

    On a CPU in DALI's older executor, which keeps its buffers from batch to batch. The newer asks for 70 MB and gives
    them back with each, of which glibc makes pieces that fit badly. It works when it is asked: the loader runs ahead.
    """
    if device_id is not None:
        return {"prefetch_queue_depth": prefetch}
    # So that it keeps those too of which a batch needs less than half: a stage has a picture more or fewer each time.
    need("nvidia.dali.backend").SetHostBufferShrinkThreshold(0.0)  # of the process, whichever pipelines it has
    return dict.fromkeys(("exec_dynamic", "exec_async", "exec_pipelined"), False) | {"prefetch_queue_depth": 1}


def _graph(
    dali: Any, reader: Any, draws: Any, geometry: Any, device: Any, drawn: Any, tokens: bool, guard: bool
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
    fine, picture = types.Constant(True), encoded
    if guard:
        fine = call(encoded, function=as_is(looks_whole))
        if fine:  # noqa: SIM108 (DALI understands the statement, not the expression)
            picture = encoded
        else:
            picture = types.Constant(np.frombuffer(_BLACK, np.uint8))
    # The decoder gets a window also where that is the whole picture: so the header is read first and a file that is
    # no picture fails there. Given to the decoder of DALI 2.4 straight away, it was seen to kill the process.
    corner, size = call(fn.peek_image_shape(picture), function=as_is(Windows(geometry, draws)), num_outputs=2)
    decoder = {"device": "cpu" if decoding is Decoding.CPU else "mixed", "output_type": types.DALIImageType.RGB}
    if decoding is Decoding.GPU_WHOLE:
        image = fn.slice(fn.decoders.image(picture, **decoder), start=corner, shape=size, axes=[0, 1])
    else:
        image = fn.decoders.image_slice(picture, start=corner, shape=size, axes=[0, 1], **decoder)
    if on_gpu and decoding is Decoding.CPU:
        image = image.gpu()
    side = geometry.image_size
    if on_gpu:
        image = fn.resize(image, size=[side, side], interp_type=types.DALIInterpType.INTERP_LINEAR, antialias=True)
    else:
        resize = Resize(side, device["num_threads"], planes=drawn is None)
        image = call(image, function=resize, output_layouts=resize.layout)
    if drawn is None and on_gpu:
        image = fn.transpose(image, perm=[2, 0, 1])
    if drawn is not None:
        *parts, mirror = fn.external_source(source=drawn, batch=True, num_outputs=len(Drawn._fields))
        image = apply(dali, image, [*parts, mirror])
        image = fn.crop_mirror_normalize(image, mirror=mirror, dtype=kinds.UINT8, output_layout="CHW")
    return image, encoded, text, metadata, ids, fine, corner, size
