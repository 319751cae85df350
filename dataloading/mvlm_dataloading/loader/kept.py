"""Small splits kept in memory: every image is decoded once per process, and no longer once per epoch.

On a CPU, decoding takes cores away from the training step. Cropping the decoded image gives the pixels of the decoded
crop, so a kept split gives the same batches.

Shape legend: B samples of this rank's batch, S image side, H and W of an image as stored.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError

from .buffers import BufferPool
from .crop import CropWindows, FileEnds, strip_fault
from .pipeline import build_augment_pipeline, build_pipeline
from .resize import Resize
from .sampler import index_folder, write_index_views
from .segment import RawBatch, ReaderConfig, check_delivery, draw_random_numbers

log = logging.getLogger(__name__)

_BATCH = 64
CHUNK_SAMPLES = 16384
"""Samples of a pipeline that decodes a split, after the first 64. It bounds the size of index files."""


@dataclass(frozen=True, slots=True)
class KeptSplit:
    """All samples of a split, by sample id."""

    dataset: Dataset
    images: list[NDArray[np.uint8]]
    """(H, W, 3) each, decoded and uncropped; the same array for samples of a stored image that they share."""
    texts: list[bytes]
    metadata: list[bytes]
    tokens: list[bytes]
    """Empty if the stored tokens are not used."""


def keep_split(dataset: Dataset, config: ReaderConfig, max_bytes: int) -> KeptSplit | None:
    """Decode all images of a split.

    None if they take more than `max_bytes`, or if one cannot be decoded or has wrong first or last bytes. At most one
    batch is decoded in vain if its images are as large as the others.
    """
    kept = KeptSplit(dataset, [], [], [], [])
    taken, batch_size, chunk = 0, min(_BATCH, len(dataset)), min(_BATCH, len(dataset))
    while len(kept.images) < len(dataset):
        # The first chunk is a batch, so a large split costs no more than that.
        ids = np.arange(len(kept.images), min(len(kept.images) + chunk, len(dataset)))
        for images in _decoded_batches(kept, ids, config, batch_size):
            taken += sum(image.nbytes for image in images)
            if taken * len(dataset) / len(kept.images) > max_bytes:
                return None
        if len(kept.images) <= ids[-1]:  # an image cannot be decoded; the reader finds it when its turn comes
            return None
        chunk = CHUNK_SAMPLES
    log.debug("%s: keeps %d decoded images, %.0f MB", dataset.folder, len(kept.images), taken / 1e6)
    return kept


def _decoded_batches(
    kept: KeptSplit, ids: Int64, config: ReaderConfig, batch_size: int
) -> Iterator[list[NDArray[np.uint8]]]:
    """Decode the samples `ids` and append them to `kept`. Yields the images that each batch adds.

    Ends at an image that cannot be decoded or has wrong first or last bytes.
    """
    dataset = kept.dataset
    dataset.check_shards(np.unique(dataset.shard_of(ids)).tolist())
    with tempfile.TemporaryDirectory(prefix="mvlm-index-", dir=index_folder()) as folder:
        pipeline = build_pipeline(
            *write_index_views(Path(folder), dataset, ids),
            lambda batch: np.zeros((batch_size, 4)),
            None,
            batch_size=batch_size,
            num_threads=config.num_threads,
            tokens=config.stored_tokens,
            file_ends=FileEnds(),
        )
    try:
        for begin in range(0, len(ids), batch_size):
            own = ids[begin : begin + batch_size]
            decoded, _, texts, metadata, tokens, valid, _, _ = pipeline.run()
            check_delivery(dataset, own, texts)
            if not np.array(valid.as_tensor())[: len(own)].all():
                return
            images = [np.array(decoded.at(row)) for row in range(len(own))]
            if (strip := config.geometry.strip) > 1:
                for i, image in zip(own.tolist(), images, strict=True):
                    if fault := strip_fault(image.shape[0], image.shape[1], strip):
                        raise DataError(f"{dataset.where(i)}: {fault}")
            firsts = own if config.images is None else config.images[own]
            new = firsts == own  # an image that several samples share is kept once
            for i, image in zip(firsts.tolist(), images, strict=True):
                kept.images.append(image if i == len(kept.images) else kept.images[i])
            kept.texts.extend(texts.at(row).tobytes() for row in range(len(own)))
            kept.metadata.extend(metadata.at(row).tobytes() for row in range(len(own)))
            if config.stored_tokens:
                kept.tokens.extend(tokens.at(row).tobytes() for row in range(len(own)))
            yield list(compress(images, new))
    except RuntimeError:  # an image cannot be decoded
        return
    finally:
        pipeline.__del__()  # see `Segment.close`


class KeptSegment:
    """A segment of the sample order whose samples are in memory. Like a `Segment`, without its readers and decoders."""

    def __init__(self, kept: KeptSplit, ids: Int64, epochs: Int64, config: ReaderConfig, buffers: BufferPool):
        self._kept, self._ids, self._epochs, self._batch_size = kept, ids, epochs, config.rank_batch
        self._buffers, self._side, self._begin = buffers, config.geometry.image_size, 0
        self._strip, self._images = config.geometry.strip, config.images
        self._draws = draws = draw_random_numbers(config, epochs, ids)
        rows = partial(_rows_of_batch, config.rank_batch)
        self._windows = CropWindows(config.geometry, lambda batch: draws["crop_uniforms"][rows(batch)])
        augmented = "augment" in draws
        self._resize = Resize(self._side, config.num_threads, planes=not augmented)
        self._pipeline: Any = None
        if augmented:
            self._pipeline = build_augment_pipeline(
                self._resized_crops,
                lambda batch: draws["augment"].rows(rows(batch)),
                batch_size=config.rank_batch,
                num_threads=config.num_threads,
            )

    def close(self) -> None:
        """Release memory now, without the garbage collector."""
        if self._pipeline is not None:
            self._pipeline.__del__()
            self._pipeline = None  # it refers to this segment
        self._draws.clear()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def exhausted(self) -> bool:
        return self._begin >= len(self._ids)

    def current(self) -> tuple[Int64, Int64]:
        """Sample ids and epochs of the next batch, (B,) each."""
        rows = slice(self._begin, self._begin + self._batch_size)
        return self._ids[rows].copy(), self._epochs[rows]

    def next(self) -> tuple[RawBatch, NDArray[np.bool_]]:
        """The next batch, and True for each of its samples."""
        ids, epochs = self.current()
        images = self._buffers.empty((len(ids), 3, self._side, self._strip * self._side))
        if self._pipeline is None:
            np.stack(self._resized_crops(self._begin // self._batch_size), out=images.numpy())
        else:
            (augmented,) = self._pipeline.run()
            np.copyto(images.numpy(), np.asarray(augmented.as_tensor()))
        self._begin += len(ids)
        kept, rows = self._kept, ids.tolist()
        batch = RawBatch(
            ids=ids,
            epochs=epochs,
            images=images,
            texts=[kept.texts[i] for i in rows],
            metadata=[kept.metadata[i] for i in rows],
            tokens=[kept.tokens[i] if kept.tokens else b"" for i in rows],
            encoded=lambda row: kept.dataset.image_bytes(rows[row]),
        )
        return batch, np.ones(len(ids), bool)

    def _resized_crops(self, batch: Any) -> list[NDArray[np.uint8]]:
        """The crops of a batch. Samples that share their image in an epoch share its crop, which is resized once."""
        rows = _rows_of_batch(self._batch_size, batch)
        corners, sizes, *of_strip = self._windows([self._kept.images[i].shape for i in self._ids[rows].tolist()])
        firsts, place = np.arange(len(rows)), np.arange(len(rows))
        if self._images is not None:
            of = np.stack([self._epochs[rows], self._images[self._ids[rows]]])
            _, firsts, place = np.unique(of, axis=1, return_index=True, return_inverse=True)
        kept = [self._kept.images[i] for i in self._ids[rows][firsts].tolist()]
        corners, sizes, *of_strip = ([one[k] for k in firsts] for one in (corners, sizes, *of_strip))
        if of_strip:
            starts = [[corner + k * step for corner, step in zip(corners, of_strip[1], strict=True)]
                      for k in range(self._strip)]  # fmt: skip
            resized = [self._resize(_crops(kept, start, of_strip[0])) for start in starts]
            found = [np.concatenate(row, axis=2) for row in zip(*resized, strict=True)]
        else:
            found = self._resize(_crops(kept, corners, sizes))
        return [found[k] for k in place.reshape(-1)]


def _crops(images: list[NDArray[np.uint8]], corners: list[Any], sizes: list[Any]) -> list[NDArray[np.uint8]]:
    # Copied with numpy, because torch would copy a crop on the threads that resize (see `Resize`).
    return [
        np.ascontiguousarray(image[y : y + h, x : x + w])
        for image, (y, x), (h, w) in zip(images, corners, sizes, strict=True)
    ]


def _rows_of_batch(batch_size: int, batch: Any) -> Int64:
    """Rows of batch number `batch` among a segment's samples. Segments of training consist of full batches."""
    return int(batch) * batch_size + np.arange(batch_size)  # an array, because indexing copies, as DALI needs it
