"""Retrieval in both directions, from features of a whole split: candidates by ITC, re-ranked with ITM.

ITM learns to distinguish true pairs from negatives that are drawn from ITC's own softmax, so its log-odds estimate the
log-ratio of the two distributions (noise-contrastive estimation, Gutmann and Hyvärinen, 2010). The score of a candidate
is therefore the ITC logit, which is the negatives' log-probability up to a constant, plus ITM's log-odds. BLIP adds the
two as well; ALBEF ranks candidates by ITM alone, and `Ranks` has these ranks too. TR retrieves captions for an image;
any of the image's captions is a right answer. IR retrieves images for a caption. Captions that differ in blanks or case
alone are one answer: every image that has it is right, and the gallery has the first of them. Samples with the same
`image_id` in their metadata, as those of data with a row for each caption, are one image here, with the captions of
all. Memory is bounded: similarities are computed for one block of queries at a time. They are float64 products. Those
of equal embeddings may still differ in the last bits, because a matrix product adds up its columns in different orders.
Scores that are closer than `TIE` are therefore equal.

A pair that is a candidate in both directions is judged once. Pairs are sorted by image, so a batch has few images, and
keys and values of each are computed once for all of its pairs. A query that has no right candidate keeps its rank by
ITC, so its pairs are judged only if its answers are wanted.

Shape legend: I images, T captions, W tokens of all captions, N patches, C width, E contrastive width, R chosen rows;
Q queries of a block, G gallery size, K candidates that are re-ranked, P different pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mvlm.evaluation.workspace import StoredArray, Workspace
from mvlm.inference.encode import (
    BATCH,
    eval_loader,
    image_features,
    match_log_odds,
    packed_tokens,
    rerank_scores,
    text_features,
)
from mvlm.model.maskvlm import MaskVLM
from mvlm.model.packing import PackedText, Packing
from mvlm.statistics import grouped_bootstrap
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.captions import first_captions
from mvlm_dataloading.dataset.dataset import first_samples


@dataclass(frozen=True)
class EncodedSplit:
    """Features of all images and captions of a split, on the CPU, in memory or in memory-mapped files."""

    v: Tensor
    """(I, 1+N, C), features of the unmasked images."""
    w: Tensor
    """(W, C), features of the unmasked captions, packed."""
    starts: Tensor
    """int64 (T+1,), bounds of the captions in `w`."""
    image_embedding: Tensor
    """(I, E), contrastive embeddings of the images, of unit length."""
    text_embedding: Tensor
    """(T, E), contrastive embeddings of the captions, of unit length."""
    image: Tensor
    """int64 (I,), for each image the first one with the same `image_id` in the metadata; itself without an id."""
    owner: Tensor
    """int64 (T,), image of each caption, as in `image`."""
    first: Tensor
    """int64 (I,), row of each image's first caption."""
    captions: list[str]
    """Texts of the T captions."""

    @property
    def different(self) -> Tensor:
        """Rows of images, each different image once, int64 (up to I,), ascending.

        They are the queries of image-to-text retrieval and the gallery of text-to-image retrieval.
        """
        return (self.image == torch.arange(len(self.image))).nonzero()[:, 0]

    @cached_property
    def words(self) -> Tensor:
        """For each caption, the index of the first caption with the same words: int64 (T,)."""
        return torch.tensor(first_captions(self.captions))

    @property
    def different_captions(self) -> Tensor:
        """Indices of captions, each different text once, int64 (up to T,), ascending: the gallery of image to text."""
        return (self.words == torch.arange(len(self.words))).nonzero()[:, 0]

    @cached_property
    def _known(self) -> Tensor:
        return (self.owner * len(self.captions) + self.words).unique()  # sorted

    def right(self, images: Tensor, captions: Tensor) -> Tensor:
        """True where an image has a caption with the words of the given caption, so that they are right answers.

        images, captions: int64, of shapes that broadcast to that of the bool result. Images are rows as in `image`.
        """
        known, words = self._known.to(images.device), self.words.to(captions.device)
        pairs = images * len(self.captions) + words[captions]
        return known[torch.searchsorted(known, pairs).clamp_(max=len(known) - 1)] == pairs

    def images(self, rows: Tensor, device: torch.device) -> Tensor:
        """Features (R, 1+N, C) of the images `rows`, int64 (R,) on the CPU."""
        return to_device(self.v.index_select(0, rows), device)

    def texts(self, rows: Tensor, device: torch.device) -> PackedText:
        """Packed features of the captions `rows`, int64 (R,) on the CPU, in this order."""
        lengths = self.starts.diff()[rows]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        shift = (self.starts[rows] - bounds[:-1]).repeat_interleave(lengths)
        total = int(bounds[-1])
        chosen = to_device(self.w.index_select(0, shift + torch.arange(total)), device)
        packing = Packing(to_device(bounds.int(), device), int(lengths.max()), total)
        return PackedText(chosen, packing)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the CPU; to a GPU through pinned memory, so that the host does not wait for the GPU."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def encode_split(
    model: MaskVLM,
    dataset: Dataset,
    tokenizer: Tokenizer,
    precision: str = "auto",
    workspace: Workspace | None = None,
    name: str = "",
) -> EncodedSplit:
    """Encode all images and captions of `dataset`, in batches of `BATCH` that the ranks of the workspace share.

    Args:
        name: start of the names of arrays and stages, for a second split in one workspace.
    """
    workspace, config = workspace or Workspace(), model.config
    captions, owner, first = [], [], []
    image = first_samples(dataset.metadata(i) for i in range(len(dataset)))
    for i, own in enumerate(dataset.captions_of(range(len(dataset)))):
        first.append(len(captions))
        captions += own
        owner += [image[i]] * (len(captions) - first[-1])
    starts = packed_tokens(captions, tokenizer, config.text_length)[1].long()
    # As the loader of the masks does, pass over a caption without a token beside [CLS] and [SEP].
    seen = (starts.diff() > 2).tolist()
    first = [next((n for n in range(a, b) if seen[n]), a) for a, b in pairwise([*first, len(captions)])]
    dtype = next(model.parameters()).dtype
    v = workspace.array(f"{name}v", (len(dataset), 1 + config.num_patches, config.width), dtype)
    w = workspace.array(f"{name}w", (int(starts[-1]), config.width), dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    image_embedding = workspace.array(f"{name}image_embedding", (len(dataset), config.itc_width), dtype)
    text_embedding = workspace.array(f"{name}text_embedding", (len(captions), config.itc_width), dtype)

    def encode_images(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(dataset.rows(start, stop), model, tokenizer):
            found = image_features(model, batch.images, precision)
            v.write(start, found.v)
            image_embedding.write(start, found.embedding)
            start += len(batch.images)
            yield

    def encode_texts(start: int, stop: int) -> Iterator[None]:
        for begin in range(start, stop, BATCH):
            found = text_features(model, captions[begin : min(begin + BATCH, stop)], tokenizer, precision)
            w.write(int(starts[begin]), found.w.rows)
            text_embedding.write(begin, found.embedding)
            yield

    workspace.share(f"{name}images", len(dataset), BATCH, encode_images, "images")
    workspace.share(f"{name}texts", len(captions), BATCH, encode_texts, "captions")
    return EncodedSplit(
        v.tensor,
        w.tensor,
        starts,
        image_embedding.tensor,
        text_embedding.tensor,
        torch.tensor(image),
        torch.tensor(owner),
        torch.tensor(first),
        captions,
    )


QUERIES_PER_BLOCK = 64
PAIRS_PER_BATCH = 512
BATCHES_PER_PART = 4
"""Batches whose log-odds are copied from the GPU to the host together, so that the GPU seldom waits."""
DIRECTIONS = ("tr", "ir")
RECALLS_AT = (1, 5, 10)
RECALL_RESAMPLES = 10_000
TIE = 1e-9
"""Difference below which two scores are equal: far above float64's rounding, far below that of two embeddings."""
MOST_ANSWERS = 5
"""Number of best answers that are kept for each query."""


@dataclass(frozen=True)
class Ranks:
    """Results of retrieval in one direction: for each query, the rank of its best right answer and its top answers.

    Queries of image to text are the images `EncodedSplit.different`, those of text to image all captions.
    A rank is the number of different wrong answers before the best right one; 0 = first.
    """

    itc: Tensor
    """int64 (queries,), rank by contrastive similarity alone."""
    itm: Tensor
    """int64 (queries,), rank after re-ranking by ITC and ITM together."""
    top: Tensor
    """int64 (queries, up to 5), index of the caption or row of the image of each first answer after re-ranking."""
    score: Tensor
    """(queries,), score of the first answer."""
    itm_alone: Tensor
    """int64 (queries,), rank after re-ranking by ITM's log-odds alone, as ALBEF ranks."""


@dataclass(frozen=True)
class Candidates:
    """Candidates of all queries of one direction, by ITC."""

    direction: str
    ranks: StoredArray
    """int64 (queries,), rank of the best right answer by ITC."""
    rows: StoredArray
    """int64 (queries, K), index of the caption or row of the image of each candidate, the most similar first."""
    similarity: StoredArray
    """float64 (queries, K), contrastive similarity of the query and each candidate."""

    def pairs(self, features: EncodedSplit, queries: slice = slice(None)) -> Tensor:
        """Number of the pair of each query and candidate, int64 (queries, K): image x number of captions + caption.

        queries: the queries that are wanted.
        """
        rows = self.rows.tensor[queries]
        asked = features.different if self.direction == "tr" else torch.arange(len(self.rows.tensor))
        asked = asked[queries, None]
        images, texts = (asked, rows) if self.direction == "tr" else (rows, asked)
        return images * len(features.captions) + texts

    def right(self, features: EncodedSplit, queries: slice = slice(None)) -> Tensor:
        """True for candidates that are right answers, bool (queries, K)."""
        pairs = self.pairs(features, queries)
        return features.right(pairs // len(features.captions), pairs % len(features.captions))


@torch.no_grad()
def rank_all(
    model: MaskVLM,
    features: EncodedSplit,
    k: int = 32,
    precision: str = "auto",
    workspace: Workspace | None = None,
    answers: bool = True,
) -> dict[str, Ranks]:
    """Rank the gallery for every query, in both directions.

    Returns the ranks by direction: "tr" (queries are images, the gallery is captions), and "ir" (the reverse).

    Args:
        features: `encode_split` of the same model.
        k: Candidates of each query for ITM to re-rank. 0 leaves ITM out, for a model that was trained without it: all
            ranks are then those of ITC.
        answers: True if the answers of all queries are wanted. False leaves those of queries without a right candidate
            as ITC ranks them. The ranks are the same.
    """
    workspace = workspace or Workspace()
    device, number = _device(model), k or MOST_ANSWERS
    both = [find_candidates(features, direction, number, workspace, device) for direction in DIRECTIONS]
    if k == 0:
        return {each.direction: _ranks_of_itc(model, each) for each in both}
    judged = [each.pairs(features)[each.right(features).any(1) | answers].flatten() for each in both]
    pairs = torch.cat(judged).unique()  # sorted
    log_odds = score_pairs(model, features, pairs, precision, workspace)
    return {each.direction: _rerank(model, each, features, pairs, log_odds, answers) for each in both}


def find_candidates(
    features: EncodedSplit, direction: str, k: int, workspace: Workspace, device: torch.device
) -> Candidates:
    """The k most similar gallery rows of every query, in blocks of queries on the device."""
    asked, answers = features.different, features.different_captions
    queries, gallery = features.image_embedding, features.text_embedding
    if direction == "ir":
        asked, answers = torch.arange(len(features.captions)), asked
        queries, gallery = gallery, queries
    gallery, among = gallery.index_select(0, answers).double().to(device), answers.to(device)
    number, k = len(asked), min(k, len(answers))
    candidates = Candidates(
        direction,
        workspace.array(f"{direction}.ranks", (number,), torch.int64),
        workspace.array(f"{direction}.rows", (number, k), torch.int64),
        workspace.array(f"{direction}.similarity", (number, k), torch.float64),
    )

    def work(start: int, stop: int) -> Iterator[None]:
        for begin in range(start, stop, QUERIES_PER_BLOCK):
            block = slice(begin, min(begin + QUERIES_PER_BLOCK, stop))
            similarity = queries.index_select(0, asked[block]).double().to(device) @ gallery.T  # (Q, G)
            query = asked[block, None].to(device)
            right = features.right(query, among) if direction == "tr" else features.right(among, query)  # (Q, G)
            best = similarity.topk(k, dim=1)
            candidates.ranks.write(begin, best_rank(similarity, right))
            candidates.rows.write(begin, answers[best.indices.cpu()])
            candidates.similarity.write(begin, best.values)
            yield

    workspace.share(f"{direction}.candidates", number, QUERIES_PER_BLOCK, work, "queries")
    return candidates


def best_rank(scores: Tensor, right: Tensor) -> Tensor:
    """Rank of the best right answer, int64 (Q,), from scores (Q, G) and right bool (Q, G), True = a right answer.

    It counts the wrong answers that do not score lower by `TIE`, so neither a tie nor NaN is a success.
    """
    best = scores.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    return (~(scores < best - TIE) & ~right).sum(dim=1)


def score_pairs(model: MaskVLM, features: EncodedSplit, pairs: Tensor, precision: str, workspace: Workspace) -> Tensor:
    """ITM's log-odds of a match, float32 (P,), for pairs int64 (P,), rising: image x number of captions + caption."""
    device = _device(model)
    log_odds = workspace.array("log_odds", (len(pairs),), torch.float32)

    def score(batch: Tensor) -> Tensor:
        images, image = (batch // len(features.captions)).unique_consecutive(return_inverse=True)
        texts, text = (batch % len(features.captions)).unique(return_inverse=True)
        v, w = features.images(images, device), features.texts(texts, device)
        rows = int(features.starts.diff()[texts][text].sum())
        return match_log_odds(model, v, w, to_device(image, device), to_device(text, device), precision, rows)

    def work(start: int, stop: int) -> Iterator[None]:
        for begin in range(start, stop, part):
            batches = pairs[begin : min(begin + part, stop)].split(PAIRS_PER_BATCH)
            log_odds.write(begin, torch.cat([score(batch) for batch in batches]))
            yield

    part = BATCHES_PER_PART * PAIRS_PER_BATCH
    workspace.share("pairs", len(pairs), part, work, "pairs")
    return log_odds.tensor


def _rerank(
    model: MaskVLM, candidates: Candidates, features: EncodedSplit, pairs: Tensor, log_odds: Tensor, answers: bool
) -> Ranks:
    """Rank the candidates of one direction again, by the ITC logit plus ITM's log-odds.

    Args:
        pairs: int64 (P,), ascending, numbers of the judged pairs (`Candidates.pairs`).
        log_odds: (P,), ITM's log-odds of each.
        answers: True if a query without a right candidate needs its top answers re-ranked too.
    """
    itm, alone, top, score = [], [], [], []
    for begin in range(0, len(candidates.ranks.tensor), QUERIES_PER_BLOCK):
        block = slice(begin, begin + QUERIES_PER_BLOCK)
        right = candidates.right(features, block)
        judged = right.any(1) | answers  # (Q,)
        similarity = candidates.similarity.tensor[block]  # (Q, K)
        of_itm = torch.zeros_like(similarity)
        of_itm[judged] += log_odds[torch.searchsorted(pairs, candidates.pairs(features, block)[judged])]
        scores = rerank_scores(model, similarity, of_itm)
        # If no candidate is right, or only one that its tie with a wrong answer left out, the rank by ITC stays.
        by_itc = candidates.ranks.tensor[block]
        for ranks, by in ((itm, scores), (alone, of_itm)):
            ranks.append(torch.where(by_itc < right.shape[1], best_rank(by, right), by_itc))
        best = scores.topk(min(MOST_ANSWERS, scores.shape[1]), dim=1)
        top.append(candidates.rows.tensor[block].gather(1, best.indices))
        score.append(best.values[:, 0].float())
    return Ranks(candidates.ranks.tensor, torch.cat(itm), torch.cat(top), torch.cat(score), torch.cat(alone))


def _ranks_of_itc(model: MaskVLM, candidates: Candidates) -> Ranks:
    """Ranks and top answers by contrastive similarity alone, in the form that re-ranking by ITM returns."""
    ranks, score = candidates.ranks.tensor, rerank_scores(model, candidates.similarity.tensor[:, 0], 0.0)
    return Ranks(ranks, ranks, candidates.rows.tensor, score.float(), ranks)


def _device(model: MaskVLM) -> torch.device:
    return next(model.parameters()).device


def recall(ranks: Tensor) -> dict[str, float]:
    """Per cent of queries with a right answer among the first 1, 5 and 10; ranks int64 (queries,), 0 = first."""
    return {f"r{k}": round(100 * (ranks < k).double().mean().item(), 2) for k in RECALLS_AT}


def recall_intervals(ranks: Tensor, images: Tensor) -> dict[str, list[float]]:
    """95 % intervals of the recalls of `recall`, in per cent, each the lower and the upper end: images are drawn.

    Args:
        ranks: int64 (queries,), rank of the best right answer; 0 = first.
        images: int64 (queries,), image of each query.
    """
    rng, intervals = np.random.default_rng(0), {}
    for k in RECALLS_AT:
        hits = 100.0 * (ranks < k).numpy()
        ends = grouped_bootstrap(hits, images.tolist(), by_kind=True, seed=rng, resamples=RECALL_RESAMPLES)
        intervals[f"r{k}"] = [round(end, 2) for end in ends]
    return intervals
