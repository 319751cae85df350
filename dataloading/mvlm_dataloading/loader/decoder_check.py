"""Check of the GPU image decoder in a subprocess, before training depends on it.

On some GPUs, one release of nvImageCodec kills the process when it decodes a crop, and others return black images
without an error. The check decodes generated images and compares the pixels with the CPU decoder's.
"""

import functools
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mvlm_dataloading.build.shard_writer import ShardWriter
from mvlm_dataloading.dataset.open import open_dataset
from mvlm_dataloading.errors import need
from mvlm_dataloading.randomness import Purpose, uniforms

from .pipeline import Decoding, build_pipeline
from .pixels import CropGeometry

log = logging.getLogger(__name__)

# Mean difference of an image, in levels of 255. Correct decoders and resizers differ by one or two, a black image or
# another image's pixels by dozens.
_TOLERANCE = 6.0
_TIMEOUT_S = 300
_CODE = "import sys; from mvlm_dataloading.loader.decoder_check import main; main(*sys.argv[1:])"


@functools.cache
def choose_decoding(device_id: int) -> Decoding:
    """The first `Decoding` that works on a CUDA device, of GPU_CROP, GPU_FULL_IMAGE and CPU. Logs the choice."""
    for decoding in (Decoding.GPU_CROP, Decoding.GPU_FULL_IMAGE):
        fault = find_fault(decoding, device_id)
        if fault is None:
            log.info("CUDA device %d decodes images by `%s`", device_id, decoding)
            return decoding
        log.warning("CUDA device %d cannot decode images by `%s`: %s", device_id, decoding, fault)
    log.warning("images are decoded on the CPU and copied to CUDA device %d", device_id)
    return Decoding.CPU


def find_fault(decoding: Decoding, device_id: int | Literal["cpu"]) -> str | None:
    """Decode test images in a subprocess in one way, on a CUDA device or the CPU.

    Returns its fault, or None if it works.
    """
    command = [sys.executable, "-c", _CODE, str(device_id), decoding.value]
    # The trial imports this package, from wherever this process has it.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    except subprocess.TimeoutExpired:
        return f"the trial did not end within {_TIMEOUT_S} s"
    if done.returncode < 0:
        return f"the trial was killed by signal {-done.returncode}"
    if done.returncode > 0:
        return f"the trial failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
    try:
        worst = float(json.loads(done.stdout.strip().splitlines()[-1])["worst_difference"])
    except (IndexError, KeyError, TypeError, ValueError):
        return f"the trial gave no result: {done.stdout!r}"
    if worst <= _TOLERANCE:  # NaN is a fault too
        return None
    return f"pixels differ from the CPU's by {worst:.1f} of 255 on average in one image"


def main(device_id: str, decoding: str) -> None:
    """Entry point of the subprocess, which decodes test images on a device and on the CPU.

    Prints as JSON the mean absolute difference of the pixels, 0 to 255, of the image that differs most.
    """
    with tempfile.TemporaryDirectory(prefix="mvlm-decoder-check-") as folder:
        data = _write_images(Path(folder) / "data")
        wanted = _decode(data, Decoding.CPU, None)
        found = _decode(data, Decoding(decoding), None if device_id == "cpu" else int(device_id))
    differences = np.abs(wanted.astype(np.float64) - found).mean(axis=(1, 2, 3))
    print(json.dumps({"worst_difference": float(differences.max())}))


def _write_images(folder: Path) -> Path:
    """Write smooth colour images of many sizes, JPEG and PNG. All differ, so that swapped images are noticed."""
    pil = need("PIL.Image")
    with ShardWriter(folder, name="decoder-check", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(32):
            height, width = 64 + 29 * i, 1000 - 23 * i
            y, x = np.mgrid[0:height, 0:width]
            waves = [127.5 + 120 * np.sin(x / (20 + 7 * i) + y / (30 + 5 * c) + i + 2 * c) for c in range(3)]
            file, kind = io.BytesIO(), "PNG" if i % 4 == 3 else "JPEG"
            pil.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(file, kind, quality=90)
            writer.add(f"{i:03d}", file.getvalue(), ["waves"])
    return folder


def _decode(folder: Path, decoding: Decoding, device_id: int | None) -> np.ndarray:
    """Decode a random crop of every image: uint8 (n, 3, 224, 224)."""
    dataset = open_dataset(folder, "train")
    ids = np.arange(len(dataset))
    draws = uniforms(Purpose.CROP, 0, 0, ids, 4)
    batch_size = 8
    pipeline = build_pipeline(
        dataset,
        ids,
        lambda batch: draws[(int(batch) * batch_size + np.arange(batch_size)) % len(ids)],
        CropGeometry(image_size=224),
        batch_size=batch_size,
        num_threads=2,
        device_id=device_id,
        decoding=decoding,
    )
    batches = []
    for _ in range(len(ids) // batch_size):
        images = pipeline.run()[0]
        batches.append(np.array((images.as_cpu() if device_id is not None else images).as_tensor()))
    return np.concatenate(batches)


def choose_device(device: str | None) -> tuple[int | None, Decoding]:
    """Number of the CUDA device, None for the CPU; and the way of decoding images that works there."""
    if device is None or torch.device(device).type != "cuda":
        return None, Decoding.CPU
    index = torch.device(device).index
    device_id = torch.cuda.current_device() if index is None else index
    return device_id, choose_decoding(device_id)
