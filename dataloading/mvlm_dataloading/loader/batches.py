"""Complete batches: images of the reader, tokenized captions, and masks. A thread may prepare them in advance."""

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from mvlm_dataloading.batch import Batch, Masks

from .device import working
from .masking import MaskDrawer
from .pixels import copy_on_this_thread
from .reader import Progress, Reader
from .segment import RawBatch
from .text import CaptionBatch, CaptionReader

T = TypeVar("T")


class Batches:
    """Makes complete batches, from the current position of a `Reader` on.

    It holds no reference to its loader, so the garbage collector can free an unused loader while a thread works here.
    """

    def __init__(self, reader: Reader, captions: CaptionReader, masks: MaskDrawer) -> None:
        self._reader, self._captions, self._masks = reader, captions, masks
        self._pin = reader.config.device_id is not None  # for copies to the GPU

    def next(self) -> tuple[Batch, Masks, Progress] | None:
        """The next batch, and the progress after it; None at the end of a pass."""
        raw = self._reader.next()
        if raw is None:
            return None
        captions = self._captions(raw)
        make = self._each_sample if self._reader.config.images is None else self._each_image_once
        return *make(raw, captions), self._reader.progress

    def _each_sample(self, raw: RawBatch, captions: CaptionBatch) -> tuple[Batch, Masks]:
        batch = self._batch(raw, captions, captions.tokens, captions.lengths)
        return batch, self._drawn(raw.epochs, raw.ids, raw.epochs, raw.ids, captions.tokens, captions.lengths)

    def _each_image_once(self, raw: RawBatch, captions: CaptionBatch) -> tuple[Batch, Masks]:
        """A batch that has each image and each caption once, and masks of these.

        Masks are functions of epoch and image, or caption, not of the sample that comes first in this batch: they are
        the same on any number of ranks.
        """
        assert self._reader.config.images is not None
        images, texts = self._reader.config.images[raw.ids], np.array(captions.text_id, np.int64)
        # In another epoch an image has another crop.
        (_, of_image, image_of), (_, of_caption, caption_of) = (
            np.unique(np.stack([raw.epochs, values]), axis=1, return_index=True, return_inverse=True)
            for values in (images, texts)
        )
        parts = np.split(captions.tokens, np.cumsum(captions.lengths)[:-1])
        lengths, tokens = captions.lengths[of_caption], np.concatenate([parts[row] for row in of_caption])
        device = raw.images.device
        with working(device):
            distinct = raw.images.index_select(0, self._host_tensor(of_image).to(device, non_blocking=True))
        batch = self._batch(
            raw,
            captions,
            tokens,
            lengths,
            images=distinct,
            image_of=self._host_tensor(image_of.reshape(-1)),
            caption_of=self._host_tensor(caption_of.reshape(-1)),
            sample_tokens=len(captions.tokens),
        )
        of_images, of_captions = (raw.epochs[of_image], images[of_image]), (raw.epochs[of_caption], texts[of_caption])
        return batch, self._drawn(*of_images, *of_captions, tokens, lengths)

    def _batch(
        self, raw: RawBatch, captions: CaptionBatch, tokens: np.ndarray, lengths: np.ndarray, **others: Any
    ) -> Batch:
        fields = {
            "images": raw.images,
            "tokens": self._host_tensor(tokens),
            "cu_seqlens": self._host_tensor(np.append(0, np.cumsum(lengths)).astype(np.int32)),
            "max_length": int(lengths.max()),
            "image_id": self._host_tensor(np.array(captions.image_id, np.int64)),
            "text_id": self._host_tensor(np.array(captions.text_id, np.int64)),
            "sample_id": self._host_tensor(raw.ids),
            "epoch": self._host_tensor(raw.epochs),
        }
        return Batch(**fields | others)

    def _drawn(self, *arguments: np.ndarray) -> Masks:
        drawn = self._masks(*arguments)
        return Masks(**{name: self._host_tensor(values) for name, values in drawn.items()})

    def _host_tensor(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if not self._pin:
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy_on_this_thread(pinned, tensor)
        return pinned


class Prefetcher(Generic[T]):
    """Gives the results of `make` in order, by `get`. A thread makes up to `depth` of them in advance; no thread for 0.

    The thread ends when `make` raises or returns None. After all earlier results, `get` then raises the exception or
    returns None. It also ends when nothing refers to this object any more, and at the interpreter's exit: no pipeline
    may be running while DALI is unloaded.

    Args:
        done: called once at the end, by the thread if there is one.

    Attributes:
        close: function that ends the thread after the result that it is making, and waits for it.
    """

    def __init__(self, make: Callable[[], T | None], depth: int, done: Callable[[], None]):
        self._make, self._depth = make, depth
        self._ended: tuple[T | None, BaseException | None] | None = None
        if not depth:
            self.close = weakref.finalize(self, done)
            return
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._room, stop = threading.Semaphore(depth), threading.Event()
        # Without a reference to this object, which would not be collected then.
        arguments = make, done, self._results, self._room, stop
        self._thread = threading.Thread(target=_make_all, args=arguments, name="mvlm-loader", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, _end, self._thread, self._room, stop)

    def get(self) -> T | None:
        """The next result. After the end of the thread, every call gives None or raises the same exception."""
        if not self._depth:
            return self._make()
        if self._ended is None:
            result, error = self._results.get()
            if result is not None:
                self._room.release()
                return result
            self._ended = (result, error)
            self._thread.join()
        if self._ended[1] is not None:
            raise self._ended[1]
        return None


def _end(thread: threading.Thread, room: threading.Semaphore, stop: threading.Event) -> None:
    stop.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join()


def _make_all(
    make: Callable[[], T | None],
    done: Callable[[], None],
    results: "queue.Queue[tuple[T | None, BaseException | None]]",
    room: threading.Semaphore,
    stop: threading.Event,
) -> None:
    last: BaseException | None = None
    try:
        while room.acquire() and not stop.is_set():
            result = make()
            if result is None:
                break
            results.put((result, None))
            del result  # while it waits, the thread must not keep the result alive
    except BaseException as error:
        last = error
    finally:
        try:
            done()
        except BaseException as error:
            last = last or error
        # NOTE: the end is put in any case. Without it `get` would wait for ever.
        results.put((None, last))
