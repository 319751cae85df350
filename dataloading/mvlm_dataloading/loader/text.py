"""Captions of a batch: one per image, from stored tokens or tokenized here.

Shape legend: B batch, T packed tokens.
"""

import logging
from dataclasses import dataclass

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import Dataset, image_identity, parse_captions, parse_metadata
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.randomness import Purpose, hash64, text_hash
from mvlm_dataloading.tokenizer import Tokenizer

from .segment import RawBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """The captions of a batch as packed tokens."""

    tokens: Int64
    """(T,), each caption as [CLS] ... [SEP], without padding."""
    lengths: Int64
    """(B,), tokens of each caption."""
    text_id: list[int]
    """Equal for equal captions."""
    image_id: list[int]
    """Equal for equal images."""


def can_use_stored_tokens(dataset: Dataset, tokenizer: Tokenizer, length: int) -> bool:
    """True if the data have stored tokens that this tokenizer gives, of at least this text length. Logs why not."""
    stored = dataset.description.get("tokens")
    if not stored:
        return False
    if stored["fingerprint"] != tokenizer.fingerprint:
        log.info("%s: stored tokens are from another tokenizer; the loader tokenizes the captions", dataset.folder)
        return False
    if stored["max_length"] < length:
        log.info(
            "%s: stored captions are truncated to %d tokens, wanted %d; the loader tokenizes the captions",
            dataset.folder, stored["max_length"], length,
        )  # fmt: skip
        return False
    return True


class CaptionReader:
    """Draws one caption per image and turns it into checked tokens.

    Args:
        first: take the first caption of each image instead of a random one.
        stored: use the tokens stored with the data.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, length: int, seed: int, *, first: bool, stored: bool):
        self._dataset, self._tokenizer, self._length, self._seed = dataset, tokenizer, length, seed
        self._first, self._stored = first, stored

    def __call__(self, raw: RawBatch) -> CaptionBatch:
        """Choose, tokenize and check the captions of a batch.

        Raises:
            DataError: captions, metadata or tokens of a sample cannot be used. The message names the sample.
        """
        where = self._dataset.where
        draws = hash64(Purpose.CAPTION, self._seed, raw.epochs, raw.ids)
        captions, chosen, counts, image_ids = [], [], [], []
        for row, i in enumerate(raw.ids):
            known = parse_captions(raw.texts[row], lambda i=i: where(i))
            chosen.append(0 if self._first else int(draws[row]) % len(known))
            captions.append(known[chosen[-1]])
            counts.append(len(known))
            metadata = parse_metadata(raw.metadata[row], lambda i=i: where(i))
            image_ids.append(image_identity(metadata, lambda row=row: raw.encoded(row)))
        if self._stored:
            parts = [self._stored_tokens(raw, row, chosen[row], counts[row]) for row in range(len(captions))]
            tokens, lengths = np.concatenate(parts), np.array([len(part) for part in parts], np.int64)
        else:
            tokens, lengths = self._tokenizer.encode(captions, self._length)
        if lengths.min() < 3:
            row = int(lengths.argmin())
            raise DataError(
                f"{where(raw.ids[row])}: wanted a caption with at least one token, found {captions[row]!r}; "
                "use another tokenizer"
            )
        return CaptionBatch(tokens, lengths, [text_hash(caption) for caption in captions], image_ids)

    def _stored_tokens(self, raw: RawBatch, row: int, caption: int, count: int) -> Int64:
        """Stored tokens of one caption, shortened to the text length with [SEP] kept."""
        where = self._dataset.where(raw.ids[row])
        tokens = split_stored_tokens(raw.tokens[row], count, where)[caption].astype(np.int64)
        if len(tokens) < 2 or tokens[0] != self._tokenizer.cls_id or tokens[-1] != self._tokenizer.sep_id:
            raise DataError(
                f"{where}: wanted stored tokens as [CLS] ... [SEP], found {tokens.tolist()}; write the tokens again"
            )
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise DataError(
                f"{where}: wanted stored tokens below the vocabulary's {self._tokenizer.vocab_size}, found "
                f"{max(tokens.tolist(), key=lambda t: t if t >= 0 else 1 << 32)}; write the tokens again"
            )
        if len(tokens) > self._length:
            tokens = np.concatenate([tokens[: self._length - 1], tokens[-1:]])
        return tokens


def split_stored_tokens(content: bytes, count: int, where: str) -> list[np.ndarray]:
    """Split a `.tok` component into the int32 tokens of each caption. It holds a count and the tokens, per caption.

    Raises:
        DataError: the component does not hold `count` captions.
    """
    words = np.frombuffer(content[: len(content) // 4 * 4], "<i4")
    found, at = [], 0
    while at < len(words) and 0 <= words[at] < len(words) - at:
        found.append(words[at + 1 : at + 1 + words[at]])
        at += 1 + int(words[at])
    if at != len(words) or len(content) % 4 or len(found) != count:
        raise DataError(
            f"{where}: wanted stored tokens of {count} captions, found {len(content)} bytes that hold {len(found)}; "
            "write the tokens again"
        )
    return found
