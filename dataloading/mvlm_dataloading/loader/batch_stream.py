"""Stream of complete batches: images from the reader, tokenized captions, and masks. May run on a background thread."""

import atexit
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mvlm_dataloading.batch import Batch, Masks
from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.masking import Masking
from mvlm_dataloading.tokenizer import Tokenizer

from .buffers import copy_on_this_thread
from .masking import draw_patch_masks, draw_variable_patch_masks, draw_weighted_token_masks
from .prefetch import Prefetcher
from .reader import Reader
from .segment import RawBatch
from .text import CaptionBatch, CaptionReader


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """A batch, and the reader's progress after it. The loader takes over the progress when it yields the batch."""

    batch: Batch
    masks: Masks
    position: int
    """Position in the sample order after this batch, over all ranks."""
    bad: frozenset[int]
    """Ids of the undecodable images found so far."""
    samples_seen: int
    """Number of samples read when `bad` was counted."""


class MaskDrawer:
    """Draws the masks of batches.

    Args:
        masking: what is masked of images of the side `image_size`.
        tokenizer: tells the words of captions.
        seed: of the draws.
    """

    def __init__(self, masking: Masking, image_size: int, tokenizer: Tokenizer, seed: int) -> None:
        self._masking, self._image_size, self._seed = masking, image_size, seed
        self._word_starts = tokenizer.word_starts() if masking.whole_word_masking else None
        """True for each token of the vocabulary that starts a word, (V,); None to mask tokens one by one."""

    def patches(self, epochs: Any, ids: Any) -> dict[str, np.ndarray]:
        """Masked patches of images, fields of `Masks`."""
        sizes = {"image_size": self._image_size, "masking": self._masking}
        if self._masking.image_masking == "fixed":
            return {"patch_ids": draw_patch_masks(self._seed, epochs, ids, **sizes)}
        patch_ids, weights = draw_variable_patch_masks(self._seed, epochs, ids, **sizes)
        return {"patch_ids": patch_ids, "patch_weights": weights}

    def tokens(self, epochs: Any, ids: Any, tokens: np.ndarray, lengths: np.ndarray) -> dict[str, np.ndarray]:
        """Masked ones of the packed `tokens` of captions of these lengths, fields of `Masks`."""
        kind = self._masking.text_masking
        ratio = self._masking.text_mask_ratio if kind == "fixed" else None
        starts = None if self._word_starts is None else self._word_starts[tokens]
        masked = draw_weighted_token_masks(self._seed, epochs, ids, lengths, ratio=ratio, starts=starts)
        return {"token_ids": masked.ids} | ({"token_weights": masked.weights} if kind == "variable" else {})


def raw_batches(reader: Reader, prefetch_batches: int) -> Iterator[RawBatch]:
    """Batches of a reader as they are read, by a thread that is `prefetch_batches` (at least 1) ahead."""
    stream = Prefetcher(reader.next, prefetch_batches, reader.close)
    atexit.register(stream.close)  # no pipeline may be running while DALI is unloaded
    try:
        while (raw := stream.get()) is not None:
            yield raw
    finally:
        stream.close()
        atexit.unregister(stream.close)


class BatchStream:
    """Stream of batches that starts at the reader's position.

    It holds no reference to its loader, so the garbage collector can free an unused loader while the thread works.

    Args:
        pin: put host tensors into pinned memory, for copies to a GPU.
        prefetch_batches: number of batches that a thread prepares in advance. 0 prepares each on request, without a
            thread.
        images: first sample of each sample's image (N,), to yield each image and caption of a batch once; or None.
    """

    def __init__(
        self,
        reader: Reader,
        captions: CaptionReader,
        masks: MaskDrawer,
        *,
        pin: bool,
        prefetch_batches: int,
        images: Int64 | None = None,
    ):
        self._reader, self._captions, self._masks, self._pin = reader, captions, masks, pin
        self._images = images
        self._prefetcher = Prefetcher(self._load, prefetch_batches, reader.close) if prefetch_batches else None

    def get(self) -> LoadedBatch | None:
        """The next batch; None at the end of a pass."""
        return self._load() if self._prefetcher is None else self._prefetcher.get()

    def close(self) -> None:
        """Stop the thread and close the reader."""
        if self._prefetcher is None:
            self._reader.close()
        else:
            self._prefetcher.close()

    def _load(self) -> LoadedBatch | None:
        raw = self._reader.next()
        if raw is None:
            return None
        batch, masks = self._assemble(raw)
        return LoadedBatch(batch, masks, self._reader.position, self._reader.bad, self._reader.samples_seen)

    def _assemble(self, raw: RawBatch) -> tuple[Batch, Masks]:
        captions = self._captions(raw)
        if self._images is not None:
            return self._assemble_shared(raw, captions, self._images)
        batch = Batch(
            images=raw.images,
            tokens=self._host_tensor(captions.tokens),
            cu_seqlens=self._host_tensor(np.concatenate([[0], np.cumsum(captions.lengths)]).astype(np.int32)),
            max_length=int(captions.lengths.max()),
            image_id=self._host_tensor(np.array(captions.image_id, np.int64)),
            text_id=self._host_tensor(np.array(captions.text_id, np.int64)),
            sample_id=self._host_tensor(raw.ids),
        )
        patches = self._masks.patches(raw.epochs, raw.ids)
        tokens = self._masks.tokens(raw.epochs, raw.ids, captions.tokens, captions.lengths)
        return batch, self._host_masks(patches | tokens)

    def _assemble_shared(self, raw: RawBatch, captions: CaptionBatch, images: Int64) -> tuple[Batch, Masks]:
        """A batch that has each image and each caption once, and masks of these.

        Masks are functions of epoch and image, or caption, not of the sample that comes first in this batch: they are
        the same on any number of ranks.
        """
        # In another epoch an image has another crop.
        _, of_image, image_of = np.unique(
            np.stack([raw.epochs, images[raw.ids]]), axis=1, return_index=True, return_inverse=True
        )
        texts = np.array(captions.text_id, np.int64)
        _, of_caption, caption_of = np.unique(
            np.stack([raw.epochs, texts]), axis=1, return_index=True, return_inverse=True
        )
        parts = np.split(captions.tokens, np.cumsum(captions.lengths)[:-1])
        lengths = captions.lengths[of_caption]
        packed = np.concatenate([parts[row] for row in of_caption])
        rows = self._host_tensor(of_image).to(raw.images.device, non_blocking=True)
        batch = Batch(
            images=raw.images.index_select(0, rows),
            tokens=self._host_tensor(packed),
            cu_seqlens=self._host_tensor(np.cumsum([0, *lengths]).astype(np.int32)),
            max_length=int(lengths.max()),
            image_id=self._host_tensor(np.array(captions.image_id, np.int64)),
            text_id=self._host_tensor(texts),
            sample_id=self._host_tensor(raw.ids),
            image_of=self._host_tensor(image_of.reshape(-1)),
            caption_of=self._host_tensor(caption_of.reshape(-1)),
            sample_tokens=len(captions.tokens),
        )
        patches = self._masks.patches(raw.epochs[of_image], images[raw.ids[of_image]])
        tokens = self._masks.tokens(raw.epochs[of_caption], texts[of_caption], packed, lengths)
        return batch, self._host_masks(patches | tokens)

    def _host_masks(self, found: dict[str, np.ndarray]) -> Masks:
        return Masks(**{name: self._host_tensor(values) for name, values in found.items()})

    def _host_tensor(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        if not self._pin:
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy_on_this_thread(pinned, tensor)
        return pinned
