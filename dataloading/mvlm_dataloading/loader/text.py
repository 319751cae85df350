"""Captions of a batch: one drawn for each picture, as tokens that were stored with it or are made here.

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

from .segment import Rows

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Words:
    """The captions of one batch."""

    tokens: Int64
    """(T,), each as [CLS] ... [SEP], one after another."""
    lengths: Int64
    """(B,)."""
    text_id: list[int]
    image_id: list[int]


def stored_tokens_fit(dataset: Dataset, tokenizer: Tokenizer, length: int) -> bool:
    """Whether the tokens stored with the data are those that this tokenizer gives at this text length."""
    stored = dataset.description.get("tokens")
    if not stored:
        return False
    if stored["fingerprint"] != tokenizer.fingerprint:
        log.info("%s: the stored tokens are another tokenizer's; captions are tokenised here", dataset.folder)
        return False
    if stored["max_length"] < length:
        log.info(
            "%s: the stored tokens end at %d, fewer than the %d wanted; captions are tokenised here",
            dataset.folder, stored["max_length"], length,
        )  # fmt: skip
        return False
    return True


class Captions:
    """Draws, tokenises and checks captions. `first` takes the first of each picture instead of drawing one."""

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, length: int, seed: int, *, first: bool, stored: bool):
        self._dataset, self._tokenizer, self._length, self._seed = dataset, tokenizer, length, seed
        self._first, self._stored = first, stored

    def __call__(self, rows: Rows) -> Words:
        """Raises DataError, naming the sample, for captions, metadata or tokens that cannot be used."""
        where = self._dataset.where
        choices = hash64(Purpose.CAPTION, self._seed, rows.epochs, rows.ids)
        captions, picked, counts, image_ids = [], [], [], []
        for row, i in enumerate(rows.ids):
            known = parse_captions(rows.texts[row], lambda i=i: where(i))
            picked.append(0 if self._first else int(choices[row]) % len(known))
            captions.append(known[picked[-1]])
            counts.append(len(known))
            metadata = parse_metadata(rows.metadata[row], lambda i=i: where(i))
            image_ids.append(image_identity(metadata, lambda row=row: rows.encoded(row)))
        if self._stored:
            parts = [self._read(rows, row, picked[row], counts[row]) for row in range(len(captions))]
            tokens, lengths = np.concatenate(parts), np.array([len(part) for part in parts], np.int64)
        else:
            tokens, lengths = self._tokenizer.encode(captions, self._length)
        if lengths.min() < 3:
            row = int(lengths.argmin())
            raise DataError(
                f"{where(rows.ids[row])}: wanted a caption with a token, found {captions[row]!r}; use another tokenizer"
            )
        return Words(tokens, lengths, [text_hash(caption) for caption in captions], image_ids)

    def _read(self, rows: Rows, row: int, caption: int, count: int) -> Int64:
        """The stored tokens of one caption, cut before [SEP] to the text length."""
        where = self._dataset.where(rows.ids[row])
        tokens = split_stored(rows.tokens[row], count, where)[caption].astype(np.int64)
        if len(tokens) < 2 or tokens[0] != self._tokenizer.cls_id or tokens[-1] != self._tokenizer.sep_id:
            raise DataError(
                f"{where}: wanted stored tokens as [CLS] ... [SEP], found {tokens.tolist()}; index it again"
            )
        if tokens.min() < 0 or tokens.max() >= self._tokenizer.vocab_size:
            raise DataError(
                f"{where}: wanted stored tokens below the vocabulary's {self._tokenizer.vocab_size}, found "
                f"{max(tokens.tolist(), key=lambda t: t if t >= 0 else 1 << 32)}; write the tokens again"
            )
        if len(tokens) > self._length:
            tokens = np.concatenate([tokens[: self._length - 1], tokens[-1:]])
        return tokens


def split_stored(content: bytes, count: int, where: str) -> list[np.ndarray]:
    """The captions' tokens, int32, of a `.tok` component: for each caption its number of tokens and then these.

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
