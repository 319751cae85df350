"""Zero-shot retrieval in both directions: candidates by ITC, re-ranked with ITM.

ITM learns to distinguish true pairs from negatives that are drawn from ITC's own softmax, so its log-odds estimate the
log-ratio of the two distributions (noise-contrastive estimation, Gutmann and Hyvärinen, 2010). The score of a candidate
is therefore the ITC logit, which is the negatives' log-probability up to a constant, plus ITM's log-odds. BLIP adds the
two as well. TR retrieves captions for an image; any of the image's captions is a right answer. IR retrieves images for
a caption. Memory is bounded: similarities are computed for one block of queries at a time. They are float64 products,
so no rank depends on the order in which a sum is computed.
Shape legend: Q queries of a block, G gallery size, K candidates that are re-ranked.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mvlm.inference.encode import EncodedSplit, match_log_odds
from mvlm.model.maskvlm import MaskVLM

QUERIES_PER_BLOCK = 64
PAIRS_PER_BATCH = 256


@dataclass(frozen=True)
class Ranks:
    """Results of ranking: for each query, the rank of its best right answer and its top answers.

    A rank is the number of wrong answers before the best right one; 0 = first.
    """

    itc: Tensor
    """int64 (queries,), by only the contrastive similarity."""
    itm: Tensor
    """int64 (queries,), after re-ranking."""
    top: Tensor
    """int64 (queries, up to 5), gallery rows of the first answers after re-ranking."""
    score: Tensor
    """(queries,), score of the first answer."""


@torch.no_grad()
def rank(model: MaskVLM, features: EncodedSplit, direction: str, k: int = 32, precision: str = "auto") -> Ranks:
    """Rank the gallery for every query.

    Args:
        features: `encode_split` of the same model.
        direction: "tr" (queries are images, the gallery is captions) or "ir" (the reverse).
        k: Candidates of each query for ITM to re-rank.
        precision: auto, bf16 or fp32.
    """
    k = min(k, len(features.text_embedding if direction == "tr" else features.image_embedding))
    itc, itm, top, score = [], [], [], []
    for block, similarity, right in _query_blocks(features, direction):
        ranks = best_rank(similarity, right)
        candidates = similarity.topk(k, dim=1).indices  # (Q, K)
        scores = match_scores(model, features, block, candidates, direction, precision)  # (Q, K)
        scores = scores + model.log_scale.exp().item() * similarity.gather(1, candidates)
        found = right.gather(1, candidates)
        # If no candidate is right, the best right answer keeps its rank by ITC.
        itm.append(torch.where(found.any(1), best_rank(scores, found), ranks))
        itc.append(ranks)
        best = scores.topk(min(5, k), dim=1)
        top.append(candidates.gather(1, best.indices))
        score.append(best.values[:, 0].float())
    return Ranks(torch.cat(itc), torch.cat(itm), torch.cat(top), torch.cat(score))


@torch.no_grad()
def rank_by_itc(features: EncodedSplit, direction: str) -> Tensor:
    """The field `itc` of `rank`, without the work of ITM."""
    return torch.cat([best_rank(similarity, right) for _, similarity, right in _query_blocks(features, direction)])


def _query_blocks(features: EncodedSplit, direction: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Blocks of queries: int64 (Q,), similarities float64 (Q, G), and right answers, bool (Q, G), True = right."""
    queries, gallery = features.image_embedding.double(), features.text_embedding.double()
    query_owner, gallery_owner = torch.arange(len(queries)), features.owner
    if direction == "ir":
        queries, gallery, query_owner, gallery_owner = gallery, queries, gallery_owner, query_owner
    for start in range(0, len(queries), QUERIES_PER_BLOCK):
        block = torch.arange(start, min(start + QUERIES_PER_BLOCK, len(queries)))
        yield block, queries[block] @ gallery.T, query_owner[block, None] == gallery_owner[None, :]


def best_rank(scores: Tensor, right: Tensor) -> Tensor:
    """Rank of the best right answer, int64 (Q,), from scores (Q, G) and right bool (Q, G), True = a right answer.

    It counts the wrong answers that score at least as high, so a tie is not a success.
    """
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return ((scores >= best) & ~right).sum(dim=1)


def match_scores(
    model: MaskVLM, features: EncodedSplit, queries: Tensor, candidates: Tensor, direction: str, precision: str
) -> Tensor:
    """ITM's log-odds of a match for every query int64 (Q,) with its candidates int64 (Q, K). Returns float (Q, K)."""
    images, texts = queries[:, None].expand_as(candidates).reshape(-1), candidates.reshape(-1)
    if direction == "ir":
        images, texts = texts, images
    scores = []
    for start in range(0, len(images), PAIRS_PER_BATCH):
        i, t = images[start : start + PAIRS_PER_BATCH], texts[start : start + PAIRS_PER_BATCH]
        scores.append(match_log_odds(model, features.v[i], features.w[t], features.key_mask[t], precision))
    return torch.cat(scores).view_as(candidates)


def recall(ranks: Tensor) -> dict[str, float]:
    """Per cent of queries with a right answer among the first 1, 5 and 10; ranks int64 (queries,), 0 = first."""
    return {f"r{k}": round(100 * (ranks < k).double().mean().item(), 2) for k in (1, 5, 10)}
