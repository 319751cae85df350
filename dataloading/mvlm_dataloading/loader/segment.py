"""A part of the stream: one DALI pipeline over known samples, with what is done to each decided beforehand.

Shape legend: B samples of this rank's batch, S image side.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.randomness import Purpose, uniforms

from .augment import Augment, draw
from .buffers import Pages
from .crop import Geometry
from .pipeline import Decoding, build_pipeline
from .sampler import write_index_views


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a reader does with samples: all that a picture's pixels depend on besides the sample, and the machine."""

    seed: int
    geometry: Geometry
    augment: Augment
    batch_size: int
    """Samples of a global batch."""
    rank: int
    world_size: int
    train: bool
    stored_tokens: bool
    """Whether to read the component `tok`."""
    num_threads: int
    device_id: int | None
    decoding: Decoding
    max_bad_fraction: float

    @property
    def rank_batch(self) -> int:
        """Samples of this rank in a batch."""
        return self.batch_size // self.world_size


@dataclass(slots=True)
class Rows:
    """One rank's samples of one batch."""

    ids: Int64
    epochs: Int64
    images: Tensor
    """uint8 (B, 3, S, S)."""
    texts: list[bytes]
    metadata: list[bytes]
    tokens: list[bytes]
    encoded: Callable[[int], bytes]
    """The encoded image of a row: not copied unless it is asked for, which is before the next batch is."""


class Segment:
    """A DALI pipeline over known samples, and what it has delivered of them."""

    def __init__(
        self,
        dataset: Dataset,
        ids: Int64,
        epochs: Int64,
        settings: Settings,
        batch_size: int,
        pages: Pages,
        *,
        guard: bool,
        prefetch: int,
    ):
        self._dataset, self._ids, self._epochs, self._batch_size = dataset, ids, epochs, batch_size
        self._pages, self._tokens = pages, settings.stored_tokens
        self._begin = 0
        # What is drawn for all samples; a dict, as the pipeline's functions hold on to it and `close` empties it.
        tables: dict[str, Any] = {"windows": uniforms(Purpose.CROP, settings.seed, epochs, ids, 4)}
        if settings.train and not settings.augment.nothing:
            side = settings.geometry.image_size
            tables["drawn"] = draw(settings.augment, settings.seed, epochs, ids, side)
        self._tables, count = tables, len(ids)

        def rows(batch: Any) -> Int64:
            # The reader begins anew after its last sample, also to fill up a last batch and to read ahead.
            return (int(batch) * batch_size + np.arange(batch_size)) % count

        with tempfile.TemporaryDirectory(prefix="mvlm-index-") as folder:
            self._pipeline = build_pipeline(
                *write_index_views(Path(folder), dataset, ids),
                lambda batch: tables["windows"][rows(batch)],
                settings.geometry,
                batch_size=batch_size,
                num_threads=settings.num_threads,
                device_id=settings.device_id,
                decoding=settings.decoding,
                prefetch=prefetch,
                drawn=(lambda batch: tables["drawn"].rows(rows(batch))) if "drawn" in tables else None,
                tokens=settings.stored_tokens,
                guard=guard,
            )

    def close(self) -> None:
        """Let go of memory. A pipeline is in reference cycles: left alone it waits for the garbage collector."""
        self._pipeline.__del__()
        self._tables.clear()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def exhausted(self) -> bool:
        return self._begin >= len(self._ids)

    def current(self) -> tuple[Int64, Int64]:
        """Sample ids and epochs of the next batch, (B,) or fewer."""
        rows = slice(self._begin, self._begin + self._batch_size)
        return self._ids[rows].copy(), self._epochs[rows]

    def next(self) -> tuple[Rows, np.ndarray]:
        """The next batch, and which of its rows, bool (B,), are the decoder's: the others have to be filled in."""
        ids, epochs = self.current()
        images, encoded, texts, metadata, tokens, fine, *_ = self._pipeline.run()
        for row, i in enumerate(ids):
            wanted = f"{self._dataset.tars[self._dataset.shard[i]]}:{self._dataset.text.offset[i]}:"
            delivered = texts[row].source_info()
            assert delivered.startswith(wanted), f"the reader was to deliver {wanted} and delivered {delivered}"
        self._begin += len(ids)
        pixels = torch.from_dlpack(images.as_tensor())[: len(ids)]
        rows = Rows(
            ids=ids,
            epochs=epochs,
            images=pixels if pixels.is_cuda else self._pages.copy(pixels),  # DALI fills its own with the next batch
            texts=[texts.at(row).tobytes() for row in range(len(ids))],
            metadata=[metadata.at(row).tobytes() for row in range(len(ids))],
            tokens=[tokens.at(row).tobytes() if self._tokens else b"" for row in range(len(ids))],
            encoded=lambda row: encoded.at(row).tobytes(),
        )
        return rows, np.array(fine.as_tensor())[: len(ids)].astype(bool)
