"""Pairs of images and texts judged by ITM, and candidates ranked by ITC and ITM together.

Shape legend: n pairs, k candidates, B batch.
"""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mvlm.errors import ConfigError
from mvlm.inference.encode import (
    BATCH,
    ImageFeatures,
    TextFeatures,
    image_features,
    match_log_odds,
    rerank_scores,
    text_features,
)
from mvlm.inference.images import ImageLike, Images, is_single_image
from mvlm.inference.results import Matches, Ranking
from mvlm.inference.texts import Texts, each_text, text_batches
from mvlm_dataloading import Dataset

if TYPE_CHECKING:
    from mvlm.inference.trained_model import TrainedModel


def match(
    model: "TrainedModel", images: Images | Dataset, texts: Texts, batch_size: int = BATCH, truncate: bool = False
) -> Matches:
    """ITM of n pairs; `TrainedModel.match` says which."""
    found = [
        _log_odds(model, image, text) for image, text in _feature_pairs(model, images, texts, batch_size, truncate)
    ]
    log_odds = torch.cat(found) if found else torch.empty(0)
    return Matches(log_odds.sigmoid(), log_odds)


def rerank(
    model: "TrainedModel", query: ImageLike, candidates: Images | Texts, truncate: bool = False, batch_size: int = BATCH
) -> Ranking:
    """Order k candidates of one query; `TrainedModel.rerank` says which is what."""
    images, texts = (candidates, query) if isinstance(query, str) else (query, candidates)
    scores = []
    for image, text in _feature_pairs(model, cast(Images, images), cast(Texts, texts), batch_size, truncate):
        scores.append(score(model, image, text))
    joined = torch.cat(scores) if scores else torch.empty(0)
    found = joined.sort(descending=True, stable=True)
    return Ranking(found.indices, found.values)


def score(model: "TrainedModel", image: ImageFeatures, text: TextFeatures) -> Tensor:
    """ITC logit plus ITM's log-odds of B pairs, float32 (B,) on the CPU. One image or one text goes with all."""
    similarity = (image.embedding.double() * text.embedding.double()).sum(-1).cpu()
    return rerank_scores(model.network, similarity, _log_odds(model, image, text)).float()


def _log_odds(model: "TrainedModel", image: ImageFeatures, text: TextFeatures) -> Tensor:
    """ITM's log-odds of B pairs, float32 (B,) on the CPU. One image or one text goes with all of the others."""
    images, texts = torch.broadcast_tensors(torch.arange(len(image.v)), torch.arange(len(text.w.packing)))
    return match_log_odds(model.network, image.v, text.w, images, texts, model.precision).cpu()


def _feature_pairs(
    model: "TrainedModel", images: Images | Dataset, texts: Texts, batch_size: int, truncate: bool
) -> Iterator[tuple[ImageFeatures, TextFeatures]]:
    """Features of the images and texts of n pairs, in batches. A single image or text is encoded once."""
    length = model.network.config.text_length
    pixels = model.pixel_batches(images, batch_size)
    words = text_batches(each_text(texts), model.tokenizer, length, batch_size, truncate)
    encoded_images = (image_features(model.network, batch, model.precision) for batch in pixels)
    encoded_texts = (text_features(model.network, batch, model.tokenizer, model.precision) for batch in words)
    if not isinstance(images, Dataset) and is_single_image(images):
        image = next(encoded_images)
        yield from ((image, text) for text in encoded_texts)
    elif isinstance(texts, str):
        text = next(encoded_texts)
        yield from ((image, text) for image in encoded_images)
    else:
        for image, text in itertools.zip_longest(encoded_images, encoded_texts):
            if image is None or text is None or len(image.v) != len(text.embedding):
                raise ConfigError(
                    "texts: wanted as many texts as images, or a single image or text that is not in a list, found "
                    "different numbers; pair them"
                )
            yield image, text
