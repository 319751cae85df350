"""Answers by masked language modelling: [MASK]s stand before the question, and the language head fills them in.

A text is `[CLS] [MASK] ... [MASK] question [SEP]`, with as many [MASK]s as the longest answer of the list has tokens,
its [SEP] included. All are predicted at once, from the image. An answer's likelihood is the product of the
probabilities of its tokens and of the [SEP] behind them. Nothing is new here: every weight was pretrained.

Shape legend: B samples, I images, U questions, T packed tokens, N patches, L tokens of the longest text, R answers that
are learned, Q their packed tokens, A masks of a text, C width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.model.attention import Residual
from mvlm.model.fast import Selection, encode_rows, make_caches, select_rows
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.packing import Packing
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm.objectives.losses import at_least_float32
from mvlm_dataloading import Batch, Tokenizer

LOGITS_AT_A_TIME = 1 << 24
"""Largest number of logits that exist at a time while answers are ranked: 64 MiB in fp32."""


class Answers(NamedTuple):
    """Packed answers, each with the [SEP] behind it."""

    tokens: Tensor
    """int64 (Q,)."""
    packing: Packing
    """Their layout."""


class AnswerTable(nn.Module):
    """Tokens of a list of answers, (answers, A) each words [SEP] and padding. Nothing of it is saved."""

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer, text_length: int) -> None:
        super().__init__()
        tokens, lengths = tokenizer.encode(answers, text_length)
        rows = torch.zeros(len(answers), int(lengths.max()), dtype=torch.int64)
        rows[torch.arange(rows.shape[1]) < torch.from_numpy(lengths)[:, None]] = torch.from_numpy(tokens)
        self.tokens: Tensor
        self.lengths: Tensor
        self.register_buffer("tokens", rows[:, 1:], persistent=False)  # without [CLS]
        self.register_buffer("lengths", torch.from_numpy(lengths) - 1, persistent=False)

    @property
    def masks(self) -> int:
        """Tokens of the longest answer, its [SEP] included: places for any answer of the list."""
        return self.tokens.shape[1]

    def select(self, answers: Tensor) -> Answers:
        """The answers int64 (R,), packed. On a GPU the host waits for their number of tokens."""
        tokens, lengths = self.tokens[answers], self.lengths[answers]  # (R, A), (R,)
        kept = tokens[torch.arange(self.masks, device=tokens.device) < lengths[:, None]]
        return Answers(kept, Packing(F.pad(lengths.cumsum(0), (1, 0)).int(), self.masks, len(kept)))


def weighted_cross_entropy(
    model: MaskVLM, x: Tensor, targets: Tensor, weights: Tensor, plan: str
) -> tuple[Tensor, Tensor]:
    """Sum of the language head's weighted cross-entropies, and its accuracy; x (Q, C), targets and weights (Q,).

    Both are 0 without targets: a microbatch may have no question with a listed answer.
    """
    head = model.language_head
    if plan == "fast":
        vocabulary = head.vocabulary
        loss, accuracy = linear_cross_entropy(head.transform(x), vocabulary.weight, vocabulary.bias, targets, weights)
        return loss, accuracy.nan_to_num()
    logits = at_least_float32(head(x))  # (Q, V)
    loss = (weights * F.cross_entropy(logits, targets, reduction="none")).sum()
    return loss, (logits.argmax(1) == targets).to(logits.dtype).mean().nan_to_num()


def with_masks(batch: Batch, number: int, mask_token_id: int) -> Batch:
    """The batch with `number` [MASK]s in each text, behind its [CLS]."""
    bounds = batch.cu_seqlens.long()  # (U+1,)
    added = number * torch.arange(len(bounds), device=bounds.device)
    row = torch.arange(len(batch.tokens), device=bounds.device)
    text = torch.searchsorted(bounds[1:], row, right=True)
    place = row + number * (text + (row != bounds[:-1][text.clamp(max=len(bounds) - 2)]))
    tokens = batch.tokens.new_full((len(row) + number * (len(bounds) - 1),), mask_token_id)
    return replace(
        batch,
        tokens=tokens.scatter(0, place, batch.tokens),
        cu_seqlens=(bounds + added).int(),
        max_length=batch.max_length + number,
        sample_tokens=batch.sample_tokens and batch.sample_tokens + number * len(batch.sample_id),
    )


def mask_features(model: MaskVLM, batch: Batch, number: int, plan: str) -> Tensor:
    """Features (B, A, C) of the A = `number` [MASK]s of each text, which attends to its image.

    An image or a question that several samples share is encoded once.
    """
    batch = with_masks(batch, number, model.config.mask_token_id)
    v, text = IMPLEMENTATIONS[plan].encode_unmasked(model, batch)  # (I, 1+N, C), U questions
    images, texts = batch.pairs()  # (B,) each
    if plan == "plain":
        w, key_mask = text.padded()  # (U, L, C), (U, L), True = a token
        x = model.text_cross(w.index_select(0, texts), v.index_select(0, images), key_mask[texts], None)  # (B, L, C)
        return x[:, 1 : 1 + number]
    caches = make_caches(v, text)
    packing = caches.text.packing
    assert packing is not None
    asked, key_index, repeat = packing, None, None
    if batch.image_of is not None:
        asked, of_text = packing.select(texts, batch.sample_tokens)
        key_index, repeat = images, Selection(partial(select_rows, rows=of_text), asked)
    first = asked.cu_seqlens[:-1].long() + 1  # (B,)
    at = (first[:, None] + torch.arange(number, device=first.device)).flatten()

    def select(x: Tensor) -> Tensor:
        return x.index_select(0, at).unflatten(0, (-1, number))  # (T, C) -> (B, A, C)

    rows = Residual(text.rows)
    return encode_rows(model.text_cross, rows, packing, caches.image, key_index, repeat=repeat, read=Selection(select))


def answers_loss(
    model: MaskVLM, x: Tensor, answers: Answers, of: Tensor, weights: Tensor, plan: str
) -> tuple[Tensor, Tensor]:
    """Sum of the negative log-likelihoods of R answers, each times its weight; and the accuracy of their tokens.

    Args:
        x: features of the [MASK]s (B, A, C).
        answers: the R answers, of a table.
        of: sample of each answer, int64 (R,).
        weights: (R,).
    """
    of_row = answers.packing.sequence_of_row  # (Q,)
    at = of.index_select(0, of_row) * x.shape[1] + answers.packing.position
    features, each = x.flatten(0, 1).index_select(0, at), weights.index_select(0, of_row)
    return weighted_cross_entropy(model, features, answers.tokens, each, plan)


def likeliest(model: MaskVLM, x: Tensor, table: AnswerTable) -> Tensor:
    """The likeliest answer of a table for each sample, int64 (B,); x (B, A, C) are features of its [MASK]s."""
    words = table.tokens  # (answers, A)
    counts = torch.arange(words.shape[1], device=words.device) < table.lengths[:, None]
    found = []
    for part in x.split(max(1, LOGITS_AT_A_TIME // (x.shape[1] * model.config.vocab_size))):
        log_p = at_least_float32(model.language_head(part)).log_softmax(-1)  # (b, A, V)
        scores = log_p.new_zeros(len(part), len(words))
        for place in range(words.shape[1]):
            scores += log_p[:, place].index_select(1, words[:, place]) * counts[:, place]
        found.append(scores.argmax(1))
    return torch.cat(found)
