"""Queries to an index by a text, an image or both, with answers re-ranked by ITM."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.errors import ConfigError, RunError
from mvlm.inference.encode import rerank_scores
from mvlm.inference.images import ImageLike
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import Collection, FolderCollection, open_collection
from mvlm.search.embed import KINDS
from mvlm.search.index import Hit, SearchIndex
from mvlm_dataloading.images.limits import ImageRefusedError
from mvlm_dataloading.urls import is_remote, normal_url


def search(
    model: TrainedModel,
    index: SearchIndex,
    text: str | None = None,
    image: ImageLike | None = None,
    *,
    kind: str = "images",
    top: int = 10,
    rerank: int = 0,
    where: str | None = None,
    sources: Sequence[str] = (),
) -> list[Hit]:
    """The answers most similar to a text, an image, or the mean of both, best first.

    Args:
        kind: images or texts.
        top: number of answers.
        rerank: candidates whose order ITM decides, as in `mvlm eval retrieval`. Images need a text in the query, texts
            an image.
        where: SQL condition on columns of the index.
        sources: URLs of collections whose images may be read to re-rank them.

    Raises:
        RunError: the index is of another model, or an image is missing.
        ConfigError: the query is empty or cannot be re-ranked, or a number is negative.
    """
    if top < 1 or rerank < 0:
        raise ConfigError(f"top: wanted at least 1, and rerank of at least 0, got {top} and {rerank}")
    if kind not in KINDS:
        raise ConfigError(f"kind: wanted {' or '.join(KINDS)}, got {kind!r}")
    index.check_model(model.sha256, "queries")
    partner = text if kind == "images" else image
    if rerank and partner is None:
        needed = "a text" if kind == "images" else "an image"
        raise ConfigError(
            f"rerank: wanted {needed} in the query to re-rank {kind}, found none; add it, or do not re-rank"
        )
    vector = query_vector(model, text, image).numpy()
    hits = index.search(vector, kind, max(top, rerank), where)
    if rerank and hits:
        images = ImageReader(index, sources)
        hits = [*_rerank(model, images, partner, kind, hits[:rerank]), *hits[rerank:]]
    return hits[:top]


def query_vector(model: TrainedModel, text: str | None, image: ImageLike | None) -> Tensor:
    """Embedding of a query, float32 (E,), of unit length. Of a text and an image: their mean, scaled to unit length."""
    parts = [] if text is None else [model.embed_texts(text)]
    parts += [] if image is None else [model.embed_images(image)]
    if not parts:
        raise ConfigError("query: wanted a text, an image or both, found neither")
    return parts[0][0] if len(parts) == 1 else F.normalize(torch.cat(parts).mean(0), dim=-1)


def _rerank(model: TrainedModel, images: "ImageReader", partner: Any, kind: str, hits: list[Hit]) -> list[Hit]:
    """Sort answers again by the ITC logit of query and answer plus ITM's log-odds that they belong together.

    Args:
        images: reads the answers' images.
        partner: the query's text if the answers are images, its image if they are texts.
        kind: images or texts, the answers.
    """
    if kind == "images":
        log_odds = model.match((images.read(hit) for hit in hits), partner).log_odds
    else:
        log_odds = model.match(partner, [hit.text for hit in hits], truncate=True).log_odds
    similarity = torch.tensor([hit.similarity for hit in hits], dtype=torch.float64)
    scores = rerank_scores(model.network, similarity, log_odds)
    order = scores.sort(descending=True, stable=True).indices.tolist()
    return [hits[i]._replace(score=scores[i].item()) for i in order]


class ImageReader:
    """Reader of the encoded images of an index, from the collections that were embedded.

    An index may come from others, and name any folder. An image is given out only if it is the one that was embedded,
    by its SHA-256, and a URL is read only if the user names it.

    Args:
        sources: URLs of collections that may be read.
    """

    def __init__(self, index: SearchIndex, sources: Sequence[str] = ()) -> None:
        self._index, self._named = index, {normal_url(url) for url in sources}
        self._opened: dict[int, Collection] = {}

    def read(self, hit: Hit) -> bytes:
        """Encoded image of an answer; for a caption, the image that it describes. RunError if it is gone or changed."""
        if not hit.image:
            raise RunError(
                f"{self._index.location}: wanted hashes of the images, which earlier versions did not write; embed and "
                "index them again to see them"
            )
        sources = self._index.sources
        if hit.split not in sources[hit.source].get("splits", [hit.split]):
            self._index.reload()  # another process has added to it
            self._opened.pop(hit.source, None)
        source = self._index.sources[hit.source]
        if hit.source not in self._opened:
            self._opened[hit.source] = self._open(source)
        id = hit.id.rpartition("#")[0] if hit.text else hit.id
        place = Path(source["path"]) / id
        try:
            content = self._opened[hit.source].image_bytes(id, hit.split, hit.row)
        except (OSError, ImageRefusedError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.kind
            raise RunError(
                f"{place}: wanted the image that was embedded, found none ({reason}); restore it, or remove it from "
                "the index"
            ) from None
        if hashlib.sha256(content).hexdigest() != hit.image:
            raise RunError(
                f"{place}: wanted the image that was embedded, found another; embed and index {source['path']} again"
            )
        return content

    def _open(self, source: dict[str, Any]) -> Collection:
        path = source["path"]
        if is_remote(path) and normal_url(path) not in self._named:
            raise RunError(
                f"{self._index.location}: its images are at {path}, which the index names; give --source {path} to "
                "read them"
            )
        if source["kind"] == "folder":
            return FolderCollection(Path(path), [])
        return open_collection(path, source.get("splits"))
