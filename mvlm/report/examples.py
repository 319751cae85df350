"""Examples in a run's report: reconstructions, filled-in captions, retrievals, words' maps and the embedding space.

Functions return plain data; `templates/retrieval.html` draws it.

Shape legend: n images, m captions, E contrastive width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvlm.errors import ConfigError
from mvlm.evaluation.cross_modal_gain import partners_of
from mvlm.evaluation.evaluate import RERANK, unseen_images
from mvlm.evaluation.retrieval import EncodedSplit, rank_all
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.attention_maps import draw_words
from mvlm.inference.encode import eval_loader
from mvlm.inference.images import hide_patches, load_image
from mvlm.inference.masked import fill_mask, reconstruct
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.report.html import data_uri
from mvlm_dataloading import Dataset, Tokenizer

RECONSTRUCTIONS = 12
FILLED_CAPTIONS = 18
RETRIEVALS = 4  # of each kind
NEIGHBOURS = 5
QUERIES = 6  # whose neighbours are shown
MAPPED = 120  # images of the map of the embedding space
CONFUSIONS = 8
BLOCK = 256  # rows whose similarities are computed at a time
WORD_MAPS = 4  # with maps of their words
MOST_WORDS = 7  # with a map each
SIDE = 112  # pixels of a panel with a map


class Example(NamedTuple):
    """Item that a report shows: a text, an image, or both, drawn green or red if it is right or wrong."""

    text: str
    image: str = ""
    """A data URI with a PNG; empty for a text alone."""
    mark: str = ""
    """"right" (drawn green), "wrong" (red) or empty."""


class FilledCaption(NamedTuple):
    """A masked caption, and how the model fills it in given its own image and given another one."""

    right_image: str
    wrong_image: str
    masked: list[Example]
    with_right: list[Example]
    with_wrong: list[Example]


class Retrieval(NamedTuple):
    """One query and its first answers."""

    query: Example
    rank: int
    """Rank of the best right answer, from 1."""
    answers: list[Example]


class WordMaps(NamedTuple):
    """Maps of the words of a caption over an image."""

    caption: str
    log_odds: float
    """ITM's log-odds that image and caption belong together."""
    panels: str
    """Data URI: the image, and a panel for each word."""


class Confusion(NamedTuple):
    """A caption that is more similar to a wrong image than to its own."""

    caption: str
    own: Example
    wrong: Example
    own_similarity: float
    wrong_similarity: float


class Samples(NamedTuple):
    """Masked samples of a split, on the CPU. S image side, K masked patches, L tokens of a caption."""

    images: Tensor
    """uint8 (n, 3, S, S), pixels of the samples' images."""
    patch_ids: Tensor
    """int64 (n, K), numbers of the masked patches, row by row."""
    tokens: list[Tensor]
    """Tokens of each sample's caption, int64 (L,)."""
    masked_tokens: list[Tensor]
    """Positions of the masked tokens within each caption, int64."""


def chosen_samples(number: int, size: int, seed: int) -> list[int]:
    """Choose `number` of `size` samples at random by a seed, ascending: reports show neither the best nor the first."""
    return sorted(np.random.default_rng(seed).permutation(size)[:number].tolist())


def read_samples(model: MaskVLM, tokenizer: Tokenizer, split: Dataset, wanted: Sequence[int]) -> Samples:
    """Read some samples of a split with evaluation's random masks, in the split's order, in one pass over it.

    wanted: numbers of the samples.
    """
    images, patch_ids, tokens, masked_tokens = [], [], [], []
    for batch, masks in eval_loader(split, model, tokenizer):
        for row, sample in enumerate(batch.sample_id.tolist()):
            if sample in wanted:
                start, end = batch.cu_seqlens[row : row + 2].tolist()
                images.append(batch.images[row].cpu())
                patch_ids.append(masks.patch_ids[row])
                tokens.append(batch.tokens[start:end])
                masked_tokens.append(masks.token_ids[(masks.token_ids >= start) & (masks.token_ids < end)] - start)
    return Samples(torch.stack(images), torch.stack(patch_ids), tokens, masked_tokens)


def reconstructions(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> list[list[Example]]:
    """Strips of four images: the original, masked, rebuilt with its caption, rebuilt with another image's caption."""
    chosen = chosen_samples(RECONSTRUCTIONS, len(split), seed=1)
    samples = read_samples(model, tokenizer, split, chosen)
    partner = partners_of(split)
    captions = [split.captions(i)[0] for i in chosen]
    wrong = [split.captions(int(partner[i]))[0] for i in chosen]
    masked = hide_patches(samples.images, samples.patch_ids, model.config.patch_size)
    with_own = reconstruct(model, tokenizer, samples.images, captions, samples.patch_ids)
    with_wrong = reconstruct(model, tokenizer, samples.images, wrong, samples.patch_ids)
    return [
        [
            Example("original", data_uri(samples.images[row])),
            Example("masked", data_uri(masked[row])),
            Example(captions[row], data_uri(with_own[row])),
            Example(wrong[row], data_uri(with_wrong[row])),
        ]
        for row in range(len(chosen))
    ]


def filled_captions(model: MaskVLM, tokenizer: Tokenizer, split: Dataset) -> list[FilledCaption]:
    """Masked captions, filled in given the right image and given a wrong one."""
    chosen = chosen_samples(FILLED_CAPTIONS, len(split), seed=2)
    partner = partners_of(split)
    others = [int(partner[i]) for i in chosen]
    samples = read_samples(model, tokenizer, split, chosen)
    by_sample = dict(zip(sorted(set(others)), read_samples(model, tokenizer, split, others).images, strict=True))
    other_images = torch.stack([by_sample[i] for i in others])
    lengths = [len(tokens) for tokens in samples.tokens]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = torch.cat([m + int(s) for m, s in zip(samples.masked_tokens, starts[:-1], strict=True)])
    packed = torch.cat(samples.tokens)
    counts = [len(masked) for masked in samples.masked_tokens]
    right, wrong = (
        fill_mask(model, tokenizer, images, packed, lengths, positions)[0][:, 0].split(counts)
        for images in (samples.images, other_images)
    )
    found = []
    for row, (tokens, masked) in enumerate(zip(samples.tokens, samples.masked_tokens, strict=True)):
        masked_out, with_right, with_wrong = (
            marked_caption(tokenizer, tokens, masked, guesses) for guesses in (None, right[row], wrong[row])
        )
        images = data_uri(samples.images[row]), data_uri(other_images[row])
        found.append(FilledCaption(*images, masked_out, with_right, with_wrong))
    return found


def marked_caption(tokenizer: Tokenizer, tokens: Tensor, masked: Tensor, guesses: Tensor | None) -> list[Example]:
    """A caption token by token, without [CLS] and [SEP].

    Masked tokens are blanks if there are no guesses, else the guesses, marked right or wrong.
    """
    pieces, guess_of = [], dict(zip(masked.tolist(), range(len(masked)), strict=True))
    for position, token in enumerate(tokens.tolist()[1:-1], 1):
        if position not in guess_of:
            pieces.append(Example(token_text(tokenizer, token)))
        elif guesses is None:
            pieces.append(Example(" ▢"))
        else:
            guess = int(guesses[guess_of[position]])
            pieces.append(Example(token_text(tokenizer, guess), mark="right" if guess == token else "wrong"))
    return pieces


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; byte-level BPE writes the space before a word as Ġ."""
    space = " " if tokenizer.token(token).startswith("Ġ") else ""
    return space + tokenizer.decode([token])


def retrievals(
    model: MaskVLM,
    split: Dataset,
    train: Dataset | None,
    features: EncodedSplit,
    k: int = RERANK,
    workspace: Workspace | None = None,
) -> list[tuple[str, list[Retrieval]]]:
    """The right answers with the highest scores and the lowest-ranked right answers, in both directions, with titles.

    Args:
        k: candidates that ITM re-ranks; 0 for a model that was trained without ITM.
        workspace: that of `features`. Default: one in memory.
    """
    groups = []
    unseen, both = unseen_images(split, train), rank_all(model, features, k, workspace=workspace)
    queries = {"tr": features.different, "ir": torch.arange(len(features.captions))}
    for direction, title in (("tr", "Image to text"), ("ir", "Text to image")):
        ranks = both[direction]
        pool, among = ranks.itm == 0, ""
        if unseen is not None:
            unseen_pool = pool & unseen[features.different if direction == "tr" else features.owner]
            if unseen_pool.any():
                pool, among = unseen_pool, ", among unseen concepts"
        best = ranks.score.masked_fill(~pool, float("-inf")).topk(min(RETRIEVALS, int(pool.sum()))).indices
        worst = ranks.itm.topk(min(RETRIEVALS, len(ranks.itm))).indices
        for name, chosen in (
            (f"best: right, with the highest scores{among}", best),
            ("worst: right answers ranked lowest", worst),
        ):
            found = [
                retrieval(
                    split, features, direction, int(queries[direction][q]), ranks.top[q].tolist(), int(ranks.itm[q])
                )
                for q in chosen
            ]
            groups.append((f"{title}, {name}", found))
    return groups


def retrieval(
    split: Dataset, features: EncodedSplit, direction: str, query: int, answers: list[int], wrong_before: int
) -> Retrieval:
    """One query with its first answers; `wrong_before` wrong answers rank above the best right one."""

    def mark(image: int, caption: int) -> str:
        return "right" if features.right(torch.tensor(image), torch.tensor(caption)) else ""

    if direction == "tr":
        asked = Example(split.captions(query)[0], thumbnail(split, query))
        found = [Example(features.captions[a], mark=mark(query, a)) for a in answers]
    else:
        asked = Example(features.captions[query])
        found = [Example(split.captions(a)[0], thumbnail(split, a), mark(a, query)) for a in answers]
    return Retrieval(asked, wrong_before + 1, found)


def thumbnail(split: Dataset, sample: int, side: int = 96) -> str:
    """An image of the split as the model sees it, squeezed to a square, as a data URI."""
    return data_uri(load_image(split.image_bytes(sample), side))


def word_maps(model: TrainedModel, split: Dataset) -> list[tuple[WordMaps, WordMaps]]:
    """For a few images, chosen at random, maps of the words of their own caption and of another image's caption."""
    partner = partners_of(split)
    found = []
    for i in chosen_samples(WORD_MAPS, len(split), seed=3):
        own, wrong = (_maps(model, split.image_bytes(i), split.captions(j)[0]) for j in (i, int(partner[i])))
        found.append((own, wrong))
    return found


def _maps(model: TrainedModel, image: bytes, caption: str) -> WordMaps:
    words = caption.split()[:MOST_WORDS]
    while True:
        try:
            found = model.attention(image, " ".join(words))
            break
        except ConfigError:  # more tokens than the model takes
            if len(words) > 1:
                words.pop()
            elif len(words[0]) > 1:  # a URL, or a language that is written without blanks
                words = [words[0][: len(words[0]) // 2]]
            else:
                raise
    sheet = draw_words(image, found, side=SIDE, columns=1 + len(found.words))
    return WordMaps(" ".join(words), found.log_odds, data_uri(sheet))


def neighbours(split: Dataset, features: EncodedSplit) -> list[tuple[Example, list[tuple[Example, float]]]]:
    """A few images, chosen at random, each with the most similar other ones and their cosine similarities.

    An image of several samples is there once.
    """
    samples = features.different
    embeddings = features.image_embedding[samples].float()
    found = []
    for query in chosen_samples(QUERIES, len(samples), seed=4):
        similarity = embeddings @ embeddings[query]
        similarity[query] = float("-inf")
        best = similarity.topk(min(NEIGHBOURS, len(samples) - 1))
        others = samples[best.indices].tolist()
        answers = [(_image(split, i), s) for s, i in zip(best.values.tolist(), others, strict=True)]
        found.append((_image(split, int(samples[query])), answers))
    return found


def embedding_map(split: Dataset, features: EncodedSplit) -> tuple[list[tuple[Example, float, float]], float]:
    """Some images, chosen at random, at the first two principal components of all images' embeddings.

    An image of several samples is there once. Its place is from the left and from the top, in per cent. The last number
    is the share of the variance of the embeddings that lies in the map, 0 to 1.
    """
    samples = features.different
    places, explained = principal_components(features.image_embedding[samples])
    low, high = places.min(0).values, places.max(0).values
    scaled = (places - low) / (high - low).clamp(min=1e-12)
    points = [
        (_image(split, int(samples[i]), 48), 100 * float(scaled[i, 0]), 100 * (1 - float(scaled[i, 1])))
        for i in chosen_samples(MAPPED, len(samples), seed=5)
    ]
    return points, explained


def principal_components(embeddings: Tensor) -> tuple[Tensor, float]:
    """The first two principal components of embeddings (n, E): places float64 (n, 2), and their share of the variance.

    The sign of each is that which makes the sum of cubes positive, so that equal embeddings give equal maps.
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    if len(values) < 2:
        return torch.cat([centred @ directions.T, centred.new_zeros(len(centred), 2)], 1)[:, :2], 1.0
    places = centred @ directions[:2].T
    places = places * torch.where(places.pow(3).sum(0) < 0, -1.0, 1.0)
    variance = values.square()
    return places, float(variance[:2].sum() / variance.sum().clamp(min=1e-30))


def confusions(split: Dataset, features: EncodedSplit) -> list[Confusion]:
    """Captions whose most similar wrong image beats their own by most; a caption is shown once.

    An image that has a caption of the same words is not a wrong one.
    """
    images, texts, owner = features.image_embedding.double(), features.text_embedding.double(), features.owner
    repeated = features.image != torch.arange(len(images))
    margins, wrongs = [], []
    for start in range(0, len(texts), BLOCK):
        similarity = texts[start : start + BLOCK] @ images.T  # (block, n)
        own = similarity.gather(1, owner[start : start + BLOCK, None])[:, 0]
        similarity[:, repeated] = float("-inf")
        asked = torch.arange(start, start + len(similarity))[:, None]
        similarity[features.right(torch.arange(len(images)), asked)] = float("-inf")
        best = similarity.max(1)
        margins.append(best.values - own)
        wrongs.append(best.indices)
    margin, wrong = torch.cat(margins), torch.cat(wrongs)
    found: dict[int, Confusion] = {}
    for i in margin.argsort(descending=True, stable=True).tolist():
        if margin[i] <= 0 or len(found) == CONFUSIONS:
            break
        words, own, other = int(features.words[i]), int(owner[i]), int(wrong[i])
        if words not in found:
            similarity = float(texts[i] @ images[own])
            own_image, wrong_image = _image(split, own, mark="right"), _image(split, other, mark="wrong")
            found[words] = Confusion(
                features.captions[i], own_image, wrong_image, similarity, similarity + float(margin[i])
            )
    return list(found.values())


def _image(split: Dataset, sample: int, side: int = 96, mark: str = "") -> Example:
    return Example(split.captions(sample)[0], thumbnail(split, sample, side), mark)
