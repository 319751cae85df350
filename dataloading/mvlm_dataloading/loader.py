"""The loader: shards in, batches of image-text pairs and their masks out, for ever and reproducibly.

Shape legend: B batch, S image side, T packed tokens.
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .batch import Batch, Masks
from .dataset import Dataset, image_identity, parse_captions, parse_metadata
from .errors import DataError
from .masking import check_mask_sizes, check_token_ratio, draw_patch_masks, draw_token_masks
from .order import Stream, substitute, write_index_views
from .pipeline import Decoding, Geometry, build_pipeline
from .randomness import Purpose, hash64, text_hash, uniforms
from .selftest import choose_decoding
from .tokenizer import Tokenizer, check_text_length

log = logging.getLogger(__name__)

Int64 = NDArray[np.int64]

# A reader is built for a part of the stream. The first is short, to begin at once; each next is twice as long,
# because to build one costs a little; and there is an end to it, so that the index has a bounded size however large
# the data set is.
_FIRST_SEGMENT_BATCHES = 16
_SEGMENT_SAMPLES = 32768


class Loader:
    """Batches of one split.

    In training (`train=True`) iteration never ends: every sample comes once an epoch, epochs follow one another, all
    batches are full, and each sample's crop, caption and masks are drawn from (seed, epoch, sample id). With
    `train=False` an iteration is one pass in order, over whole pictures and first captions, and its last batch may be
    smaller.

    Args:
        batch_size: samples of a global batch. Of each, rank r hands over rows r B/W to (r + 1) B/W, for W ranks.
        device: None for the CPU, "cuda" to decode and resize on the GPU. Images are there, all else is on the CPU.
        text_length: tokens of a caption at most, [CLS] and [SEP] counted.
        max_bad_fraction: undecodable pictures are replaced in training until more than this share of the split is bad.
        rank, world_size: which of how many processes this is. Together they see what one process would see.

    Attributes:
        step: batches handed over. epoch: the epoch of the next sample. skipped: undecodable pictures met so far.

    Raises:
        ValueError: sizes that do not fit each other.
        DataError: while iterating, for a sample that cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        image_size: int,
        text_length: int,
        seed: int,
        device: str | None = None,
        patch_size: int = 16,
        mask_block: int = 32,
        image_mask_ratio: float = 0.6,
        text_mask_ratio: float = 0.3,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        train: bool = True,
        num_threads: int = 2,
        max_bad_fraction: float = 0.05,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or num_threads < 1:
            raise ValueError(f"wanted batch_size and num_threads of at least 1, got {batch_size} and {num_threads}")
        if not 0 <= rank < world_size:
            raise ValueError(f"wanted a rank from 0 to world_size - 1, got rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(
                f"wanted a global batch_size that the ranks can share evenly, got {batch_size} for {world_size} ranks"
            )
        if world_size > 1 and not train:
            raise ValueError(f"wanted one rank for a pass in order, whose last batch is smaller, got {world_size}")
        if not 0 <= max_bad_fraction < 1:
            raise ValueError(f"wanted max_bad_fraction in [0, 1), got {max_bad_fraction}")
        check_mask_sizes(image_size, patch_size, mask_block, image_mask_ratio)
        check_token_ratio(text_mask_ratio)
        check_text_length(text_length)
        self.dataset, self.tokenizer, self.train = dataset, tokenizer, train
        self.batch_size, self.text_length, self.seed = batch_size, text_length, seed
        self.rank, self.world_size = rank, world_size
        self._rank_batch = batch_size // world_size
        self.step = 0
        self._patch_masks = {
            "image_size": image_size,
            "patch_size": patch_size,
            "mask_block": mask_block,
            "ratio": image_mask_ratio,
        }
        self._text_mask_ratio = text_mask_ratio
        self._max_bad_fraction = max_bad_fraction
        self._geometry = Geometry(image_size=image_size, crop_scale=crop_scale, crop_ratio=crop_ratio, random=train)
        self._num_threads = num_threads
        self._device_id, self._decoding = None, Decoding.CPU
        if device is not None and torch.device(device).type == "cuda":
            index = torch.device(device).index
            self._device_id = torch.cuda.current_device() if index is None else index
            self._decoding = choose_decoding(self._device_id)
        self._stream = Stream(dataset.shard, seed, shuffle=train)
        self._position = 0  # samples of the stream handed over
        self._bad: set[int] = set()
        self._segment: _Segment | None = None
        self._segment_batches = max(1, min(_FIRST_SEGMENT_BATCHES, _SEGMENT_SAMPLES // batch_size))

    @property
    def epoch(self) -> int:
        return self._position // len(self.dataset)

    @property
    def skipped(self) -> int:
        return len(self._bad)

    def __iter__(self) -> Iterator[tuple[Batch, Masks]]:
        if not self.train:
            self._seek(0)
        while self.train or self._position < len(self.dataset):
            yield self._next_batch()

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins: plain numbers and strings, for JSON. There is no other state."""
        epoch, position = divmod(self._position, len(self.dataset))
        return {
            "seed": self.seed,
            "epoch": epoch,
            "position": position,
            "step": self.step,
            "fingerprint": self.dataset.fingerprint,
            "batch_size": self.batch_size,
            "skipped": sorted(self._bad),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the batch that `state` was taken at, whatever the batch size and number of threads.

        The seed is the state's.

        Raises:
            DataError: the state belongs to other data.
        """
        if state["fingerprint"] != self.dataset.fingerprint:
            raise DataError(
                f"{self.dataset.folder}: wanted the data of the state, fingerprint {state['fingerprint']}, "
                f"found {self.dataset.fingerprint}; resume with that data or begin a new run"
            )
        if state["seed"] != self.seed:
            log.warning(
                "the data order goes on with the seed %d that it was begun with, not %d", state["seed"], self.seed
            )
            self.seed = state["seed"]
        self._stream = Stream(self.dataset.shard, self.seed, shuffle=self.train)
        self._bad = set(state["skipped"])
        self.step = state["step"]
        self._seek(state["epoch"] * len(self.dataset) + state["position"])

    def _seek(self, position: int) -> None:
        self._position, self._segment = position, None

    def _next_batch(self) -> tuple[Batch, Masks]:
        while True:
            if self._segment is None or self._segment.exhausted:
                self._segment = self._read_from(self._position)
            try:
                ids, epochs, images, encoded, texts, metadata = self._segment.next()
                break
            except RuntimeError as error:
                self._set_aside_bad(self._segment.current()[0], error)
                self._segment = None
        self._position += len(ids) * self.world_size
        self.step += 1
        return self._assemble(ids, epochs, images, encoded, texts, metadata)

    def _read_from(self, position: int) -> "_Segment":
        count = self._segment_batches * self.batch_size
        if 2 * count <= _SEGMENT_SAMPLES:
            self._segment_batches *= 2
        if not self.train:
            count = min(count, len(self.dataset) - position)
        ids, epochs = map(self._share, self._stream(position, count))
        for row in np.flatnonzero(np.isin(ids, list(self._bad))):
            ids[row] = substitute(self.seed, int(epochs[row]), int(ids[row]), len(self.dataset), self._bad)
        return self._open(ids, epochs, self._rank_batch)

    def _share(self, values: Int64) -> Int64:
        """This rank's rows of every global batch in a slice of the stream."""
        if self.world_size == 1:
            return values
        return values.reshape(-1, self.world_size, self._rank_batch)[:, self.rank].ravel()

    def _open(self, ids: Int64, epochs: Int64, batch_size: int, prefetch: int = 2) -> "_Segment":
        draws = uniforms(Purpose.CROP, self.seed, epochs, ids, 4)
        settings = {
            "num_threads": self._num_threads,
            "device_id": self._device_id,
            "decoding": self._decoding,
            "prefetch": prefetch,
        }
        return _Segment(self.dataset, ids, epochs, draws, self._geometry, batch_size, settings)

    def _set_aside_bad(self, ids: Int64, error: RuntimeError) -> None:
        """Note which pictures made a batch fail, and stop when there are too many."""
        found = self._undecodable(np.unique(ids))
        if not found:
            raise error
        for i in found:
            # A disk that fails is not a bad picture: it raises OSError here, or gives fewer bytes.
            if len(self.dataset.image_bytes(i)) != self.dataset.image.size[i]:
                raise DataError(f"{self.dataset.where(i)}: wanted the shard that was opened, found one cut short")
        if not self.train:
            raise DataError(
                f"{self.dataset.where(found[0])}: wanted an image, found one that cannot be decoded; remove the sample"
            )
        for i in found:
            log.warning("skipped an image that cannot be decoded: %s", self.dataset.where(i))
        self._bad.update(found)
        if len(self._bad) > self._max_bad_fraction * len(self.dataset):
            listed = "; ".join(self.dataset.where(i) for i in sorted(self._bad)[:20])
            raise DataError(
                f"{self.dataset.folder}: wanted at most {self._max_bad_fraction:.0%} undecodable images, "
                f"found {len(self._bad)} of {len(self.dataset)}; build the data set again without them: {listed}"
            )

    def _undecodable(self, ids: Int64) -> list[int]:
        """Those of the samples `ids` that cannot be decoded, by halving: DALI does not say which of a batch it was."""
        try:
            self._open(ids, np.zeros_like(ids), len(ids), prefetch=1).next()
        except RuntimeError:
            if len(ids) == 1:
                return ids.tolist()
            half = len(ids) // 2
            return self._undecodable(ids[:half]) + self._undecodable(ids[half:])
        return []

    def _assemble(self, ids, epochs, images, encoded, texts, metadata) -> tuple[Batch, Masks]:
        where = self.dataset.where
        choices = hash64(Purpose.CAPTION, self.seed, epochs, ids)
        captions, image_ids = [], []
        for row, i in enumerate(ids):
            known = parse_captions(texts[row], where(i))
            captions.append(known[int(choices[row]) % len(known) if self.train else 0])
            image_ids.append(image_identity(parse_metadata(metadata[row], where(i)), encoded[row]))
        tokens, lengths = self.tokenizer.encode(captions, self.text_length)  # (T,), (B,)
        if lengths.min() < 3:
            row = int(lengths.argmin())
            raise DataError(
                f"{where(ids[row])}: wanted a caption with a token, found {captions[row]!r}; use another tokenizer"
            )
        batch = Batch(
            images=images,
            tokens=torch.from_numpy(tokens),
            cu_seqlens=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)),
            max_length=int(lengths.max()),
            image_id=torch.tensor(image_ids, dtype=torch.int64),
            text_id=torch.tensor([text_hash(caption) for caption in captions], dtype=torch.int64),
            sample_id=torch.from_numpy(ids.copy()),
        )
        masks = Masks(
            patch_ids=torch.from_numpy(draw_patch_masks(self.seed, epochs, ids, **self._patch_masks)),
            token_ids=torch.from_numpy(draw_token_masks(self.seed, epochs, ids, lengths, ratio=self._text_mask_ratio)),
        )
        return batch, masks


class _Segment:
    """A DALI reader over known samples, and what it has delivered of them."""

    def __init__(
        self, dataset: Dataset, ids: Int64, epochs: Int64, draws, geometry: Geometry, batch_size: int, settings
    ):
        self._dataset, self._ids, self._epochs, self._batch_size = dataset, ids, epochs, batch_size
        self._begin = 0
        rows = np.arange(batch_size)
        # The reader begins anew after its last sample, also to fill up a last batch and to read ahead.
        with tempfile.TemporaryDirectory(prefix="mvlm-index-") as folder:
            tars, indices = write_index_views(Path(folder), dataset, ids)
            self._pipeline = build_pipeline(
                tars,
                indices,
                lambda batch: draws[(int(batch) * batch_size + rows) % len(ids)],
                geometry,
                batch_size=batch_size,
                **settings,
            )

    @property
    def exhausted(self) -> bool:
        return self._begin >= len(self._ids)

    def current(self) -> tuple[Int64, Int64]:
        """Sample ids and epochs of the next batch, (B,) or fewer."""
        rows = slice(self._begin, self._begin + self._batch_size)
        return self._ids[rows], self._epochs[rows]

    def next(self):
        """ids, epochs, images uint8 (B, 3, S, S), and lists of B bytes: encoded images, captions, metadata."""
        ids, epochs = self.current()
        images, encoded, texts, metadata, *_ = self._pipeline.run()
        for row, i in enumerate(ids):
            wanted = f"{self._dataset.tars[self._dataset.shard[i]]}:{self._dataset.text.offset[i]}:"
            delivered = texts[row].source_info()
            assert delivered.startswith(wanted), f"the reader was to deliver {wanted} and delivered {delivered}"
        self._begin += len(ids)
        pixels = torch.from_dlpack(images.as_tensor())[: len(ids)]
        return (
            ids,
            epochs,
            pixels,
            *([part.at(row).tobytes() for row in range(len(ids))] for part in (encoded, texts, metadata)),
        )
