"""Tokenizers: a byte-level BPE trained on captions, or any `tokenizer.json`."""

import bisect
import contextlib
import functools
import hashlib
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.open import open_dataset

from .captions import script_of
from .errors import DataError, need
from .files import sha256, write_file
from .untrusted import read_regular

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4 of a tokenizer trained here

# Names of the special tokens in the vocabularies of BERT, RoBERTa, CLIP and Gemma.
_NAMES = {
    "cls": ("[CLS]", "<s>", "<|startoftext|>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<|endoftext|>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>"),
}
_UNKNOWN = ("[UNK]", "<unk>")

_BLANK = "\u0120"  # of byte-level BPE
_WITHOUT_BLANKS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
# How a letter of these scripts begins in UTF-8, for letters that several tokens spell. After E3, 80 is punctuation.
_FIRST_BYTES = re.compile(rb"\xe3(?!\x80)|[\xe4-\xe9]|\xe0[\xb8-\xbb]|\xe1[\x80-\x82\x9e\x9f]|\xf0[\xa0-\xb3]")
# Byte-level BPE spells a byte by a character that can be seen: itself, or one from 256 on.
_SEEN = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _SEEN}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in _SEEN)}


class Tokenizer:
    """A wrapper of `tokenizers.Tokenizer` that encodes every caption as [CLS] ... [SEP], without padding.

    Attributes:
        vocab_size, cls_id, sep_id, mask_id, pad_id: ints.
        fingerprint: sha256 of the tokenizer's definition.
        added: special tokens that the file lacked, by id.

    Raises:
        DataError: one of the four special tokens is missing, or two of them are one token. From all methods that read
            a text: the tokenizer fails on it.
    """

    def __init__(self, inner: Any, origin: str = "tokenizer"):
        inner.no_padding()
        inner.no_truncation()
        inner.encode_special_tokens = True  # "[MASK]" in a caption is text, not the special token
        self._inner, self._origin = inner, origin
        self.vocab_size: int = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=0)  # ids may have gaps
        self.added: dict[int, str] = {}
        ids = {}
        for kind in _NAMES:
            ids[kind] = _special_token(inner, kind)
            if ids[kind] is None:
                raise DataError(
                    f"{origin}: wanted a {kind} token named {' or '.join(_NAMES[kind])}, found none; use another "
                    f"tokenizer"
                )
        if len({*ids.values()}) < len(ids):
            shared = ", ".join(f"{kind} {i}" for kind, i in ids.items())
            raise DataError(
                f"{origin}: wanted four special tokens, found two that are one token ({shared}); use another tokenizer"
            )
        self.cls_id, self.sep_id, self.mask_id, self.pad_id = ids["cls"], ids["sep"], ids["mask"], ids["pad"]
        self._in_place_of: dict[int, int] = self._unknown_for(ids, origin)
        self.fingerprint: str = hashlib.sha256(self.to_str().encode()).hexdigest()

    def _unknown_for(self, special: dict[str, int], origin: str) -> dict[int, int]:
        """Map of special tokens to the unknown token, which replaces them where a text spells a name such as "[MASK]".

        Empty if the tokenizer does not read such names as special tokens, or has no unknown token.
        `encode_special_tokens` prevents that for added tokens. In SentencePiece's models they are ordinary pieces.
        """
        found: set[int] = set()
        for text in (text for names in _NAMES.values() for name in names for text in (name, f"a {name} a")):
            with contextlib.suppress(DataError):  # a vocabulary of whole words may have no token for it
                found.update(self._encoded(text).ids)
        unknown = next((i for i in map(self._inner.token_to_id, _UNKNOWN) if i is not None), None)
        if found.isdisjoint(special.values()):
            return {}
        if unknown is None:
            log.warning("%s: wanted an unknown token for names of special tokens in captions, found none", origin)
            return {}
        return dict.fromkeys(special.values(), int(unknown))

    def _encoded(self, text: str) -> Any:
        """Encode a text by the package `tokenizers`, without special tokens. Returns its `Encoding`."""
        with _errors_of_the_package(self._origin):
            return self._inner.encode(text, add_special_tokens=False)

    def _ids(self, found: Any) -> list[int]:
        """Token ids of an `Encoding`, with the unknown token in place of special tokens whose names the text spells."""
        ids: list[int] = found.ids
        return [self._in_place_of.get(i, i) for i in ids] if self._in_place_of else ids

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Concatenated tokens of B texts, int64 (T,), and their lengths, int64 (B,).

        Each text becomes [CLS] ... [SEP]. Longer texts are truncated to `max_length` tokens, [SEP] kept.
        """
        check_text_length(max_length)
        with _errors_of_the_package(self._origin):
            encoded = self._inner.encode_batch(list(texts), add_special_tokens=False)
        rows = [self._ids(found)[: max_length - 2] for found in encoded]
        tokens = [i for row in rows for i in (self.cls_id, *row, self.sep_id)]
        return np.array(tokens, np.int64), np.array([len(row) + 2 for row in rows], np.int64)

    def with_own_specials(self, text: str) -> list[int]:
        """Token ids of a text with the special tokens that the tokenizer.json's own post-processor adds, if any."""
        with _errors_of_the_package(self._origin):
            return self._inner.encode(text).ids

    def encode_masked(self, pieces: Sequence[str]) -> list[int]:
        """Token ids of a text with gaps: `pieces` in order, a mask token between each and the next. No [CLS] and [SEP].

        A piece that is encoded alone would begin a word, even where the mask before it ended one. So the text is
        encoded with a short word in each gap, whose token the mask token replaces.
        """
        text, places = pieces[0], []
        for number, piece in enumerate(pieces[1:], 2):
            piece = piece or (" " if number < len(pieces) else "")  # two masks are two words
            inside = text[-1:].isalnum() or piece[:1].isalnum()  # of a word, from which "!" is told apart
            places.append(len(text))
            text += ("!" if inside else self._short_word) + piece
        ids: list[int] = []
        before: list[int] = []
        found = self._encoded(text)
        for token, (start, stop) in zip(self._ids(found), found.offsets, strict=True):
            masks = [place for place in places if start <= place < stop]
            if masks and len(text[start:stop].strip()) != 1:  # one token of a mask and of what is beside it
                return self._encode_alone(pieces)
            if not masks or masks != before:  # a blank that the tokenizer puts in front of a text has its first place
                ids.append(self.mask_id if masks else token)
            before = masks
        return ids if ids.count(self.mask_id) == len(places) else self._encode_alone(pieces)

    def _encode_alone(self, pieces: Sequence[str]) -> list[int]:
        """Tokens of each piece as if it were a text, with mask tokens between them."""
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += [self.mask_id] if number else []
            ids += self._ids(self._encoded(piece.strip())) if piece.strip() else []
        return ids

    @functools.cached_property
    def _short_word(self) -> str:
        """A letter that is a single token if it stands as a word behind a blank; "a" if none is."""
        letters = "aeioustnrlmdhcbfgpkwvyjxqz"
        tokens = (self._encoded(f"{letter} {letter}").ids for letter in letters)
        return next((letter for letter, ids in zip(letters, tokens, strict=True) if len(ids) == 2), "a")

    def words(self, text: str) -> list[tuple[str, int, int]]:
        """Words of a text, separated by white space: (word, index of its first token, index behind its last token).

        Tokens are counted from 0 without [CLS], as if the text were not truncated.
        """
        spans = [(word.group(), word.start(), word.end()) for word in re.finditer(r"\S+", text)]
        offsets = self._encoded(text).offsets
        # The last character decides: a token may begin with the blank before its word, or be that blank alone.
        of_token = [bisect.bisect_left([end for _, _, end in spans], max(stop, 1)) for _, stop in offsets]
        found = []
        for number, (word, _, _) in enumerate(spans):
            tokens = [i for i, owner in enumerate(of_token) if owner == number]
            if tokens:
                found.append((word, tokens[0], tokens[-1] + 1))
        return found

    def word_starts(self) -> NDArray[np.bool_]:
        """True for each token of the vocabulary that starts a word: bool (V,).

        Byte-level BPE and SentencePiece mark the blank before a word, so punctuation belongs to the word before it.
        WordPiece marks the pieces that go on with a word. In scripts without blanks, a token that begins with a letter
        starts a unit, because a mark comes once a sentence.

        Raises:
            DataError: the vocabulary has neither mark.
        """
        tokens = [self.token(number) or "" for number in range(self.vocab_size)]
        # A blank of BPE, of SentencePiece; no blank.
        for mark, starts in ((_BLANK, True), ("\u2581", True), ("##", False)):
            found = np.array([token.startswith(mark) for token in tokens])
            if found.sum() > 1:
                units = [_begins_unit(token.removeprefix(mark), byte_level=mark == _BLANK) for token in tokens]
                return (found == starts) | np.array(units)
        raise DataError(
            "tokenizer: wanted one that marks the starts of words (byte-level BPE, SentencePiece, WordPiece), found no "
            "marks; do without whole word masking"
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids, without special tokens."""
        # A file need not declare its special tokens, and the package then decodes them as words.
        special = {self.cls_id, self.sep_id, self.mask_id, self.pad_id}
        words = [i for i in map(int, ids) if i not in special]
        with _errors_of_the_package(self._origin):
            return self._inner.decode(words, skip_special_tokens=True).strip()

    def token(self, token_id: int) -> str:
        """Spelling of a token in the vocabulary."""
        return self._inner.id_to_token(int(token_id))

    def to_str(self) -> str:
        """The tokenizer as the text of a `tokenizer.json`."""
        return self._inner.to_str()

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json` for `load_tokenizer` and the `tokenizers` package."""
        write_file(Path(path), self._inner.to_str(pretty=True))


def _special_token(inner: Any, kind: str) -> int | None:
    """Id of the special token of a kind, such as "mask", in a `tokenizers.Tokenizer`; None if there is none.

    A token that the file declares as special comes before an ordinary piece of that name. MPNet's vocabulary has <s>,
    and [CLS] as a piece that BERT's had.
    """
    found = [i for i in map(inner.token_to_id, _NAMES[kind]) if i is not None]
    declared = inner.get_added_tokens_decoder()
    return next((i for i in found if i in declared), found[0] if found else None)


@contextlib.contextmanager
def _errors_of_the_package(origin: str) -> Iterator[None]:
    """Context in which `tokenizers` works on a text. DataError if it fails: the file's rules may not fit every text.

    A panic of its Rust code is no Exception, so it would end threads and processes past every handler. Rust has
    already written it to stderr then.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not _is_panic(error):
            raise  # KeyboardInterrupt, and what the caller has done wrong
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{origin}: wanted a tokenizer that reads every text, found one that fails on a text here ({reason}); use "
            f"another tokenizer"
        ) from None


def _is_panic(error: BaseException) -> bool:
    """True for pyo3's PanicException. Each package has a class of its own, which none of them exports."""
    return type(error).__name__ == "PanicException"


def _begins_unit(token: str, *, byte_level: bool) -> bool:
    """True if a token begins with a letter of a script that puts no blanks between words, as Chinese or Thai.

    Such a token is a unit of whole-word masking by itself. `token` comes without its prefix for the start of a word.
    """
    if fallback := re.fullmatch("<0x([0-9A-F]{2})>", token):  # SentencePiece's spelling of a byte
        content = bytes([int(fallback[1], 16)])
    elif byte_level and _BYTES.keys() >= set(token):
        content = bytes(_BYTES[character] for character in token)
    else:
        content = token.encode(errors="replace")
    first = content.decode(errors="replace")[:1]
    return _FIRST_BYTES.match(content) is not None if first == "\ufffd" else script_of(first) in _WITHOUT_BLANKS


def check_text_length(length: int) -> None:
    """Check that a caption of this many tokens has room for an ordinary token. Raises ValueError."""
    if length < 3:
        raise ValueError(f"wanted a text length of at least 3 ([CLS], a token, [SEP]), got {length}")


def train_tokenizer(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens. Equal captions give an equal tokenizer.

    Raises:
        ValueError: the vocabulary is too small for all bytes and the special tokens.
    """
    tokenizers = need("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    smallest = len(SPECIAL_TOKENS) + len(alphabet)
    if vocab_size < smallest:
        raise ValueError(
            f"wanted a vocabulary of at least {smallest} (all bytes and the special tokens), got {vocab_size}"
        )
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.normalizer = tokenizers.normalizers.NFC()
    # With the prefix blank, a word is the same token at the start of a caption as inside it.
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator(captions, trainer)
    return Tokenizer(inner)


def parse_tokenizer(text: str, origin: str) -> Tokenizer:
    """A tokenizer of the text that `Tokenizer.to_str` returned, named `origin` in messages."""
    return Tokenizer(need("tokenizers").Tokenizer.from_str(text), origin)


def load_tokenizer(path: Path, complete: Sequence[str] = ()) -> Tokenizer:
    """Read a `tokenizer.json`, of ours, BERT, RoBERTa or others.

    Args:
        complete: special tokens that are added if the file has none: of "cls", "sep", "mask" and "pad".

    Raises:
        DataError: the file is missing, is no tokenizer, or has not four special tokens.
    """
    path = Path(path)
    try:
        content = read_regular(path, "tokenizer")
    except FileNotFoundError:
        raise DataError(
            f"{path}: wanted a tokenizer.json, found no such file; give its path or leave it out to train one"
        ) from None
    try:
        inner = need("tokenizers").Tokenizer.from_buffer(content)
    except ImportError:
        raise
    except BaseException as error:  # the package raises bare Exceptions, and panics
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise DataError(
            f"{path}: wanted a tokenizer.json, found a file that is not one ({error}); give another"
        ) from None
    missing = [_NAMES[kind][0] for kind in complete if _special_token(inner, kind) is None]
    inner.add_special_tokens(missing)
    tokenizer = Tokenizer(inner, str(path))
    tokenizer.added = {inner.token_to_id(name): name for name in missing}
    return tokenizer


SAMPLE, RUNS = 65_536, 16
"""Most samples of a split whose captions a tokenizer is trained on, and runs of adjacent samples that they come in."""


def tokenizer_for(dataset: Dataset, vocab_size: int) -> Tokenizer:
    """The tokenizer stored with the data set, or one trained on captions of its train split (`train_on_sample`).

    Raises:
        DataError: the stored tokenizer is missing or is not the one that `dataset.json` names; or the data set has
            neither a tokenizer nor a train split.
    """
    return stored_tokenizer(dataset) or train_on_sample(dataset, vocab_size)


def stored_tokenizer(dataset: Dataset) -> Tokenizer | None:
    """The tokenizer stored with the data set, or None. DataError if it is missing or not what `dataset.json` names."""
    if dataset.tokenizer_sha256 is None:
        return None
    if dataset.remote is not None:
        dataset.remote.fetch_tokenizer(dataset.tokenizer_sha256)
    path = dataset.folder / "tokenizer.json"
    if not path.exists() or sha256(path) != dataset.tokenizer_sha256:
        raise DataError(f"{path}: wanted the tokenizer that dataset.json names, found another or none; restore it")
    return load_tokenizer(path)


def train_on_sample(dataset: Dataset, vocab_size: int) -> Tokenizer:
    """Train a tokenizer on the captions of the train split, or of 65,536 of its samples if it has more.

    These are 16 runs of 4,096 adjacent samples at equal distances, the first one at the split's begin: a remote data
    set is read in few places.

    Raises:
        DataError: the data set has no train split.
    """
    if "train" not in dataset.splits:
        raise DataError(
            f"{dataset.folder}: wanted a tokenizer.json, or a train split to train a tokenizer on, found neither "
            f"(splits: {', '.join(dataset.splits)}); give a tokenizer.json"
        )
    folder = dataset.folder if dataset.remote is None else dataset.remote.url
    train = dataset if dataset.split == "train" else open_dataset(folder, "train")
    ids: Sequence[int] = range(len(train))
    if len(train) > SAMPLE:
        ids = [run * len(train) // RUNS + k for run in range(RUNS) for k in range(SAMPLE // RUNS)]
        log.info("%s: a tokenizer is trained on the captions of %d of its samples", dataset.folder, SAMPLE)
    return train_tokenizer((caption for captions in train.captions_of(ids) for caption in captions), vocab_size)
