"""Captions of a batch: one per image, from stored tokens or tokenized here.

Shape legend: B batch, T packed tokens.
"""

import logging
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from mvlm_dataloading.dataset.dali_index import Int64
from mvlm_dataloading.dataset.dataset import (
    Dataset,
    image_identity,
    parse_captions,
    parse_metadata,
    split_stored_tokens,
)
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links.samples import WEIGHTS
from mvlm_dataloading.randomness import Purpose, hash64, text_hash
from mvlm_dataloading.tokenizer import Tokenizer

from .segment import RawBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """The captions of a batch as packed tokens."""

    tokens: Int64
    """int64 (T,), tokens of all captions, each as [CLS] ... [SEP], without padding."""
    lengths: Int64
    """int64 (B,), number of tokens of each caption."""
    text_id: list[int]
    """Id of each caption, equal for equal captions."""
    image_id: list[int]
    """Id of each caption's image, equal for equal images."""


def can_use_stored_tokens(dataset: Dataset, tokenizer: Tokenizer, length: int) -> bool:
    """True if the data have stored tokens that this tokenizer gives, of at least this text length. Logs why not."""
    stored = dataset.description.get("tokens")
    if not stored:
        return False
    if stored["fingerprint"] != tokenizer.fingerprint:
        why = "stored tokens are from another tokenizer"
    elif stored["max_length"] < length:
        why = f"stored captions are truncated to {stored['max_length']} tokens, wanted {length}"
    else:
        return True
    log.info("%s: %s; the loader tokenizes the captions", dataset.folder, why)
    return False


MAX_REMEMBERED = 65536
"""Largest split whose captions and tokens are remembered, so that each is parsed and tokenized once."""
MAX_CAPTIONS = 5 * MAX_REMEMBERED
"""Most captions that are remembered, all those of an image or none: about 180 MB, if they have ten words each."""
_SHORTEST = 3  # tokens of a caption that has one beside [CLS] and [SEP]


def _draw(draw: int, count: int, ends: list[float]) -> int:
    """Index of the caption, of `count`, that a random 64-bit number chooses.

    ends: upper ends in (0, 1] of the captions' probabilities, added up; empty if all are equally likely.
    """
    return min(bisect_right(ends, draw * 2.0**-64), count - 1) if ends else draw % count


class CaptionReader:
    """Draws one caption per image and turns it into checked tokens.

    Args:
        first: take the first caption of each image instead of a random one.
        stored: use the tokens stored with the data.

    A caption without a token, of which a tokenizer may see nothing, gives its turn to the next one in the list.
    """

    def __init__(self, dataset: Dataset, tokenizer: Tokenizer, length: int, seed: int, *, first: bool, stored: bool):
        self._dataset, self._tokenizer, self._length, self._seed = dataset, tokenizer, length, seed
        self._first, self._stored = first, stored
        self._room = MAX_CAPTIONS if not first and len(dataset) <= MAX_REMEMBERED else 0
        """Number of captions that may yet be kept in memory."""
        self._samples: dict[int, tuple[list[str], int, list[float]]] = {}
        """By sample id: captions, image id, and the ends of the captions' shares of [0, 1); no ends if shares are
        equal."""
        self._known_tokens: dict[tuple[int, int], Int64] = {}
        """Tokens, by (sample id, index of the caption)."""

    def __call__(self, raw: RawBatch) -> CaptionBatch:
        """Choose, tokenize and check the captions of a batch.

        Raises:
            DataError: captions, metadata or tokens of a sample cannot be used. The message names the sample.
        """
        draws = hash64(Purpose.CAPTION, self._seed, raw.epochs, raw.ids)
        samples = [self._sample(raw, row) for row in range(len(raw.ids))]
        known = [captions for captions, *_ in samples]
        drawn = [
            0 if self._first else _draw(int(draw), len(captions), ends)
            for draw, (captions, _, ends) in zip(draws, samples, strict=True)
        ]
        chosen, tokens = self._tokens(raw, known, drawn)
        return CaptionBatch(
            np.concatenate(tokens),
            np.array([len(row) for row in tokens], np.int64),
            [text_hash(row[k]) for k, row in zip(chosen, known, strict=True)],
            [image_id for _, image_id, _ in samples],
        )

    def _sample(self, raw: RawBatch, row: int) -> tuple[list[str], int, list[float]]:
        """Captions of the sample in a row of a batch, id of its image, and ends of the captions' shares of [0, 1)."""
        i = int(raw.ids[row])
        if (found := self._samples.get(i)) is None:
            captions = parse_captions(raw.texts[row], lambda: self._dataset.where(i))
            metadata = parse_metadata(raw.metadata[row], lambda: self._dataset.where(i))
            weights = metadata.get(WEIGHTS, []) if self._dataset.links is not None else []
            found = captions, image_identity(metadata, lambda: raw.image_bytes(row)), list(accumulate(weights))
            if len(captions) <= self._room:
                self._samples[i] = found
                self._room -= len(captions)
        return found

    def _tokens(self, raw: RawBatch, known: list[list[str]], wanted: list[int]) -> tuple[list[int], list[Int64]]:
        """Index and tokens of each row's caption.

        Args:
            known: all captions of each row.
            wanted: index of the caption to take; the next one that has a token stands in for one without.
        """
        chosen, tokens = list(wanted), self._encoded(raw, known, list(range(len(known))), wanted)
        for row in range(len(known)):
            while len(tokens[row]) < _SHORTEST:
                chosen[row] = (chosen[row] + 1) % len(known[row])
                if chosen[row] == wanted[row]:
                    raise DataError(
                        f"{self._dataset.where(raw.ids[row])}: wanted a caption with at least one token, found "
                        f"{known[row][wanted[row]]!a} and none that has one; leave the sample out "
                        f"(`mvlm data view --without`) or use another tokenizer"
                    )
                (tokens[row],) = self._encoded(raw, known, [row], [chosen[row]])
        return chosen, tokens

    def _encoded(self, raw: RawBatch, known: list[list[str]], rows: list[int], chosen: list[int]) -> list[Int64]:
        """Checked tokens of one caption of each of some rows; [CLS] and [SEP] alone for a caption without a token.

        rows: of the batch. chosen: index of each row's caption.
        """
        keys = [(int(raw.ids[row]), k) for row, k in zip(rows, chosen, strict=True)]
        new = [(row, key) for row, key in zip(rows, keys, strict=True) if key not in self._known_tokens]
        if self._stored:
            found = [self._stored_tokens(raw, row, k, len(known[row])) for row, (_, k) in new]
        else:
            tokens, lengths = self._tokenizer.encode([known[row][k] for row, (_, k) in new], self._length)
            found = np.split(tokens, np.cumsum(lengths))[:-1]
        made = {key: tokens for (_, key), tokens in zip(new, found, strict=True)}
        self._known_tokens |= {key: tokens for key, tokens in made.items() if key[0] in self._samples}
        return [made[key] if key in made else self._known_tokens[key] for key in keys]

    def _stored_tokens(self, raw: RawBatch, row: int, caption: int, count: int) -> Int64:
        """Stored tokens of one caption of a row, shortened to the text length with [SEP] kept.

        caption: its index. count: number of captions of the sample.
        """
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
