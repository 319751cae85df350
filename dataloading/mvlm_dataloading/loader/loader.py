"""The loader: reads shards, and yields reproducible batches of image-text pairs with their masks.

Shape legend: B batch, S image side, T packed tokens.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mvlm_dataloading.batch import Batch, Masks
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.masking import Masking
from mvlm_dataloading.tokenizer import Tokenizer, check_text_length

from .augment import Augment
from .batches import Batches, Prefetcher
from .decoder_check import choose_device
from .device import hand_over
from .lanes import choose_lanes
from .masking import MaskDrawer
from .pixels import CropGeometry
from .reader import Progress, Reader
from .resume import ResumeReport, compare_states, lanes_of, package_versions, pixel_hash, text_hash
from .segment import RawBatch, ReaderConfig
from .text import CaptionReader, can_use_stored_tokens

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderWork:
    """Threads, memory and tolerance of a loader. No value changes a batch.

    Raises:
        ValueError: a number is out of its range.
    """

    num_threads: int = 2
    """Threads that decode and resize."""
    prefetch_batches: int = 2
    """Batches that a thread prepares in advance. 0 prepares each on request, without a thread."""
    keep_mb: int = 0
    """Megabytes (10^6) that decoded images may take in memory. A split that fits is decoded once, before the first
    training batch, and no longer in every epoch. For local data on a CPU. 0 keeps none."""
    max_bad_fraction: float = 0.05
    """Maximum share of undecodable images. Training replaces them, and stops when there are more. The share is of the
    larger of two numbers: a rank's part of the split, and the samples that it has read."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_threads", self.num_threads, 1),
            ("prefetch_batches", self.prefetch_batches, 0),
            ("keep_mb", self.keep_mb, 0),
        ):
            if value < least:
                raise ValueError(f"wanted {name} of at least {least}, got {value}")
        if not 0 <= self.max_bad_fraction < 1:
            raise ValueError(f"wanted max_bad_fraction in [0, 1), got {self.max_bad_fraction}")


class Loader:
    """Batches of one split.

    With `train=True`, iteration is endless. Each epoch contains every sample once, and all batches are full. The crop,
    caption and masks of a sample are a function of (seed, epoch, sample id).

    With `train=False`, an iteration is one pass in stored order, over uncropped images and their first captions. Its
    last batch may be smaller.

    Args:
        batch_size: samples of a global batch, over all ranks. Rank r of W yields B/W of its rows, from r B/W.
        device: "cuda" decodes and resizes on the GPU, and yields images there. None works on the CPU. All other
            tensors are on the CPU.
        text_length: maximum tokens of a caption, including [CLS] and [SEP].
        masking: what is masked of images and captions (`mvlm_dataloading.loader.masking` draws the masks).
        rank, world_size: rank of this process, and number of ranks. All ranks together yield the batches that a single
            process would yield.
        crop_scale: smallest and largest share of an image's area that a random crop keeps.
        augment: augmentations of training images, the shape of their crops, and the images that a stored one holds.
        work: threads, memory and tolerance.
        per_image: yield each image and each caption of a batch once (`Batch.image_of`), with so many samples of one
            image one after another in the sample order. The samples of an image have the same crop in an epoch. None
            yields an image and a caption for each sample.
        microbatches: batches that make a step. The lanes of linked data are divided among the ranks in all of them
            (`mvlm_dataloading.loader.lanes`).

    Attributes:
        step: batches yielded.
        epoch: epoch of the next sample.
        skipped: number of undecodable images found so far.
        resumed: report of the last `load_state_dict`, or None.
        stored_tokens: True if the token ids stored with the data are used.

    Raises:
        ValueError: an argument is out of range, or two arguments contradict each other.
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
        masking: Masking | None = None,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        train: bool = True,
        rank: int = 0,
        world_size: int = 1,
        augment: Augment | None = None,
        work: LoaderWork | None = None,
        per_image: int | None = None,
        microbatches: int = 1,
    ):
        if batch_size < 1:
            raise ValueError(f"wanted batch_size of at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"wanted a rank from 0 to world_size - 1, got rank {rank} of {world_size}")
        if batch_size % world_size:
            raise ValueError(
                f"wanted a global batch_size divisible by world_size, got {batch_size} for {world_size} ranks"
            )
        if world_size > 1 and not train:
            raise ValueError(f"wanted world_size 1 with train=False, got {world_size}; run evaluation on one rank")
        augment, work = augment or Augment(), work or LoaderWork()
        self.masking = masking or Masking()
        self.masking.check_image_size(image_size)
        check_text_length(text_length)
        if per_image is not None and per_image < 1:
            raise ValueError(f"wanted per_image of at least 1, or None, got {per_image}")
        if microbatches < 1:
            raise ValueError(f"wanted microbatches of at least 1, got {microbatches}")
        self.dataset, self.tokenizer, self.train = dataset, tokenizer, train
        self.batch_size, self.text_length = batch_size, text_length
        self.rank, self.world_size = rank, world_size
        self.step = 0
        self.resumed: ResumeReport | None = None
        self.stored_tokens = can_use_stored_tokens(dataset, tokenizer, text_length)
        self._prefetch_batches = work.prefetch_batches
        geometry = CropGeometry(
            image_size=image_size,
            crop_scale=crop_scale,
            crop_ratio=augment.crop_ratio,
            random=train,
            strip=augment.strip,
        )
        device_id, decoding = choose_device(device)
        self._config = ReaderConfig(
            seed=seed,
            geometry=geometry,
            augment=augment,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            train=train,
            stored_tokens=self.stored_tokens,
            num_threads=work.num_threads,
            device_id=device_id,
            decoding=decoding,
            max_bad_fraction=work.max_bad_fraction,
            keep_bytes=1_000_000 * work.keep_mb,
            lanes=choose_lanes(dataset, world_size * microbatches, batch_size * microbatches, per_image or 1)
            if train
            else None,
            images=None if per_image is None else dataset.first_of_image(),
            per_image=per_image or 1,
        )
        self._progress = Progress()  # after the batches yielded. Prefetched batches do not count.
        self._stream: Prefetcher[tuple[Batch, Masks, Progress]] | None = None

    @property
    def seed(self) -> int:
        return self._config.seed

    @property
    def epoch(self) -> int:
        return self._progress.position // len(self.dataset)

    @property
    def skipped(self) -> int:
        return len(self._progress.bad)

    def __iter__(self) -> Iterator[tuple[Batch, Masks]]:
        if not self.train:
            self._seek(0)
        while True:
            if self._stream is None:
                self._stream = self._open_stream()
            loaded = self._stream.get()
            if loaded is None:
                self.close()
                return
            batch, masks, self._progress = loaded
            self.step += 1
            hand_over(batch.images)
            yield batch, masks

    def raw_batches(self) -> Iterator[RawBatch]:
        """Images, captions and metadata of one pass as stored, without tokens and masks. For `train=False`."""
        reader = Reader(self.dataset, self._config, Progress())
        stream = Prefetcher(reader.next, max(1, self._prefetch_batches), reader.close)
        try:
            while (raw := stream.get()) is not None:
                hand_over(raw.images)
                yield raw
        finally:
            stream.close()

    def resize(self, image_size: int, masking: Masking) -> None:
        """Go on with images of another side and with other masks, at the same place of the sample order.

        Batches that were prepared in advance are dropped and made again. ValueError for a masking that does not fit.
        """
        masking.check_image_size(image_size)
        self.close()
        self.masking = masking
        self._config = replace(self._config, geometry=replace(self._config.geometry, image_size=image_size))

    def close(self) -> None:
        """Stop the thread and release the data. Another iteration continues after the last batch yielded."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def state_dict(self) -> dict[str, Any]:
        """State after the last batch yielded, as plain values for JSON. Prefetched batches do not count."""
        epoch, position = divmod(self._progress.position, len(self.dataset))
        shared = self._config.images is not None
        text = text_hash(
            self.tokenizer.fingerprint, self.text_length, self.masking, self._config.geometry.image_size, shared
        )
        return {
            "seed": self.seed,
            "epoch": epoch,
            "position": position,
            "step": self.step,
            "fingerprint": self.dataset.fingerprint,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "skipped": sorted(self._progress.bad),
            "met": self._progress.samples_seen,
            "order": 1 if self._config.lanes is None else 2,
            "pictures": pixel_hash(self._config),
            "text": text,
            "versions": package_versions(),
            **({"per_image": self._config.per_image} if self._config.per_image > 1 else {}),
            **({} if self._config.lanes is None else {"lanes": list(self._config.lanes)}),
        }

    def load_state_dict(self, state: dict[str, Any], *, other_data: bool = False) -> None:
        """Resume at the first sample after the state, at any batch size and number of ranks.

        The state's seed and lanes replace this loader's. `resumed` and the log say which of samples, pixels, captions
        and masks equal those of an uninterrupted run.

        Args:
            other_data: accept a state of other data. The loader resumes at the same position of its own sample order.

        Raises:
            DataError: the state belongs to other data, or is not a loader's state.
        """
        self.resumed = compare_states(state, self.state_dict(), folder=self.dataset.folder, other_data=other_data)
        log.log(logging.WARNING if self.resumed.changed else logging.INFO, "data resumed: %s", self.resumed)
        if state["seed"] != self.seed:
            log.warning("the data order keeps the seed %d of the resumed run; %d is ignored", state["seed"], self.seed)
            self._config = replace(self._config, seed=state["seed"])
        same_data = state["fingerprint"] == self.dataset.fingerprint
        if self.train and same_data:
            lanes = lanes_of(state)
            if lanes is not None and self._config.lanes is None:
                raise DataError(
                    f"{self.dataset.folder}: wanted a state of sample order 1, found one of order 2, which linked data "
                    "alone have; use the run's own state"
                )
            self._config = replace(self._config, lanes=lanes)
        bad, samples_seen = (frozenset(state["skipped"]), state["met"]) if same_data else (frozenset(), 0)
        self._progress = Progress(0, bad, samples_seen)
        self.step = state["step"]
        self._seek(state["epoch"] * len(self.dataset) + min(state["position"], len(self.dataset) - 1))

    def _seek(self, position: int) -> None:
        self.close()
        self._progress = self._progress._replace(position=position)

    def _open_stream(self) -> "Prefetcher[tuple[Batch, Masks, Progress]]":
        config = self._config
        batches = Batches(
            reader := Reader(self.dataset, config, self._progress),
            CaptionReader(
                self.dataset,
                self.tokenizer,
                self.text_length,
                config.seed,
                first=not config.train,
                stored=config.stored_tokens,
            ),
            MaskDrawer(self.masking, config.geometry.image_size, self.tokenizer, config.seed),
        )
        return Prefetcher(batches.next, self._prefetch_batches, reader.close)
