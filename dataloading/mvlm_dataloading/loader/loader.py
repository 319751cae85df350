"""The loader: shards in, batches of image-text pairs and their masks out, for ever and reproducibly.

Shape legend: B batch, S image side, T packed tokens.
"""

import logging
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mvlm_dataloading.batch import Batch, Masks
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.tokenizer import Tokenizer, check_text_length

from .augment import Augment
from .buffers import copy_on_this_thread
from .crop import Geometry
from .decoder_check import choose_decoding
from .masking import check_mask_sizes, check_token_ratio, draw_patch_masks, draw_token_masks
from .pipeline import Decoding
from .prefetch import Ahead
from .reader import Reader
from .resume import Resumed, compare, hash_of, pictures_of, versions
from .sampler import ORDER_VERSION
from .segment import Rows, Settings
from .text import Captions, stored_tokens_fit

log = logging.getLogger(__name__)

# A batch, its masks, the position of the stream after it, the bad pictures known when it was made, and among how many.
_Made = tuple[Batch, Masks, int, frozenset[int], int]


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
        augment: what is done to pictures in training besides their random windows.
        ahead: batches that a thread makes before they are asked for; 0 makes each when it is asked for, with no thread.

    Attributes:
        step: batches handed over. epoch: the epoch of the next sample. skipped: undecodable pictures met so far.
        resumed: what `load_state_dict` went on with; None before.
        stored_tokens: whether captions come as the tokens stored with the data.

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
        augment: Augment | None = None,
        ahead: int = 2,
    ):
        if batch_size < 1 or num_threads < 1:
            raise ValueError(f"wanted batch_size and num_threads of at least 1, got {batch_size} and {num_threads}")
        if ahead < 0:
            raise ValueError(f"wanted ahead of at least 0, got {ahead}")
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
        self.batch_size, self.text_length = batch_size, text_length
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self.resumed: Resumed | None = None
        self.stored_tokens = stored_tokens_fit(dataset, tokenizer, text_length)
        self._patch_masks = {
            "image_size": image_size,
            "patch_size": patch_size,
            "mask_block": mask_block,
            "ratio": image_mask_ratio,
        }
        self._text_mask_ratio = text_mask_ratio
        device_id, decoding = None, Decoding.CPU
        geometry = Geometry(image_size=image_size, crop_scale=crop_scale, crop_ratio=crop_ratio, random=train)
        if device is not None and torch.device(device).type == "cuda":
            index = torch.device(device).index
            device_id = torch.cuda.current_device() if index is None else index
            decoding = choose_decoding(device_id)
        self._settings = Settings(
            seed=seed,
            geometry=geometry,
            augment=augment or Augment(),
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            train=train,
            stored_tokens=self.stored_tokens,
            num_threads=num_threads,
            device_id=device_id,
            decoding=decoding,
            max_bad_fraction=max_bad_fraction,
        )
        self._depth = ahead
        self._position = 0  # samples of the stream handed over, those of all ranks
        self._bad: frozenset[int] = frozenset()
        self._met = 0  # samples among which these were found
        self._source: _Source | None = None

    @property
    def seed(self) -> int:
        return self._settings.seed

    @property
    def epoch(self) -> int:
        return self._position // len(self.dataset)

    @property
    def skipped(self) -> int:
        return len(self._bad)

    def __iter__(self) -> Iterator[tuple[Batch, Masks]]:
        if not self.train:
            self._seek(0)
        while True:
            if self._source is None:
                self._source = _Source(self, self._depth)
            made = self._source.get()
            if made is None:
                self.close()
                return
            batch, masks, self._position, self._bad, self._met = made
            self.step += 1
            yield batch, masks

    def close(self) -> None:
        """End the thread and let go of the data. Iterating goes on from where it was."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch to be handed over begins: plain values, for JSON. What was made ahead does not count."""
        epoch, position = divmod(self._position, len(self.dataset))
        return {
            "seed": self.seed,
            "epoch": epoch,
            "position": position,
            "step": self.step,
            "fingerprint": self.dataset.fingerprint,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "skipped": sorted(self._bad),
            "met": self._met,
            "order": ORDER_VERSION,
            "pictures": pictures_of(self._settings),
            "text": hash_of(
                {
                    "tokenizer": self.tokenizer.fingerprint,
                    "length": self.text_length,
                    "ratio": self._text_mask_ratio,
                    "patches": self._patch_masks,
                }
            ),
            "versions": versions(),
        }

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        """Continue with the sample after those that `state` was taken at, whatever the batch size and number of ranks.

        The seed is the state's. `resumed` and the log say whether pixels, captions and masks are those of a run that
        was not interrupted, or just the samples.

        Args:
            other_data: go on even if the data are not those of the state, from the same place in this data's epoch.

        Raises:
            DataError: the state belongs to other data, or is none.
        """
        self.resumed = compare(state, self.state_dict(), folder=self.dataset.folder, other_data=other_data)
        log.log(logging.WARNING if self.resumed.changed else logging.INFO, "the data go on with %s", self.resumed)
        if state["seed"] != self.seed:
            log.warning(
                "the data order goes on with the seed %d that it was begun with, not %d", state["seed"], self.seed
            )
            self._settings = replace(self._settings, seed=state["seed"])
        same_data = state["fingerprint"] == self.dataset.fingerprint
        self._bad = frozenset(state["skipped"] if same_data else ())
        self._met = state["met"] if same_data else 0
        self.step = state["step"]
        self._seek(state["epoch"] * len(self.dataset) + min(state["position"], len(self.dataset) - 1))

    def _seek(self, position: int) -> None:
        self.close()
        self._position = position


class _Source:
    """Batches from a loader's position on. Knows nothing of the loader, which can so be forgotten while this works."""

    def __init__(self, loader: Loader, depth: int):
        settings = loader._settings
        self._reader = Reader(loader.dataset, settings, loader._position, loader._bad, loader._met)
        self._captions = Captions(
            loader.dataset,
            loader.tokenizer,
            loader.text_length,
            settings.seed,
            first=not settings.train,
            stored=settings.stored_tokens,
        )
        self._seed, self._pin = settings.seed, settings.device_id is not None
        self._patch_masks, self._text_mask_ratio = loader._patch_masks, loader._text_mask_ratio
        self._ahead = Ahead(self._make, depth, self._reader.close) if depth else None
        # Also at the interpreter's end: a pipeline must not be at work while DALI is unloaded.
        self._finish = weakref.finalize(loader, self.close)

    def get(self) -> _Made | None:
        """The next batch; None at the end of a pass."""
        return self._make() if self._ahead is None else self._ahead.get()

    def close(self) -> None:
        self._finish.detach()
        if self._ahead is None:
            self._reader.close()
        else:
            self._ahead.close()

    def _make(self) -> _Made | None:
        rows = self._reader.next()
        if rows is None:
            return None
        batch, masks = self._assemble(rows)
        return batch, masks, self._reader.position, self._reader.bad, self._reader.met

    def _assemble(self, rows: Rows) -> tuple[Batch, Masks]:
        words = self._captions(rows)
        batch = Batch(
            images=rows.images,
            tokens=self._host(words.tokens),
            cu_seqlens=self._host(np.concatenate([[0], np.cumsum(words.lengths)]).astype(np.int32)),
            max_length=int(words.lengths.max()),
            image_id=self._host(np.array(words.image_id, np.int64)),
            text_id=self._host(np.array(words.text_id, np.int64)),
            sample_id=self._host(rows.ids),
        )
        at = (self._seed, rows.epochs, rows.ids)
        masks = Masks(
            patch_ids=self._host(draw_patch_masks(*at, **self._patch_masks)),
            token_ids=self._host(draw_token_masks(*at, words.lengths, ratio=self._text_mask_ratio)),
        )
        return batch, masks

    def _host(self, values: np.ndarray) -> torch.Tensor:
        """A tensor on the CPU, in pinned memory where it is to be copied to a GPU."""
        tensor = torch.from_numpy(values)
        if not self._pin:
            return tensor
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy_on_this_thread(pinned, tensor)
        return pinned
