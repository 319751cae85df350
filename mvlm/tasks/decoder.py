"""Answer decoder of MaskVLM: a fusion block over both cross-modality encoders, and an autoregressive decoder.

In the fusion block, rows of the text cross-modality encoder attend to rows of the image one. The decoder has
the shape of the text cross-modality encoder, with causal self-attention; it attends to the fused question and predicts
`answer [SEP]` from `[CLS]`. Where the paper is silent, the choice is ALBEF's: both start from the weights of the text
cross-modality encoder, words and positions are the text encoder's, logits the language head's.

Shape legend: B questions, T packed tokens, L tokens of the longest question, N patches, R answers that are decoded,
A tokens of the longest answer, Q packed answer tokens, C width, V vocabulary.
"""

import copy
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvlm.model.attention_backends import KeyIndex
from mvlm.model.cross_encoder import CrossEncoder, KeyValueCache
from mvlm.model.fast import make_caches
from mvlm.model.fast_attention import Selection, encode_rows, select_rows
from mvlm.model.maskvlm import IMPLEMENTATIONS, MaskVLM
from mvlm.model.packing import PackedText, Packing
from mvlm.model.residual import Residual
from mvlm.objectives.linear_cross_entropy import linear_cross_entropy
from mvlm.objectives.losses import at_least_float32
from mvlm_dataloading import Batch, Tokenizer

LOGITS_AT_A_TIME = 1 << 24
"""Largest number of logits that exist at a time while answers are ranked: 64 MiB in fp32."""


class Answers(NamedTuple):
    """Packed answers, each as [CLS] words [SEP]. Inputs leave out the last token, targets the first."""

    tokens: Tensor
    """int64 (Q,), input tokens."""
    targets: Tensor
    """int64 (Q,), the token after each."""
    packing: Packing
    """Layout of both."""


class AnswerTable(nn.Module):
    """Tokens of a list of answers, (answers, A + 1) each [CLS] words [SEP] and padding. Nothing of it is saved."""

    def __init__(self, answers: Sequence[str], tokenizer: Tokenizer, text_length: int) -> None:
        super().__init__()
        tokens, lengths = tokenizer.encode(answers, text_length)
        rows = torch.zeros(len(answers), int(lengths.max()), dtype=torch.int64)
        rows[torch.arange(rows.shape[1]) < torch.from_numpy(lengths)[:, None]] = torch.from_numpy(tokens)
        self.tokens: Tensor
        self.lengths: Tensor
        self.register_buffer("tokens", rows, persistent=False)
        self.register_buffer("lengths", torch.from_numpy(lengths), persistent=False)

    @property
    def masks(self) -> int:
        """Tokens of the longest answer, its [SEP] included: places for any answer of the list."""
        return self.tokens.shape[1] - 1

    def select(self, answers: Tensor) -> Answers:
        """The answers int64 (R,), packed. On a GPU the host waits for their number of tokens."""
        tokens, lengths = self.tokens[answers], self.lengths[answers] - 1  # (R, A + 1), (R,)
        kept = torch.arange(tokens.shape[1] - 1, device=tokens.device) < lengths[:, None]  # (R, A), True = a token
        inputs, targets = tokens[:, :-1][kept], tokens[:, 1:][kept]
        bounds = F.pad(lengths.cumsum(0), (1, 0)).int()
        return Answers(inputs, targets, Packing(bounds, tokens.shape[1] - 1, len(inputs)))


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


class AnswerDecoder(nn.Module):
    """The fusion block and the decoder, both from copies of the model's text cross-modality encoder."""

    def __init__(self, model: MaskVLM) -> None:
        super().__init__()
        self.fusion: CrossEncoder = copy.deepcopy(model.text_cross)
        self.fusion.blocks = self.fusion.blocks[-1:]
        self.decoder: CrossEncoder = copy.deepcopy(model.text_cross)

    def question(self, model: MaskVLM, batch: Batch, plan: str) -> PackedText:
        """Fused features of the questions of a batch, (T, C) and their layout: what the decoder attends to.

        An image or a question that several samples share is encoded once.
        """
        v, text = IMPLEMENTATIONS[plan].encode_unmasked(model, batch)  # (I, 1+N, C), U questions
        images, texts = batch.pairs()  # (B,) each
        shared = batch.image_of is not None
        if plan == "plain":
            packing = text.packing.select(texts, batch.sample_tokens)[0] if shared else text.packing
            w, key_mask = text.padded()  # (U, L, C), (U, L), True = a token
            v, w, key_mask = v.index_select(0, images), w.index_select(0, texts), key_mask[texts]
            image = model.image_cross(v, w, None, key_mask)  # (B, 1+N, C)
            caption = model.text_cross(w, v, key_mask, None)
            return PackedText(packing.unpad(self.fusion(caption, image, key_mask, None)), packing)
        caches = make_caches(v, text)
        packing = caches.text.packing
        assert packing is not None
        if not shared:
            image = encode_rows(model.image_cross, Residual(v), None, caches.text)
            caption = encode_rows(model.text_cross, Residual(text.rows), packing, caches.image)
            return PackedText(encode_rows(self.fusion, Residual(caption), packing, KeyValueCache(image)), packing)
        selected, rows = packing.select(texts, batch.sample_tokens)
        of_text, of_image = KeyIndex(texts, len(packing)), KeyIndex(images, len(v))
        repeat = Selection(partial(select_rows, rows=images))
        image = encode_rows(model.image_cross, Residual(v), None, caches.text, of_text, repeat=repeat)
        repeat = Selection(partial(select_rows, rows=rows), selected)
        caption = encode_rows(model.text_cross, Residual(text.rows), packing, caches.image, of_image, repeat=repeat)
        return PackedText(encode_rows(self.fusion, Residual(caption), selected, KeyValueCache(image)), selected)

    def forward(self, model: MaskVLM, question: PackedText, answers: Answers, of: Tensor, plan: str) -> Tensor:
        """Features (Q, C) of the tokens of R answers; answer r belongs to question of[r], int64 (R,)."""
        # Without y: the norm's output in another dtype, which a pre-norm block would take for a branch and add to x.
        x = model.text_encoder.embed(answers.tokens, answers.packing.position).x  # (Q, C)
        if plan == "plain":
            memory, memory_mask = question.padded()
            x, key_mask = answers.packing.pad(x), answers.packing.key_mask  # (R, A, C), (R, A), True = a token
            x = self.decoder(x, memory.index_select(0, of), key_mask, memory_mask[of], causal=True)
            return answers.packing.unpad(x)
        cache = KeyValueCache(question.rows, question.packing)
        partners = KeyIndex(of, len(question.packing))
        return encode_rows(self.decoder, Residual(x), answers.packing, cache, partners, causal=True)

    def loss(
        self, model: MaskVLM, question: PackedText, answers: Answers, of: Tensor, weights: Tensor, plan: str
    ) -> tuple[Tensor, Tensor]:
        """Sum of the R answers' negative log-likelihoods, each times its weight (R,); and the accuracy of tokens.

        Both are 0 without answers.
        """
        if not len(of):  # the fast implementation has no rows to attend with; all parameters take part, for DDP
            plan = "plain"
        x = self(model, question, answers, of, plan)
        each = weights.index_select(0, answers.packing.sequence_of_row)  # (Q,)
        return weighted_cross_entropy(model, x, answers.targets, each, plan)

    def log_likelihoods(self, model: MaskVLM, question: PackedText, answers: Answers, of: Tensor, plan: str) -> Tensor:
        """Log-likelihood of each of R answers, [SEP] included, float32 (R,)."""
        x = self(model, question, answers, of, plan)
        rows = max(1, LOGITS_AT_A_TIME // model.config.vocab_size)
        found = [
            at_least_float32(model.language_head(part)).log_softmax(-1).gather(1, targets[:, None])
            for part, targets in zip(x.split(rows), answers.targets.split(rows), strict=True)
        ]
        return answers.packing.pad(torch.cat(found)).sum((1, 2))

    def rank(self, model: MaskVLM, question: PackedText, table: AnswerTable, listed: int, k: int, plan: str) -> Tensor:
        """The likeliest of the first `listed` answers of a table for each question: int64 (B,).

        The k answers with the most probable first tokens are candidates; each is judged by its whole likelihood, in
        which the first token counts once.
        """
        number, device = len(question.packing), question.rows.device
        log_p = self._next_tokens(model, question, table.tokens[:1, :1].expand(number, 1), plan)  # (B, V)
        first = log_p.index_select(1, table.tokens[:listed, 1])  # (B, listed)
        # Answers may share their first token. A stable sort then takes those that are earlier on the list.
        candidates = first.sort(dim=1, descending=True, stable=True).indices[:, :k]  # (B, k)
        of = torch.arange(number, device=device).repeat_interleave(candidates.shape[1])
        scores = self.log_likelihoods(model, question, table.select(candidates.flatten()), of, plan)
        best = scores.view(candidates.shape).argmax(1, keepdim=True)
        return candidates.gather(1, best).squeeze(1)

    def generate(self, model: MaskVLM, question: PackedText, tokenizer: Tokenizer, longest: int, plan: str) -> Tensor:
        """The answer of each question by greedy decoding: int64 (B, up to `longest`), ends with [SEP] repeated."""
        number, device = len(question.packing), question.rows.device
        tokens = torch.full((number, 1), tokenizer.cls_id, device=device)
        ended = torch.zeros(number, dtype=torch.bool, device=device)
        while tokens.shape[1] < longest and not bool(ended.all()):
            log_p = self._next_tokens(model, question, tokens, plan)[:, : tokenizer.vocab_size]
            log_p[:, [tokenizer.cls_id, tokenizer.pad_id, tokenizer.mask_id]] = -torch.inf
            chosen = log_p.argmax(1).masked_fill(ended, tokenizer.sep_id)
            ended |= chosen == tokenizer.sep_id
            tokens = torch.cat([tokens, chosen[:, None]], 1)
        return tokens[:, 1:]

    def _next_tokens(self, model: MaskVLM, question: PackedText, tokens: Tensor, plan: str) -> Tensor:
        """Log-probabilities (B, V) of the token after each of B prefixes of equal length, int64 (B, A)."""
        number, length = tokens.shape
        bounds = length * torch.arange(number + 1, device=tokens.device, dtype=torch.int32)
        flat = tokens.flatten()
        answers = Answers(flat, flat, Packing(bounds, length, len(flat)))
        x = self(model, question, answers, torch.arange(number, device=tokens.device), plan)
        last = x.unflatten(0, (number, length))[:, -1]
        return at_least_float32(model.language_head(last)).log_softmax(-1)
