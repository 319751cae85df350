"""What DALI reads, in the order of the stream: full batches of pictures and texts, bad pictures replaced."""

import contextlib
import ctypes
import gc
import logging
import threading
from dataclasses import replace

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError

from .augment import Augment
from .buffers import Pages, copy_on_this_thread
from .sampler import Stream, substitute
from .segment import Rows, Segment, Settings

log = logging.getLogger(__name__)

# A reader is built for a part of the stream. The first is short, to begin at once; each next is twice as long,
# because to build one costs a little; and there is an end to it, so that the index has a bounded size however large
# the data set is.
_FIRST_SEGMENT_BATCHES = 16
_SEGMENT_SAMPLES = 16384

# Of a closed segment some hundred small objects are left in reference cycles, too few to call the garbage collector.
_COLLECT_SEGMENTS = 8
# glibc keeps what was freed, in pieces that later buffers fit badly. To give it back takes some milliseconds.
_TRIM_SAMPLES = 4096


class Reader:
    """Batches from a position of the stream on, for ever in training and else to the end of one pass.

    Attributes:
        position: samples of the stream read, those of all ranks. bad: ids of the undecodable pictures met so far.
        met: samples among which these were found: what this rank has read, and what the state told of that it began at.

    Raises:
        DataError: too many are bad already.
    """

    def __init__(self, dataset: Dataset, settings: Settings, position: int, bad: frozenset[int], met: int):
        self.position, self.bad, self.met = position, bad, met
        self._dataset, self._settings = dataset, settings
        self._stream = Stream(dataset.shard, settings.seed, shuffle=settings.train)
        self._segment: Segment | None = None
        # Of one rank, so that many ranks do not build often; but what all read is staged together.
        self._longest = _SEGMENT_SAMPLES * (1 if dataset.stage is not None else settings.world_size)
        self._segment_batches = max(1, min(_FIRST_SEGMENT_BATCHES, self._longest // settings.batch_size))
        self._pages = Pages()
        self._guard = True
        self._untrimmed = self._closed = 0
        self._staging: threading.Thread | None = None
        self._judge()

    def next(self) -> Rows | None:
        """The next batch; None at the end of a pass."""
        if not self._settings.train and self.position >= len(self._dataset):
            return None
        while True:
            if self._segment is None or self._segment.exhausted:
                self._close_segment()  # before the next is built: two need twice the memory
                self._segment = self._read_from(self.position)
            try:
                rows, fine = self._segment.next()
                break
            except RuntimeError as error:
                if not threading.main_thread().is_alive():
                    raise  # the interpreter is ending and has taken DALI's pipelines down: no picture is to blame
                self._set_aside(self._undecodable(np.unique(self._segment.current()[0])), error)
                self._close_segment()
        for row in np.flatnonzero(~fine):
            self._replace(rows, int(row))
        self.position += len(rows.ids) * self._settings.world_size
        self.met += len(rows.ids)
        self._untrimmed += len(rows.ids)
        if self._untrimmed >= _TRIM_SAMPLES:
            self._trim()
        return rows

    def _close_segment(self) -> None:
        if self._segment is None:
            return
        self._segment.close()
        self._segment = None
        self._closed += 1
        if self._closed % _COLLECT_SEGMENTS == 0:
            gc.collect()
        self._trim()

    def _trim(self) -> None:
        self._untrimmed = 0
        if self._settings.device_id is None:
            with contextlib.suppress(AttributeError):  # other C libraries than glibc have no such function
                ctypes.CDLL(None).malloc_trim(0)

    def _read_from(self, position: int) -> Segment:
        count = self._segment_batches * self._settings.batch_size
        if 2 * count <= self._longest:
            self._segment_batches *= 2
        ids, epochs = self._samples(position, count)
        if self._dataset.stage is not None:
            self._stage(ids, position + count, self._segment_batches * self._settings.batch_size)
        return self._open(ids, epochs, self._settings.rank_batch, guard=self._guard)

    def _samples(self, position: int, count: int) -> tuple[Int64, Int64]:
        """Ids and epochs of this rank's samples in `count` samples of the stream, known bad ones replaced."""
        ids, epochs = self._dealt(position, count)
        for row in np.flatnonzero(np.isin(ids, list(self.bad))):
            ids[row] = self._substitute(int(epochs[row]), int(ids[row]))
        return ids, epochs

    def _dealt(self, position: int, count: int) -> tuple[Int64, Int64]:
        """The same as the stream has them, bad ones and all."""
        settings = self._settings
        if not settings.train:
            count = min(count, len(self._dataset) - position)
        ids, epochs = self._stream(position, count)
        if settings.world_size > 1:
            shape = (-1, settings.world_size, settings.rank_batch)
            ids, epochs = (part.reshape(shape)[:, settings.rank].ravel() for part in (ids, epochs))
        return ids, epochs

    def _substitute(self, epoch: int, i: int) -> int:
        return substitute(self._settings.seed, epoch, i, len(self._dataset), self.bad)

    def _stage(self, ids: Int64, next_position: int, next_count: int) -> None:
        """Have the shards of these samples here, and bring those of the following ones while these are read."""
        stage = self._dataset.stage
        assert stage is not None
        if self._staging is not None:
            self._staging.join()
        shards = np.unique(self._dataset.shard[ids]).tolist()
        stage.keep(shards)
        stage.fetch(shards)
        if not self._settings.train and next_position >= len(self._dataset):
            return
        following = np.unique(self._dataset.shard[self._samples(next_position, next_count)[0]]).tolist()

        def ahead() -> None:
            try:
                stage.fetch(following)
            except DataError as error:  # when the shard is needed it is tried again, and then it matters
                log.info("not staged ahead of use: %s", error)

        self._staging = threading.Thread(target=ahead, name="mvlm-staging", daemon=True)
        self._staging.start()

    def close(self) -> None:
        """Let go of the pipeline and of staged shards."""
        self._close_segment()
        if self._staging is not None:
            self._staging.join()
        if self._dataset.stage is not None:
            self._dataset.stage.keep([])

    def _open(
        self, ids: Int64, epochs: Int64, batch_size: int, *, guard: bool, prefetch: int = 2,
        settings: Settings | None = None,
    ) -> Segment:  # fmt: skip
        settings = settings or self._settings
        return Segment(self._dataset, ids, epochs, settings, batch_size, self._pages, guard=guard, prefetch=prefetch)

    def _replace(self, rows: Rows, row: int) -> None:
        """Fill in a row that the guard kept from the decoder: with the sample if it can be decoded after all, else with
        its substitute."""
        epoch, read = int(rows.epochs[row]), int(rows.ids[row])
        i, alone = read, None
        while True:
            if i not in self.bad:
                if (alone := self._alone(i, epoch)) is not None:
                    break
                self._set_aside([i])
            # Of the stream's sample, not of what was read: that may be a substitute itself, and elsewhere it is not.
            dealt = int(self._dealt(self.position, self._settings.batch_size)[0][row])
            i = self._substitute(epoch, dealt)
        if i == read and self._guard:
            self._guard = False
            log.warning(
                "images with bytes after their end, as %s: they are used, and damaged ones take longer to find",
                self._dataset.where(i),
            )
        rows.ids[row] = i
        if rows.images.is_cuda:
            rows.images[row] = alone.images[0]
        else:
            copy_on_this_thread(rows.images[row], alone.images[0])
        rows.texts[row], rows.metadata[row], rows.tokens[row] = alone.texts[0], alone.metadata[0], alone.tokens[0]
        others, encoded = rows.encoded, alone.encoded
        rows.encoded = lambda k: encoded(0) if k == row else others(k)

    def _alone(self, i: int, epoch: int) -> Rows | None:
        """A batch of one sample; None if it cannot be decoded."""
        if self._dataset.stage is not None:
            self._dataset.stage.fetch([int(self._dataset.shard[i])])
        try:
            self._decode_whole(np.array([i]))
            return self._open(np.array([i]), np.array([epoch]), 1, guard=False, prefetch=1).next()[0]
        except RuntimeError:
            return None

    def _decode_whole(self, ids: Int64) -> None:
        """Raises RuntimeError if one of the samples `ids` cannot be decoded.

        Of a file that is cut, a window above the cut can be. Judged whole, a picture is bad or not whatever the epoch,
        the rank and the batch it is met in.
        """
        settings = replace(self._settings, geometry=replace(self._settings.geometry, random=False), augment=Augment())
        self._open(ids, np.zeros_like(ids), len(ids), guard=False, prefetch=1, settings=settings).next()

    def _undecodable(self, ids: Int64) -> list[int]:
        """Those of the samples `ids` that cannot be decoded, by halving: DALI does not say which of a batch it was."""
        try:
            self._decode_whole(ids)
        except RuntimeError:
            if len(ids) == 1:
                return ids.tolist()
            half = len(ids) // 2
            return self._undecodable(ids[:half]) + self._undecodable(ids[half:])
        return []

    def _set_aside(self, found: list[int], error: RuntimeError | None = None) -> None:
        """Note which pictures cannot be decoded, and stop when there are too many."""
        dataset = self._dataset
        if not found:
            assert error is not None
            raise error
        for i in found:
            # A disk that fails is not a bad picture: it raises OSError here, or gives fewer bytes.
            if len(dataset.image_bytes(i)) != dataset.image.size[i]:
                raise DataError(f"{dataset.where(i)}: wanted the shard that was opened, found one cut short")
        if not self._settings.train:
            raise DataError(
                f"{dataset.where(found[0])}: wanted an image, found one that cannot be decoded; remove the sample"
            )
        for i in found:
            log.warning("skipped an image that cannot be decoded: %s", dataset.where(i))
        self.bad = self.bad | set(found)
        self._judge()

    def _judge(self) -> None:
        """Stop when too many are bad."""
        dataset, limit = self._dataset, self._settings.max_bad_fraction
        # One of W ranks meets its share of the samples, 1/W in the first epoch, and of the bad ones roughly so: four
        # standard deviations more are chance.
        ranks = self._settings.world_size
        met = min(len(dataset), max(len(dataset) / ranks, self.met))
        allowed = limit * met + (4 * (limit * met) ** 0.5 if ranks > 1 else 0)
        if len(self.bad) > allowed:
            listed = "; ".join(dataset.where(i) for i in sorted(self.bad)[:20])
            raise DataError(
                f"{dataset.folder}: wanted at most {limit:.0%} undecodable images, "
                f"found {len(self.bad)} of {met:.0f}; build the data set again without them: {listed}"
            )
