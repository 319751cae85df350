"""Guesses for the [MASK] tokens of a caption, given an image.

Shape legend: B batch, S image side, T packed tokens, L tokens of a caption, M masked tokens.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError
from mvlm.inference.arguments import one_text, whole_number
from mvlm.inference.texts import MAX_CHARACTERS, check_unicode
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import mask_tokens
from mvlm_dataloading import Tokenizer
from mvlm_dataloading.captions import clean_line


class Guess(NamedTuple):
    """A token in the place of a [MASK]."""

    token: str
    probability: float


class FilledText(NamedTuple):
    """A text whose [MASK]s are filled in."""

    text: str
    """The text with the likeliest token in each place."""
    guesses: list[list[Guess]]
    """For each [MASK], the likeliest tokens, best first."""


def tokens_with_masks(caption: str, tokenizer: Tokenizer, length: int) -> Tensor:
    """Tokens int64 (L,) of a caption in which every "[MASK]" is one token to guess; L is at most `length`.

    The other tokens are those that the caption has with a word in the place of [MASK].

    Raises:
        ConfigError: a [MASK] is beyond `length`, or the caption is no Unicode.
    """
    check_unicode(caption, "caption")
    inner = tokenizer.encode_masked(clean_line(caption).split("[MASK]"))
    if tokenizer.mask_id in inner[length - 2 :]:
        raise ConfigError(
            f"caption: wanted every [MASK] among the first {length - 2} tokens, found one after them; "
            f"shorten the caption"
        )
    return torch.tensor([tokenizer.cls_id, *inner[: length - 2], tokenizer.sep_id])


@torch.no_grad()
def fill_mask(
    model: MaskVLM,
    tokenizer: Tokenizer,
    images: Tensor,
    tokens: Tensor,
    lengths: list[int],
    token_ids: Tensor,
    top: int = 1,
    precision: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Guess masked tokens from the rest of each caption and from its image.

    Args:
        images: uint8 (B, 3, S, S).
        tokens: Packed captions, int64 (T,).
        lengths: Tokens of each caption.
        token_ids: Positions in `tokens` to mask, int64 (M,).
        top: Guesses for each masked token.
        precision: auto, bf16 or fp32.

    Returns:
        The `top` likeliest token ids of the tokenizer, int64 (M, top), and their probabilities (M, top), on the CPU.
    """
    device = next(model.parameters()).device
    starts = torch.tensor([0, *np.cumsum(lengths)], device=device)
    hidden = mask_tokens(tokens.to(device), token_ids.to(device), model.config.mask_token_id)
    with autocast(device, precision):
        v = model.encode_image(images.to(device))
        wm, key_mask = model.encode_text(hidden, starts, max(lengths))
        logits = model.fill_mask(v, wm, key_mask, starts, token_ids.to(device)).float()
    logits = logits[:, : tokenizer.vocab_size]  # the LM head may be larger than the tokenizer's vocabulary
    found = logits.softmax(-1).topk(top, dim=-1)
    return found.indices.cpu(), found.values.cpu()


def fill_text(
    model: MaskVLM,
    tokenizer: Tokenizer,
    text: str,
    image: Tensor,
    top: int = 5,
    precision: str = "auto",
    steps: int = 1,
) -> FilledText:
    """Fill in the [MASK]s of one text, given its image uint8 (3, S, S): `top` guesses for each.

    In each of `steps` steps an equal number of [MASK]s, rounded up, is replaced: those whose first guess is the most
    probable. Later guesses see the tokens in their place.

    Raises:
        ConfigError: the text has no [MASK], or is too long, or `top` or `steps` is out of range.
    """
    one_text("caption", text)
    top, steps = whole_number("top", top, 1, tokenizer.vocab_size), whole_number("steps", steps)
    length = model.config.text_length
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"caption: wanted at most {MAX_CHARACTERS} characters, found {len(text)}; shorten it")
    if (masks := text.count("[MASK]")) > length:  # each is a token, and parts are tokenized one by one
        raise ConfigError(f"caption: wanted at most {length} tokens, found {masks} times [MASK]; shorten the caption")
    tokens = tokens_with_masks(text, tokenizer, length)
    ids = (tokens == tokenizer.mask_id).nonzero()[:, 0]
    if not len(ids):
        raise ConfigError(f'caption: wanted at least one [MASK], got {text!r}; write it as in "flag of [MASK]"')
    whole = len(tokens_with_masks(text, tokenizer, 4 * len(text) + 2))  # a token is at least one byte
    if whole > length:
        raise ConfigError(
            f"caption: wanted at most {length} tokens, [CLS] and [SEP] included, found {whole}; shorten the caption"
        )
    guesses, probabilities = torch.zeros(len(ids), top, dtype=torch.int64), torch.zeros(len(ids), top)
    left = torch.arange(len(ids))  # numbers of the [MASK]s that are not filled in yet
    for step in range(min(steps, len(ids))):
        found = fill_mask(model, tokenizer, image[None], tokens, [len(tokens)], ids[left], top, precision)
        order = found[1][:, 0].sort(descending=True, stable=True).indices
        number = -(-len(left) // (min(steps, len(ids)) - step))
        surest, rest = order[:number], order[number:].sort().values
        guesses[left[surest]], probabilities[left[surest]] = found[0][surest], found[1][surest]
        tokens[ids[left[surest]]] = found[0][surest, 0]
        left = left[rest]
    return FilledText(
        tokenizer.decode(tokens.tolist()),
        [
            [Guess(tokenizer.decode([token]), p) for token, p in zip(row, chances, strict=True)]
            for row, chances in zip(guesses.tolist(), probabilities.tolist(), strict=True)
        ],
    )
