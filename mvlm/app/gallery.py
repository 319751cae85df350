"""Images that the page searches: a split of a data set in memory, or an index of `mvlm search`."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from mvlm.config.json_files import read_config
from mvlm.errors import ConfigError, RunError
from mvlm.inference.encode import rerank_scores
from mvlm.inference.trained_model import TrainedModel
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import find_checkpoint, find_run
from mvlm.runs.load import open_named_data
from mvlm.search.index import SearchIndex
from mvlm.search.query import ImageReader, query_vector, search
from mvlm_dataloading import DataError, Dataset, open_dataset
from mvlm_dataloading.dataset.description import read_description

MOST_IMAGES = 1000
"""Images of a data set that are embedded when the page starts. An index has no limit."""
RERANKED = 24
SHOWN = 12
SPLITS = ("test", "validation", "train")


class Found(NamedTuple):
    """An answer of a search."""

    image: bytes
    """Encoded."""
    caption: str


class Gallery(Protocol):
    """Images with captions, searched by a text, an image, or the mean of both. ITM, if trained, re-ranks for a text."""

    description: str
    """Number and source of the images, in words."""

    def search(self, text: str | None, image: Image.Image | None) -> list[Found]:
        """The best answers, best first."""
        ...

    def example(self) -> Found:
        """An image with its caption, to begin with."""
        ...


class DatasetGallery:
    """The first images of a split, embedded when it is made."""

    def __init__(self, model: TrainedModel, dataset: Dataset, name: str) -> None:
        self._model = model
        self._dataset = dataset.head(min(MOST_IMAGES, len(dataset)))
        self._embeddings = model.embed_images(self._dataset)
        first = "" if len(dataset) <= MOST_IMAGES else "the first "
        self.description = f"{first}{len(self._dataset):,} images of {name}"

    def search(self, text: str | None, image: Image.Image | None) -> list[Found]:
        similarity = self._embeddings @ query_vector(self._model, text, image)
        order = similarity.topk(min(RERANKED, len(similarity))).indices.tolist()
        if text is not None and self._model.network.matching_is_trained:
            log_odds = self._model.match([self._dataset.image_bytes(i) for i in order], text).log_odds
            scores = rerank_scores(self._model.network, similarity[order], log_odds)
            order = [order[i] for i in scores.sort(descending=True, stable=True).indices.tolist()]
        return [self._found(i) for i in order[:SHOWN]]

    def example(self) -> Found:
        found = (self._found(i) for i in range(min(50, len(self._dataset))))
        return next((each for each in found if len(each.caption.split()) >= 3), self._found(0))

    def _found(self, i: int) -> Found:
        return Found(self._dataset.image_bytes(i), self._dataset.captions(i)[0])


class IndexGallery:
    """The images of an index.

    Args:
        name: of the index, for visitors.
        sources: URLs of collections whose images may be read.
    """

    def __init__(self, model: TrainedModel, index: SearchIndex, name: str, sources: Sequence[str] = ()) -> None:
        index.check_model(model.sha256, "queries")
        self._model, self._index, self._sources = model, index, sources
        self._images = ImageReader(index, sources)
        self.description = f"{index.count('images'):,} images of {name}"

    def search(self, text: str | None, image: Image.Image | None) -> list[Found]:
        reranked = RERANKED if text is not None and self._model.network.matching_is_trained else 0
        hits = search(self._model, self._index, text, image, top=SHOWN, rerank=reranked, sources=self._sources)
        captions = self._index.first_captions(hits)
        return [Found(self._images.read(hit), caption or hit.id) for hit, caption in zip(hits, captions, strict=True)]

    def example(self) -> Found:
        found = self.search("a", None)
        if not found:
            raise ConfigError("index: wanted images, found none; add some with `mvlm search add`")
        return found[0]


def open_gallery(model: TrainedModel, data: Path) -> DatasetGallery:
    """The test images of a data set, or those of another split if it has none. DataError for a folder without data."""
    splits = read_description(data)["splits"]
    split = next((name for name in SPLITS if name in splits), next(iter(splits)))
    return DatasetGallery(model, open_dataset(data, split), f"{data}, {split} split")


def data_of_run(source: Path) -> Path | None:
    """Data folder of a run or of one of its checkpoints; None if it is not here, or if `source` is no run.

    A run may come from others, and name any folder: it has to hold the data that the run was trained on.
    """
    run = find_run(source)
    if run is None:
        return None
    data = read_config(run.config).get("data")
    trained_on = read_state(find_checkpoint(source)).get("loader", {}).get("fingerprint")
    try:
        return open_named_data(run.config, data, "train", trained_on).folder
    except (RunError, DataError):
        return None
