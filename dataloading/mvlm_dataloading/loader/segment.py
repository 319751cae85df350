"""A segment of the sample order: one DALI pipeline over a fixed list of samples. Random numbers are drawn up front.

Shape legend: B samples of this rank's batch, S image side.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.randomness import Purpose, uniforms

from .augment import Augment, draw_parameters
from .buffers import BufferPool, copy_on_this_thread
from .crop import CropGeometry, FileEnds, strip_fault
from .pipeline import Decoding, build_pipeline
from .sampler import index_folder, write_index_views


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """Settings of a reader."""

    seed: int
    geometry: CropGeometry
    augment: Augment
    batch_size: int
    """Samples of a global batch."""
    rank: int
    world_size: int
    train: bool
    stored_tokens: bool
    """Read the component `tok`."""
    num_threads: int
    device_id: int | None
    decoding: Decoding
    max_bad_fraction: float
    keep_bytes: int = 0
    """Maximum size of a split whose decoded images are kept in memory."""
    images: Int64 | None = None
    """First sample of each sample's image (N,), if the samples of an image share its crop in an epoch; else None."""
    per_image: int = 1
    """Samples of an image that come one after another."""

    @property
    def rank_batch(self) -> int:
        """Samples of one rank in a batch."""
        return self.batch_size // self.world_size


@dataclass(slots=True)
class RawBatch:
    """This rank's samples of a batch, before captions are chosen and tokenized."""

    ids: Int64
    epochs: Int64
    images: Tensor
    """uint8 (B, 3, S, S)."""
    texts: list[bytes]
    metadata: list[bytes]
    tokens: list[bytes]
    encoded: Callable[[int], bytes]
    """Return the encoded image of a row as it was read. Call it before the next batch is read."""
    replaced: dict[int, tuple["RawBatch", int]] = field(default_factory=dict)
    """Replaced row -> the batch that it was copied from, and its row there."""

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row, replaced or not. Call it before the next batch is read."""
        source, k = self.replaced.get(row, (None, row))
        return self.encoded(row) if source is None else source.image_bytes(k)

    def replace_row(self, row: int, source: "RawBatch", k: int) -> None:
        """Copy row k of another batch, but for its id and epoch, to a row of this one."""
        if self.images.is_cuda:
            self.images[row] = source.images[k]
        else:
            copy_on_this_thread(self.images[row], source.images[k])
        self.texts[row], self.metadata[row], self.tokens[row] = source.texts[k], source.metadata[k], source.tokens[k]
        self.replaced[row] = source, k


def draw_random_numbers(config: ReaderConfig, epochs: Int64, ids: Int64) -> dict[str, Any]:
    """Random numbers of n samples: `crop_uniforms`, float64 (n, 4); and `augment`, if images are augmented."""
    if config.images is not None:
        ids = config.images[ids]
    draws: dict[str, Any] = {"crop_uniforms": uniforms(Purpose.CROP, config.seed, epochs, ids, 4)}
    if config.train and not config.augment.is_identity:
        draws["augment"] = draw_parameters(config.augment, config.seed, epochs, ids, config.geometry.image_size)
    return draws


def check_delivery(dataset: Dataset, ids: Int64, texts: Any) -> None:
    """Assert that DALI delivered the samples `ids`, from its list of `.txt` components.

    DALI does not document that its reader follows the index order.
    """
    shards, (offsets, _) = dataset.shard_of(ids), dataset.locate("text", ids)
    for row in range(len(ids)):
        wanted = f"{dataset.tars[shards[row]]}:{offsets[row]}:"
        delivered = texts[row].source_info()
        assert delivered.startswith(wanted), f"wanted {wanted} from DALI's reader, got {delivered}"


class Segment:
    """A DALI pipeline over a fixed list of samples, and the current position in the list."""

    def __init__(
        self,
        dataset: Dataset,
        ids: Int64,
        epochs: Int64,
        config: ReaderConfig,
        batch_size: int,
        buffers: BufferPool,
        *,
        file_ends: FileEnds | None,
        prefetch: int,
    ):
        self._dataset, self._ids, self._epochs, self._batch_size = dataset, ids, epochs, batch_size
        self._buffers, self._stored_tokens = buffers, config.stored_tokens
        self._strip = config.geometry.strip
        self._begin = 0
        # The pipeline's functions hold a reference to this dict, and `close` empties it.
        draws = draw_random_numbers(config, epochs, ids)
        self._draws, count = draws, len(ids)
        # Without augmentation the images are resized into a buffer of ours, which DALI does not overwrite.
        own = config.device_id is None and "augment" not in draws and self._strip == 1
        self._images: Tensor | None = None

        def new_images(number: int) -> np.ndarray:
            side = config.geometry.image_size
            self._images = buffers.empty((number, 3, side, side))
            return self._images.numpy()

        def rows(batch: Any) -> Int64:
            # DALI's reader wraps around after the last sample, to fill the last batch and to prefetch.
            return (int(batch) * batch_size + np.arange(batch_size)) % count

        with tempfile.TemporaryDirectory(prefix="mvlm-index-", dir=index_folder()) as folder:
            self._pipeline = build_pipeline(
                *write_index_views(Path(folder), dataset, ids),
                lambda batch: draws["crop_uniforms"][rows(batch)],
                config.geometry,
                batch_size=batch_size,
                num_threads=config.num_threads,
                device_id=config.device_id,
                decoding=config.decoding,
                prefetch=prefetch,
                augment=(lambda batch: draws["augment"].rows(rows(batch))) if "augment" in draws else None,
                tokens=config.stored_tokens,
                file_ends=file_ends,
                images_into=new_images if own else None,
            )

    def close(self) -> None:
        """Release memory now. Reference cycles would keep the pipeline alive until the next garbage collection."""
        self._pipeline.__del__()
        self._draws.clear()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def exhausted(self) -> bool:
        return self._begin >= len(self._ids)

    def current(self) -> tuple[Int64, Int64]:
        """Sample ids and epochs of the next batch, (B,) or fewer."""
        rows = slice(self._begin, self._begin + self._batch_size)
        return self._ids[rows].copy(), self._epochs[rows]

    def next(self) -> tuple[RawBatch, np.ndarray]:
        """The next batch, and valid, bool (B,): False where a black image took the place of one with odd ends.

        Raises:
            RuntimeError: an image of the batch cannot be decoded.
            DataError: an image is no strip of as many images as wanted.
        """
        ids, epochs = self.current()
        images, encoded, texts, metadata, tokens, valid, _, _, *whole = self._pipeline.run()
        check_delivery(self._dataset, ids, texts)
        for sizes in whole:
            self._check_strips(ids, np.array(sizes.as_tensor()), np.array(valid.as_tensor()))
        self._begin += len(ids)
        own, self._images = self._images, None
        pixels = (torch.from_dlpack(images.as_tensor()) if own is None else own)[: len(ids)]
        batch = RawBatch(
            ids=ids,
            epochs=epochs,
            # On a CPU, DALI overwrites its own memory with the next batch.
            images=pixels if pixels.is_cuda or own is not None else self._buffers.copy(pixels),
            texts=[texts.at(row).tobytes() for row in range(len(ids))],
            metadata=[metadata.at(row).tobytes() for row in range(len(ids))],
            tokens=[tokens.at(row).tobytes() if self._stored_tokens else b"" for row in range(len(ids))],
            encoded=lambda row: encoded.at(row).tobytes(),
        )
        return batch, np.array(valid.as_tensor())[: len(ids)].astype(bool)

    def _check_strips(self, ids: Int64, sizes: np.ndarray, valid: np.ndarray) -> None:
        """Raise DataError for the first valid image whose size (h, w) in int32 (B, 2) is not that of a strip."""
        for i, (height, width), known in zip(ids.tolist(), sizes.tolist(), valid.tolist(), strict=False):
            if known and (fault := strip_fault(height, width, self._strip)):
                raise DataError(f"{self._dataset.where(i)}: {fault}")
