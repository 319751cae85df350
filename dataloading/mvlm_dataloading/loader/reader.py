"""Reader of one rank's samples: batches of images and texts in sample order, with undecodable images replaced."""

import contextlib
import ctypes
import gc
import logging
import re
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.links.samples import LinkedSample

from .lanes import LaneOrder
from .pixels import BufferPool, FileEnds
from .ring import Ring
from .sampler import SampleOrder, substitute_sample
from .segment import DecodedSegment, KeptSegment, KeptSplit, RawBatch, ReaderConfig, Segment, keep_split

log = logging.getLogger(__name__)

MOST_ATTEMPTS = 16
"""Times that a batch is read again after an error that none of its images caused, such as a lack of memory."""
_NAMED = re.compile(r"Failed to decode sample #(\d{1,9})\b")

# Each DALI pipeline reads one segment of the sample order. The first segment is short, so the first batch comes soon.
# Each further one is twice as long, because building a pipeline takes time. The maximum bounds the size of index files.
FIRST_SEGMENT_BATCHES = 16
MAX_SEGMENT_SAMPLES = 16384
MAX_RING_SEGMENT_SAMPLES = 1 << 17  # of a ring, whose samples need no index files

# A closed segment leaves a few hundred small objects in reference cycles, too few to trigger the garbage collector.
COLLECT_EVERY_SEGMENTS = 8
# glibc keeps freed memory in fragments that are too small for later buffers. Returning it to the system takes
# milliseconds.
TRIM_EVERY_SAMPLES = 4096


class Progress(NamedTuple):
    """Position of a reader after its last batch, with the undecodable images that it has met."""

    position: int = 0
    """Number of samples of all ranks that have been read, in the sample order."""
    bad: frozenset[int] = frozenset()
    """Ids of the undecodable images found so far."""
    samples_seen: int = 0
    """Samples read by this rank when `bad` was counted, those before a resume included."""


class Reader:
    """Batches from a progress on. Endless in training, else one pass.

    Raises:
        DataError: the progress already has too many undecodable images.
    """

    def __init__(self, dataset: Dataset, config: ReaderConfig, progress: Progress):
        self.progress, self.config = progress, config
        self._dataset = dataset
        together = {"images": config.images, "per_image": config.per_image}
        self._ring: Ring | None = None
        if config.lanes is None:
            self._order = SampleOrder(dataset.shard_sizes, config.seed, shuffle=config.train, **together)
        else:
            assert dataset.links is not None
            groups = dataset.row_groups()
            self._order = LaneOrder(dataset.shard_sizes, config.seed, config.lanes, groups=groups, **together)
            arguments = progress.position, config.batch_size, self._is_own, config.world_size
            self._ring = Ring(dataset, dataset.links, self._order, *arguments)
            self._start = progress.position
        self._segment: Segment | None = None
        self._planned_at = 0
        self._planned = np.empty(0, np.int64), np.empty(0, np.int64)  # ordered ids and epochs of the segment
        # The limit counts one rank's samples, so that more ranks do not mean more rebuilt pipelines. Remote shards are
        # fetched for all ranks' samples, so there the limit counts those.
        self._max_samples = MAX_SEGMENT_SAMPLES * (1 if dataset.remote is not None else config.world_size)
        if self._ring is not None:
            least = FIRST_SEGMENT_BATCHES * config.rank_batch  # however large batches are, few pipelines are built
            self._max_samples = max(MAX_RING_SEGMENT_SAMPLES, least) * config.world_size
        self._segment_batches = self._first_batches()
        self._buffers = BufferPool()
        self._kept: KeptSplit | None = None
        # A pass reads each image once. On a GPU decoding takes no time from the CPU's cores.
        local = config.device_id is None and dataset.remote is None
        self._may_keep = config.keep_bytes > 0 and config.train and local and not progress.bad
        self._file_ends, self._decoder = FileEnds(), ImageDecoder(None)
        self._samples_since_trim = self._closed_segments = 0
        self._fetching: threading.Thread | None = None
        self._stop_if_too_many_bad()

    def next(self) -> RawBatch | None:
        """The next batch; None at the end of a pass."""
        if not self.config.train and self.progress.position >= len(self._dataset):
            return None
        again = 0
        while True:
            if self._segment is None or self._segment.exhausted:
                self._close_segment()  # first, because two pipelines need twice the memory
                self._segment = self._open_next_segment()
            try:
                batch, valid = self._segment.next()
                break
            except RuntimeError as error:
                if not threading.main_thread().is_alive():
                    raise  # the interpreter is exiting and has shut DALI down; no image caused this error
                found = self._cause(self._segment.current()[0], error)
                if not found and again == MOST_ATTEMPTS:
                    raise
                again = 0 if found else again + 1
                if again:  # a lack of memory, perhaps
                    log.warning("a batch is read again, because of an error that no image caused: %s", error)
                self._mark_bad(found)
                self._close_segment()
                self._segment_batches = self._first_batches()  # which is soon there
        if not valid.all():
            self._replace(batch, np.flatnonzero(~valid))
        position, bad, seen = self.progress
        self.progress = Progress(position + len(batch.ids) * self.config.world_size, bad, seen + len(batch.ids))
        if self._ring is not None:
            self._ring.release(self.progress.position)
        self._samples_since_trim += len(batch.ids)
        if self._samples_since_trim >= TRIM_EVERY_SAMPLES:
            self._trim_memory()
        return batch

    def _first_batches(self) -> int:
        return max(1, min(FIRST_SEGMENT_BATCHES, self._max_samples // self.config.batch_size))

    def close(self) -> None:
        """Release the pipeline and the remote shards."""
        self._close_segment()
        if self._fetching is not None:
            self._fetching.join()
        if self._ring is not None:
            self._ring.close()
        if self._dataset.remote is not None:
            self._dataset.remote.release_except([])

    def _open_next_segment(self) -> Segment:
        config, position = self.config, self.progress.position
        if self._may_keep:  # here, because this may run on a thread
            self._kept = keep_split(self._dataset, config)
            self._may_keep = False
        count = self._segment_batches * config.batch_size
        if 2 * count <= self._max_samples:
            self._segment_batches *= 2
        ids, epochs = self._planned_samples(position, count)
        count = len(ids) * config.world_size
        if self._kept is not None:
            return KeptSegment(self._kept, self._dataset, ids, epochs, config, config.rank_batch, self._buffers)
        linked = None
        if self._ring is not None:
            linked = partial(_taken, self._ring, self._own_positions(position, count), ids)
        elif self._dataset.remote is not None:
            self._fetch_shards(ids, position + count, self._segment_batches * config.batch_size)
        return self._decoded(ids, epochs, config, config.rank_batch, self._file_ends, prefetch=2, linked=linked)

    def _decoded(
        self,
        ids: Int64,
        epochs: Int64,
        config: ReaderConfig,
        batch: int,
        ends: FileEnds | None,
        prefetch: int,
        linked: Callable[[Int64], list[LinkedSample]] | None,
    ) -> DecodedSegment:
        self._dataset.check_shards(np.unique(self._dataset.shard_of(ids)).tolist())
        arguments = self._dataset, ids, epochs, config, batch, self._buffers
        return DecodedSegment(*arguments, file_ends=ends, prefetch=prefetch, linked=linked)

    def _read_once(self, ids: Int64, epochs: Int64, config: ReaderConfig) -> RawBatch:
        """One batch of the samples `ids` by a pipeline of its own, files with odd ends included.

        Raises RuntimeError if an image cannot be decoded.
        """
        linked = None if self._ring is None else partial(_found, self._ring, ids)
        with contextlib.closing(self._decoded(ids, epochs, config, len(ids), None, 1, linked)) as segment:
            batch, _ = segment.next()
        batch.encoded = lambda row: self._dataset.image_bytes(int(ids[row]))  # the pipeline's own copy is gone
        return batch

    def _close_segment(self) -> None:
        if self._segment is None:
            return
        self._segment.close()
        self._segment = None
        self._closed_segments += 1
        if self._closed_segments % COLLECT_EVERY_SEGMENTS == 0:
            gc.collect()
        self._trim_memory()

    def _trim_memory(self) -> None:
        self._samples_since_trim = 0
        self._dataset.index.release()
        if self.config.device_id is None and self._kept is None:
            with contextlib.suppress(AttributeError):  # only glibc has this function
                ctypes.CDLL(None).malloc_trim(0)

    def _planned_samples(self, position: int, count: int) -> tuple[Int64, Int64]:
        """`_samples` for a segment. After an undecodable image these are the rest of its segment, or a part of it."""
        begin, (ids, epochs) = (position - self._planned_at) // self.config.world_size, self._planned
        if begin >= len(ids):
            self._planned_at, begin = position, 0
            self._planned = ids, epochs = self._ordered_samples(position, count)
        rows = slice(begin, begin + count // self.config.world_size)
        return self._without_bad(ids[rows], epochs[rows])

    def _samples(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Ids and epochs of this rank's share of `count` ordered samples. Known bad samples are replaced."""
        return self._without_bad(*self._ordered_samples(position, count))

    def _without_bad(self, ids: Int64, epochs: Int64) -> tuple[Int64, Int64]:
        ids = ids.copy()
        for row in np.flatnonzero(np.isin(ids, list(self.progress.bad))):
            ids[row] = self._substitute(int(epochs[row]), int(ids[row]))
        return ids, epochs

    def _ordered_samples(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Ids and epochs of this rank's samples, int64 (n,) each, before undecodable samples are replaced."""
        config = self.config
        if not config.train:
            count = min(count, len(self._dataset) - position)
        return self._order.at(self._own_positions(position, count))

    def _own_positions(self, position: int, count: int) -> Int64:
        """This rank's among `count` positions of the sample order, whole batches if there are several ranks."""
        positions = position + np.arange(count)
        if self.config.world_size == 1:
            return positions
        return positions.reshape(-1, self.config.world_size, self.config.rank_batch)[:, self.config.rank].ravel()

    def _is_own(self, positions: Int64) -> NDArray[np.bool_]:
        """True for the positions of this rank, if batches follow each other from the start."""
        config = self.config
        return (positions - self._start) % config.batch_size // config.rank_batch == config.rank

    def _fetch_shards(self, ids: Int64, next_position: int, next_count: int) -> None:
        """Wait for the remote shards of these samples, then fetch the next segment's shards in the background."""
        remote = self._dataset.remote
        assert remote is not None
        if self._fetching is not None:
            self._fetching.join()
        shards = np.unique(self._dataset.shard_of(ids)).tolist()
        remote.release_except(shards)
        remote.fetch(shards)
        if not self.config.train and next_position >= len(self._dataset):
            return
        following = np.unique(self._dataset.shard_of(self._samples(next_position, next_count)[0])).tolist()

        def fetch_ahead() -> None:
            try:
                remote.fetch(following)
            except DataError as error:  # the shard is fetched again when it is needed; that error is raised
                log.info("a shard was not prefetched: %s", error)

        self._fetching = threading.Thread(target=fetch_ahead, name="mvlm-fetching", daemon=True)
        self._fetching.start()

    def _substitute(self, epoch: int, i: int) -> int:
        return substitute_sample(self.config.seed, epoch, i, len(self._dataset), self.progress.bad)

    def _replace(self, batch: RawBatch, rows: Int64) -> None:
        """Fill rows whose files have odd ends: with the sample itself if it decodes, else with a substitute."""
        if found := self._undecodable(np.array(sorted({*batch.ids[rows].tolist()} - self.progress.bad), np.int64)):
            self._mark_bad(found)
        good = rows[[i not in self.progress.bad for i in batch.ids[rows].tolist()]]
        for i in np.unique(batch.ids[good]).tolist():
            if not self._file_ends.allowed:
                log.warning("images with bytes after their end, such as %s: they are used", self._dataset.where(i))
            self._file_ends.allow(self._dataset.image_bytes(i))
        for row, (source, k) in zip(
            good.tolist(), self._read_several(batch.ids[good], batch.epochs[good]), strict=True
        ):
            if source is not None:
                batch.replace_row(row, source, k)
            elif (i := int(batch.ids[row])) not in self.progress.bad:
                self._mark_bad([i])
        for row in (row for row in rows.tolist() if int(batch.ids[row]) in self.progress.bad):
            self._substitute_row(batch, row)

    def _read_several(self, ids: Int64, epochs: Int64) -> list[tuple[RawBatch | None, int]]:
        """The batch and the row of each sample; None if its whole image decodes and this epoch's crop does not."""
        if not len(ids):
            return []
        with contextlib.suppress(RuntimeError):
            several = self._read_once(ids, epochs, self.config)
            return [(several, k) for k in range(len(ids))]
        return [(self._read_single(i, epoch), 0) for i, epoch in zip(ids.tolist(), epochs.tolist(), strict=True)]

    def _substitute_row(self, batch: RawBatch, row: int) -> None:
        """Fill a row whose sample is bad with a substitute that decodes."""
        epoch = int(batch.epochs[row])
        # For the ordered sample. The row may hold a substitute, and one for that would depend on when it was found bad.
        ordered = int(self._ordered_samples(self.progress.position, self.config.batch_size)[0][row])
        while True:
            i = self._substitute(epoch, ordered)
            if (single := self._read_single(i, epoch)) is not None:
                batch.ids[row] = i
                return batch.replace_row(row, single, 0)
            self._mark_bad([i])

    def _read_single(self, i: int, epoch: int) -> RawBatch | None:
        """A batch of one sample; None if it cannot be decoded."""
        if self._ring is None and self._dataset.remote is not None:
            self._dataset.remote.fetch([int(self._dataset.shard_of(i))])
        if self._undecodable(np.array([i])):
            return None
        with contextlib.suppress(RuntimeError):
            return self._read_once(np.array([i]), np.array([epoch]), self.config)

    def _cause(self, ids: Int64, error: RuntimeError) -> list[int]:
        """Ids of undecodable images of a batch `ids`, for which DALI has raised an error.

        Its decoder names one image, its reader of headers none. All are decoded if neither helps.
        """
        if named := _NAMED.search(str(error)):
            suspects = ids[int(named[1]) : int(named[1]) + 1]
        else:
            suspects = ids[self._decoder.unreadable([self._encoded(i) for i in ids.tolist()])]
        return self._undecodable(np.unique(suspects)) or self._undecodable(np.unique(ids))

    def _undecodable(self, ids: Int64) -> list[int]:
        """Ids of the undecodable images among `ids`.

        The whole image is decoded: in a truncated file, a crop above the cut still decodes. So the verdict is the same
        in every epoch, on every rank and in every batch. It is that of the build's decoder, because DALI's refusal may
        also mean a lack of memory.
        """
        images = [self._encoded(i) for i in ids.tolist()]
        found = zip(ids.tolist(), self._decoder(images), strict=True)
        return [i for i, verdict in found if isinstance(verdict, str)]

    def _encoded(self, i: int) -> bytes:
        return self._dataset.image_bytes(i) if self._ring is None else self._ring.find(i).image

    def _mark_bad(self, found: list[int]) -> None:
        """Record undecodable images, and stop if there are too many."""
        dataset = self._dataset
        for i in found:
            dataset.image_bytes(i)  # tells a failing disk or a truncated shard from a bad image: reading raises
        if found and not self.config.train:
            raise DataError(
                f"{dataset.where(found[0])}: wanted an image, found one that cannot be decoded; remove the sample"
            )
        for i in found:
            log.warning("skipped an image that cannot be decoded: %s", dataset.where(i))
        self.progress = self.progress._replace(bad=self.progress.bad | set(found))
        self._stop_if_too_many_bad()

    def _stop_if_too_many_bad(self) -> None:
        """Raise DataError, with the places of 20 images, if more than `max_bad_fraction` of them is undecodable.

        The share is taken of the samples that this rank has seen, or of its share of the split if that is larger. A
        rank sees a random share of the bad images, so with several ranks the limit has a margin of four standard
        deviations.
        """
        (_, bad, samples_seen), ranks, limit = self.progress, self.config.world_size, self.config.max_bad_fraction
        size = len(self._dataset)
        seen = min(size, max(size / ranks, samples_seen))
        allowed = limit * seen + (4 * (limit * seen) ** 0.5 if ranks > 1 else 0)
        if len(bad) > min(allowed, size - 1):  # one has to be good, to take the place of the others
            listed = "; ".join(self._dataset.where(i) for i in sorted(bad)[:20])
            raise DataError(
                f"{self._dataset.folder}: wanted at most {limit:.0%} undecodable images, found {len(bad)} of "
                f"{seen:.0f}; build the data set again without them: {listed}"
            )


def _taken(ring: Ring, positions: Int64, ids: Int64, rows: Int64) -> list[LinkedSample]:
    return ring.take(positions[rows], ids[rows])


def _found(ring: Ring, ids: Int64, rows: Int64) -> list[LinkedSample]:
    return [ring.find(i) for i in ids[rows].tolist()]
