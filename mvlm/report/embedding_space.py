"""The embedding space of a report: nearest neighbours, a map in two dimensions, and the hardest confusions.

Everything is of the contrastive embeddings, whose product is the cosine similarity. Functions return plain data.

Shape legend: n images, m captions, E contrastive width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mvlm.evaluation.retrieval import EncodedSplit
from mvlm.report.examples import Example, chosen_samples, thumbnail
from mvlm_dataloading import Dataset

NEIGHBOURS = 5
QUERIES = 6
MAPPED = 120  # images of the map
CONFUSIONS = 8
BLOCK = 256  # rows whose similarities are computed at a time


@dataclass(frozen=True, slots=True)
class Neighbours:
    """An image, and the images that are most similar to it, with their similarities."""

    query: Example
    found: list[tuple[Example, float]]


@dataclass(frozen=True, slots=True)
class MapPoint:
    """An image of the map, and its place in per cent of the map's width and height."""

    image: Example
    left: float
    top: float


@dataclass(frozen=True, slots=True)
class EmbeddingMap:
    """Images at the first two principal components of their embeddings."""

    points: list[MapPoint]
    explained: float
    """Share of the variance of the embeddings that lies in the map, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """A caption that is more similar to a wrong image than to its own."""

    caption: str
    own: Example
    wrong: Example
    own_similarity: float
    wrong_similarity: float


def neighbours(split: Dataset, features: EncodedSplit) -> list[Neighbours]:
    """The most similar other images of a few images, chosen at random. An image of several samples is there once."""
    samples = features.different
    embeddings = features.image_embedding[samples].float()
    found = []
    for query in chosen_samples(QUERIES, len(samples), seed=4):
        similarity = embeddings @ embeddings[query]
        similarity[query] = float("-inf")
        best = similarity.topk(min(NEIGHBOURS, len(samples) - 1))
        others = samples[best.indices].tolist()
        answers = [(_image(split, i), s) for s, i in zip(best.values.tolist(), others, strict=True)]
        found.append(Neighbours(_image(split, int(samples[query])), answers))
    return found


def embedding_map(split: Dataset, features: EncodedSplit) -> EmbeddingMap:
    """Some images, chosen at random, at the first two principal components of all images' embeddings.

    An image of several samples is there once.
    """
    samples = features.different
    places, explained = principal_components(features.image_embedding[samples])
    low, high = places.min(0).values, places.max(0).values
    scaled = (places - low) / (high - low).clamp(min=1e-12)
    points = [
        MapPoint(_image(split, int(samples[i]), 48), 100 * float(scaled[i, 0]), 100 * (1 - float(scaled[i, 1])))
        for i in chosen_samples(MAPPED, len(samples), seed=5)
    ]
    return EmbeddingMap(points, explained)


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

    An image that has the same caption is not a wrong one.
    """
    images, texts, owner = features.image_embedding.double(), features.text_embedding.double(), features.owner
    repeated = features.image != torch.arange(len(images))
    with_caption: dict[str, list[int]] = {}
    for caption, image in zip(features.captions, owner.tolist(), strict=True):
        with_caption.setdefault(caption, []).append(image)
    margins, wrongs = [], []
    for start in range(0, len(texts), BLOCK):
        similarity = texts[start : start + BLOCK] @ images.T  # (block, n)
        own = similarity.gather(1, owner[start : start + BLOCK, None])[:, 0]
        similarity[:, repeated] = float("-inf")
        for row, caption in enumerate(features.captions[start : start + BLOCK]):
            similarity[row, with_caption[caption]] = float("-inf")
        best = similarity.max(1)
        margins.append(best.values - own)
        wrongs.append(best.indices)
    margin, wrong = torch.cat(margins), torch.cat(wrongs)
    found: dict[str, Confusion] = {}
    for i in margin.argsort(descending=True, stable=True).tolist():
        if margin[i] <= 0 or len(found) == CONFUSIONS:
            break
        caption, own, other = features.captions[i], int(owner[i]), int(wrong[i])
        if caption not in found:
            similarity = float(texts[i] @ images[own])
            own_image, wrong_image = _image(split, own, mark="right"), _image(split, other, mark="wrong")
            found[caption] = Confusion(caption, own_image, wrong_image, similarity, similarity + float(margin[i]))
    return list(found.values())


def _image(split: Dataset, sample: int, side: int = 96, mark: str = "") -> Example:
    return Example(split.captions(sample)[0], thumbnail(split, sample, side), mark)
