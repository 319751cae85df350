"""Texts given by a user: cleaned as captions are when a data set is built, checked, and in batches."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mvlm.errors import ConfigError, shown, whole_number
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.captions import clean_line

Texts = str | Iterable[str]
"""One text, or an iterable of texts."""
MAX_CHARACTERS = 100_000
"""Longest text that is tokenized. A text that fits a model has a few hundred characters."""


def each_text(texts: Texts, name: str = "texts") -> Iterator[str]:
    """The texts one by one. A single text is a sequence of one. ConfigError, with the name, for another value."""
    if isinstance(texts, str):
        return iter([texts])
    if isinstance(texts, bytes | bytearray | Mapping) or not isinstance(texts, Iterable):
        raise ConfigError(f"{name}: wanted a text or a sequence of texts, got {shown(texts)}")
    return iter(texts)


def list_of_texts(name: str, values: Any) -> list[str]:
    """Several strings as a list. One string is a list of one. ConfigError for other values."""
    found = list(each_text(values, name))
    for number, value in enumerate(found):
        if not isinstance(value, str):
            raise ConfigError(f"{name}: wanted texts, got {shown(value)} as number {number}")
    return found


def text_batches(
    texts: Iterable[str], tokenizer: Tokenizer, length: int, batch_size: int, truncate: bool = False, clean: bool = True
) -> Iterator[list[str]]:
    """Check texts, put each on one line with single blanks, and yield them in lists of up to `batch_size`.

    ConfigError names the first text that is refused, by its number from 0.

    Args:
        length: most tokens of a text; longer ones are refused, or cut by the tokenizer if `truncate`.
        clean: False for captions of a data set, which training and evaluation read as they stand.
    """
    batch_size = whole_number("batch_size", batch_size)
    remaining, first = iter(texts), 0
    while batch := list(itertools.islice(remaining, batch_size)):
        yield checked_texts(batch, tokenizer, length, truncate, clean, first)
        first += len(batch)


def check_unicode(text: str, what: str) -> None:
    """Raise ConfigError, which names the text `what`, if it has a lone surrogate, which bytes outside UTF-8 leave."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what}: wanted Unicode, found {error.object[error.start]!r}; write it in UTF-8") from None


def checked_texts(
    texts: Sequence[str],
    tokenizer: Tokenizer,
    length: int,
    truncate: bool = False,
    clean: bool = True,
    first: int = 0,
) -> list[str]:
    """The texts, each on one line with single blanks, as captions are in a data set.

    Args:
        clean: False for captions of a data set, which are given back as they stand.
        first: number of the first text, for the error.

    ConfigError for a text that is no string, no Unicode, blank or, unless `truncate`, of over `length` tokens.
    """
    found = []
    for number, text in enumerate(texts, first):
        if not isinstance(text, str):
            raise ConfigError(f"text {number}: wanted a string, got {type(text).__name__}")
        text = text[:MAX_CHARACTERS] if truncate else text  # far beyond the tokens that are left of it
        check_unicode(text, f"text {number}")
        found.append(clean_line(text) if clean else text)
        if not found[-1].strip():
            raise ConfigError(f"text {number}: wanted words, found none; write a caption")
        if len(text) > MAX_CHARACTERS:
            raise ConfigError(
                f"text {number}: wanted at most {MAX_CHARACTERS} characters, found {len(text)}; shorten it"
            )
    if truncate:
        return found
    lengths = tokenizer.encode(found, 4 * MAX_CHARACTERS + 2)[1]  # a token is at least one byte, so none is cut here
    if lengths.max() > length:
        number = int(lengths.argmax())
        raise ConfigError(
            f"text {first + number}: wanted at most {length} tokens, [CLS] and [SEP] included, found "
            f"{lengths[number]}; shorten it"
        )
    return found


def shortened(text: str, tokenizer: Tokenizer, length: int) -> str:
    """Cut a text behind the last word that lies within the first `length` tokens."""
    words = text.split()[:length]  # each is a token or more
    while len(words) > 1 and len(tokenizer.encode([" ".join(words)], length + 1)[0]) > length:
        words.pop()
    return " ".join(words)
