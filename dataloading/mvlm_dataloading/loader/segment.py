"""Segments of the sample order: fixed lists of samples, decoded by a DALI pipeline or kept decoded in memory.

Random numbers of a segment are drawn up front. On a CPU, decoding takes cores away from the training step, so a small
split is decoded once per process, and no longer once per epoch. Cropping the decoded image gives the pixels of the
decoded crop, so a kept split gives the same batches.

Shape legend: B samples of this rank's batch, S image side, H and W of an image as stored.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links.samples import LinkedSample
from mvlm_dataloading.randomness import Purpose, uniforms

from .augment import Augment, draw_parameters
from .device import owned, working
from .lanes import Lanes
from .pipeline import BLACK, Decoding, build_augment_pipeline, build_pipeline
from .pixels import BufferPool, CropGeometry, CropWindows, FileEnds, Resize, copy_on_this_thread

log = logging.getLogger(__name__)

_BATCH = 64
CHUNK_SAMPLES = 16384
"""Samples of a pipeline that decodes a split to keep, after the first 64. It bounds the size of index files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderConfig:
    """Settings of a loader's reader: samples, order, crops, and this rank's place."""

    seed: int
    geometry: CropGeometry
    augment: Augment
    batch_size: int
    """Samples of a global batch."""
    rank: int
    world_size: int
    train: bool
    stored_tokens: bool
    """True if the stored tokens are read, the component `tok`."""
    num_threads: int
    device_id: int | None
    decoding: Decoding
    max_bad_fraction: float
    keep_bytes: int = 0
    """Maximum size of a split whose decoded images are kept in memory."""
    lanes: Lanes | None = None
    """Parameters of sample order 2. None: order 1 in training, else the stored order."""
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
    """One rank's samples of a batch, B of them, before captions are chosen and tokenized."""

    ids: Int64
    epochs: Int64
    images: Tensor
    """uint8 (B, 3, S, S), images after crop and resize."""
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
            with working(self.images.device):
                self.images[row] = source.images[k]
        else:
            copy_on_this_thread(self.images[row], source.images[k])
        self.texts[row], self.metadata[row], self.tokens[row] = source.texts[k], source.metadata[k], source.tokens[k]
        self.replaced[row] = source, k


class Segment:
    """Samples in order, and the current position among them. A subclass reads them.

    Args:
        batch_size: samples of each batch. The last one may have fewer.
    """

    _pipeline: Any = None

    def __init__(
        self, dataset: Dataset, ids: Int64, epochs: Int64, config: ReaderConfig, batch_size: int, buffers: BufferPool
    ) -> None:
        self._dataset, self._ids, self._epochs, self._config = dataset, ids, epochs, config
        self._batch_size, self._buffers, self._begin = batch_size, buffers, 0
        of = ids if config.images is None else config.images[ids]
        # A pipeline's functions hold a reference to this dict, and `close` empties it.
        self._draws: dict[str, Any] = {"crop_uniforms": uniforms(Purpose.CROP, config.seed, epochs, of, 4)}
        self._augments = config.train and not config.augment.is_identity
        if self._augments:
            self._draws["augment"] = draw_parameters(
                config.augment, config.seed, epochs, of, config.geometry.image_size
            )

    def close(self) -> None:
        """Release memory now. Reference cycles would keep it until the next garbage collection."""
        if self._pipeline is not None:
            self._pipeline.__del__()  # DALI never frees a pipeline that is not closed
            self._pipeline = None
        self._draws.clear()

    @property
    def exhausted(self) -> bool:
        return self._begin >= len(self._ids)

    def current(self) -> tuple[Int64, Int64]:
        """Sample ids and epochs of the next batch, (B,) or fewer."""
        rows = slice(self._begin, self._begin + self._batch_size)
        return self._ids[rows].copy(), self._epochs[rows]

    def next(self) -> tuple[RawBatch, NDArray[np.bool_]]:
        """The next batch, and valid, bool (B,): False where a black image took the place of one with odd ends.

        Raises:
            RuntimeError: an image of the batch cannot be decoded.
            DataError: an image is no strip of as many images as wanted.
        """
        raise NotImplementedError

    def _rows(self, batch: Any) -> Int64:
        """Rows of batch number `batch`. DALI's reader begins again after the last sample, to fill the last batch."""
        return (int(batch) * self._batch_size + np.arange(self._batch_size)) % len(self._ids)

    def _crop_uniforms(self, batch: Any) -> NDArray[np.float64]:
        return self._draws["crop_uniforms"][self._rows(batch)]

    def _augment(self, batch: Any) -> list[NDArray]:
        return self._draws["augment"].rows(self._rows(batch))


class DecodedSegment(Segment):
    """A segment that a DALI pipeline decodes.

    Args:
        linked: rows, int64 (B,) -> their samples, in place of the tars that the pipeline reads.
    """

    def __init__(
        self,
        *arguments: Any,
        file_ends: FileEnds | None,
        prefetch: int,
        linked: Callable[[Int64], list[LinkedSample]] | None = None,
    ) -> None:
        super().__init__(*arguments)
        self._draws["linked"] = linked
        config = self._config
        # Without augmentation the images are resized into a buffer of ours, which DALI does not overwrite.
        own = config.device_id is None and not self._augments and config.geometry.strip == 1
        self._images: Tensor | None = None
        self._pipeline = build_pipeline(
            self._dataset,
            self._ids,
            self._crop_uniforms,
            config.geometry,
            batch_size=self._batch_size,
            num_threads=config.num_threads,
            device_id=config.device_id,
            decoding=config.decoding,
            prefetch=prefetch,
            augment=self._augment if self._augments else None,
            tokens=config.stored_tokens,
            file_ends=file_ends,
            images_into=self._new_images if own else None,
            encoded=None if linked is None else self._encoded,
        )

    def _encoded(self, batch: Any) -> list[NDArray[np.uint8]]:
        if int(batch) * self._batch_size >= len(self._ids):  # DALI prepares batches that nobody asks for
            return [np.frombuffer(BLACK, np.uint8)] * self._batch_size
        return [np.frombuffer(one.image, np.uint8) for one in self._draws["linked"](self._rows(batch))]

    def _new_images(self, number: int) -> NDArray[np.uint8]:
        side = self._config.geometry.image_size
        self._images = images = self._buffers.empty((number, 3, side, side))
        return images.numpy()

    def next(self) -> tuple[RawBatch, NDArray[np.bool_]]:
        ids, epochs = self.current()
        linked = self._draws["linked"]
        images, encoded, *others = self._pipeline.run()
        components, (valid, _, _, *whole) = (others[:3], others[3:]) if linked is None else ([], others)
        valid = np.array(valid.as_tensor())[: len(ids)].astype(bool)
        if linked is None:
            texts, metadata, tokens = _delivered(self._dataset, ids, components, self._config)
        else:
            samples = linked(self._begin + np.arange(len(ids)))
            texts, metadata = [one.text for one in samples], [one.metadata for one in samples]
            tokens = [b""] * len(ids)
        for sizes in whole:
            _check_strips(self._dataset, ids[valid], np.array(sizes.as_tensor())[: len(ids)][valid], self._config)
        self._begin += len(ids)
        own, self._images = self._images, None
        if own is None:  # DALI's own memory
            device_id, output = self._config.device_id, images.as_tensor()
            if device_id is None:
                own = self._buffers.copy(torch.from_dlpack(output)[: len(ids)])
            else:
                own = owned(output, torch.device("cuda", device_id))
        batch = RawBatch(
            ids=ids,
            epochs=epochs,
            images=own[: len(ids)],
            texts=texts,
            metadata=metadata,
            tokens=tokens,
            encoded=lambda row: encoded.at(row).tobytes(),
        )
        return batch, valid


def _delivered(dataset: Dataset, ids: Int64, components: Sequence[Any], config: ReaderConfig) -> list[list[bytes]]:
    """Texts, metadata and stored tokens of the samples `ids`, from DALI's lists.

    Asserts that these are of those samples: DALI does not document that its reader follows the index order.
    """
    texts, metadata, tokens, *_ = components
    shards, (offsets, _) = dataset.shard_of(ids), dataset.locate("text", ids)
    for row in range(len(ids)):
        wanted = f"{dataset.tars[shards[row]]}:{offsets[row]}:"
        delivered = texts[row].source_info()
        assert delivered.startswith(wanted), f"wanted {wanted} from DALI's reader, got {delivered}"
    found = [[one.at(row).tobytes() for row in range(len(ids))] for one in (texts, metadata)]
    return [*found, [tokens.at(row).tobytes() if config.stored_tokens else b"" for row in range(len(ids))]]


def _check_strips(dataset: Dataset, ids: Int64, sizes: Any, config: ReaderConfig) -> None:
    """Raise DataError for the first image whose size (h, w) is not that of a strip of square images."""
    images = config.geometry.strip
    for i, (height, width) in zip(ids.tolist(), sizes, strict=True):
        if images > 1 and width != images * height:
            raise DataError(
                f"{dataset.where(i)}: wanted a strip of {images} square images side by side, {images} times as wide "
                f"as high, found {width} x {height} pixels; build the data again"
            )


@dataclass(frozen=True, slots=True)
class KeptSplit:
    """All samples of a split, by sample id."""

    images: list[NDArray[np.uint8]]
    """(H, W, 3) each, decoded and uncropped; the same array for samples of a stored image that they share."""
    texts: list[bytes]
    metadata: list[bytes]
    tokens: list[bytes]


def keep_split(dataset: Dataset, config: ReaderConfig) -> KeptSplit | None:
    """Decode all images of a split.

    None if they take more than `keep_bytes`, or if one cannot be decoded or has wrong first or last bytes. At most one
    batch is decoded in vain if its images are as large as the others.
    """
    kept = KeptSplit([], [], [], [])
    taken, batch_size = 0, min(_BATCH, len(dataset))
    chunk = batch_size  # the first one is a batch, so a large split costs no more than that
    while len(kept.images) < len(dataset):
        ids = np.arange(len(kept.images), min(len(kept.images) + chunk, len(dataset)))
        for images in _decoded_batches(dataset, kept, ids, config, batch_size):
            taken += sum(image.nbytes for image in images)
            if taken * len(dataset) / len(kept.images) > config.keep_bytes:
                return None
        if len(kept.images) <= ids[-1]:  # an image cannot be decoded; the reader finds it when its turn comes
            return None
        chunk = CHUNK_SAMPLES
    log.debug("%s: keeps %d decoded images, %.0f MB", dataset.folder, len(kept.images), taken / 1e6)
    return kept


def _decoded_batches(
    dataset: Dataset, kept: KeptSplit, ids: Int64, config: ReaderConfig, batch_size: int
) -> Iterator[list[NDArray[np.uint8]]]:
    """Decode the samples `ids` and append them to `kept`. Yields the images that each batch adds.

    Ends at an image that cannot be decoded or has wrong first or last bytes.
    """
    dataset.check_shards(np.unique(dataset.shard_of(ids)).tolist())
    pipeline = build_pipeline(
        dataset,
        ids,
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
            decoded, _, *components, valid, _, _ = pipeline.run()
            texts, metadata, tokens = _delivered(dataset, own, components, config)
            if not np.array(valid.as_tensor())[: len(own)].all():
                return
            images = [np.array(decoded.at(row)) for row in range(len(own))]
            _check_strips(dataset, own, [image.shape[:2] for image in images], config)
            firsts = own if config.images is None else config.images[own]
            for i, image in zip(firsts.tolist(), images, strict=True):
                kept.images.append(image if i == len(kept.images) else kept.images[i])
            kept.texts.extend(texts)
            kept.metadata.extend(metadata)
            kept.tokens.extend(tokens)
            yield list(compress(images, firsts == own))  # an image that several samples share is kept once
    except RuntimeError:  # an image cannot be decoded
        return
    finally:
        pipeline.__del__()  # see `Segment.close`


class KeptSegment(Segment):
    """A segment of training whose samples are in memory: it consists of full batches."""

    def __init__(self, kept: KeptSplit, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._kept = kept
        config = self._config
        self._windows = CropWindows(config.geometry, self._crop_uniforms)
        self._resize = Resize(config.geometry.image_size, config.num_threads, planes=not self._augments)
        if self._augments:
            self._pipeline = build_augment_pipeline(
                self._resized_crops, self._augment, batch_size=self._batch_size, num_threads=config.num_threads
            )

    def next(self) -> tuple[RawBatch, NDArray[np.bool_]]:
        ids, epochs = self.current()
        geometry = self._config.geometry
        images = self._buffers.empty((len(ids), 3, geometry.image_size, geometry.strip * geometry.image_size))
        if self._pipeline is None:
            np.stack(self._resized_crops(self._begin // self._batch_size), out=images.numpy())
        else:
            (augmented,) = self._pipeline.run()
            np.copyto(images.numpy(), np.asarray(augmented.as_tensor()))
        self._begin += len(ids)
        kept, dataset, rows = self._kept, self._dataset, ids.tolist()
        batch = RawBatch(
            ids=ids,
            epochs=epochs,
            images=images,
            texts=[kept.texts[i] for i in rows],
            metadata=[kept.metadata[i] for i in rows],
            tokens=[kept.tokens[i] for i in rows],
            encoded=lambda row: dataset.image_bytes(rows[row]),
        )
        return batch, np.ones(len(ids), bool)

    def _resized_crops(self, batch: Any) -> list[NDArray[np.uint8]]:
        """The crops of a batch. Samples that share their image in an epoch share its crop, which is resized once."""
        rows, of_image = self._rows(batch), self._config.images
        corners, sizes, *of_strip = self._windows([self._kept.images[i].shape for i in self._ids[rows].tolist()])
        firsts, place = np.arange(len(rows)), np.arange(len(rows))
        if of_image is not None:
            of = np.stack([self._epochs[rows], of_image[self._ids[rows]]])
            _, firsts, place = np.unique(of, axis=1, return_index=True, return_inverse=True)
        kept = [self._kept.images[i] for i in self._ids[rows][firsts].tolist()]
        corners, sizes, *of_strip = (np.stack(one)[firsts] for one in (corners, sizes, *of_strip))
        if of_strip:
            tiles, steps, _ = of_strip
            parts = [self._resize(_crops(kept, corners + k * steps, tiles)) for k in range(self._config.geometry.strip)]
            found = [np.concatenate(row, axis=2) for row in zip(*parts, strict=True)]
        else:
            found = self._resize(_crops(kept, corners, sizes))
        return [found[k] for k in place.reshape(-1)]


def _crops(images: list[NDArray[np.uint8]], corners: NDArray, sizes: NDArray) -> list[NDArray[np.uint8]]:
    # Copied with numpy, because torch would copy a crop on the threads that resize (see `Resize`).
    return [
        np.ascontiguousarray(image[y : y + h, x : x + w])
        for image, (y, x), (h, w) in zip(images, corners.tolist(), sizes.tolist(), strict=True)
    ]
