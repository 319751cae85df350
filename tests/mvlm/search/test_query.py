"""Queries: the order of evaluation, texts and images together, and what is refused."""

from typing import Any

import pytest
import torch

from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.retrieval import encode_split, rank_all
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import create_index
from mvlm.search.query import ImageReader, query_vector, search
from support.models import ALONE, micro_model
from support.packages import needs
from support.scenes import png, scene

pytestmark = needs("lancedb")


@pytest.fixture(scope="module")
def index(model, scenes, tmp_path_factory):
    """The test split, whose images all differ."""
    folder = tmp_path_factory.mktemp("search")
    embed(model, open_collection(scenes, ["test"]), folder / "embedded", ALONE)
    return create_index(folder / "embedded", str(folder / "index"), "flat")


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 8])
def test_answers_are_ranked_as_evaluation_ranks_them(model, index, heldout_split, k):
    features = encode_split(model.network, heldout_split, model.tokenizer, "fp32")
    images = rank_all(model.network, features, k, "fp32")["ir"]
    for number, caption in enumerate(features.captions):
        if len(model.tokenizer.encode([caption], 99)[0]) > 12:
            continue  # refused as a query
        hits = search(model, index, caption, top=5, rerank=k)
        assert [hit.row for hit in hits][: min(5, k)] == images.top[number].tolist()
        assert hits[0].score == pytest.approx(images.score[number].item(), abs=1e-4)
        plain = search(model, index, caption, top=8)
        similarity = features.text_embedding[number] @ features.image_embedding.T
        assert [hit.row for hit in plain] == similarity.sort(descending=True, stable=True).indices.tolist()
    texts = rank_all(model.network, features, k, "fp32")["tr"]
    for number in range(8):
        hits = search(model, index, image=heldout_split.image_bytes(number), kind="texts", top=5, rerank=k)
        wanted = [features.captions[row] for row in texts.top[number].tolist()]
        assert [hit.text for hit in hits][: min(5, k)] == wanted
        assert hits[0].score == pytest.approx(texts.score[number].item(), abs=1e-4)


@pytest.mark.slow
def test_a_text_and_an_image_are_asked_together_by_their_mean(model, index):
    image = png(scene(2)[0])
    a, b = model.embed_texts("red")[0].double(), model.embed_images(image)[0].double()
    wanted = (a + b) / (a + b).norm()
    torch.testing.assert_close(query_vector(model, "red", image).double(), wanted, atol=1e-6, rtol=0)
    hits = search(model, index, "red", image, top=8)
    vectors = model.embed_images([ImageReader(index).read(hit) for hit in hits]).double()
    assert [hit.similarity for hit in hits] == pytest.approx((vectors @ wanted).tolist(), abs=1e-6)


def test_queries_that_cannot_be_answered_are_refused(model, index, tokenizer, pictures, tmp_path):
    other = TrainedModel(micro_model(seed=1, dtype=torch.float32), tokenizer, "fp32")
    image = png(scene(0)[0])
    refused: list[Any] = [
        (other, "red", None, {}, RunError, "wanted queries of the model .* of this index"),
        (model, None, None, {}, ConfigError, "query: "),
        (model, "red", None, {"kind": "sounds"}, ConfigError, "kind: "),
        (model, "red", None, {"top": 0}, ConfigError, "top: "),
        (model, "red", None, {"top": -1, "rerank": 5}, ConfigError, "top: "),
        (model, "red", None, {"rerank": -2}, ConfigError, "rerank of at least 0"),
        (model, None, image, {"rerank": 3}, ConfigError, "rerank: wanted a text"),
        (model, "red", None, {"rerank": 3, "kind": "texts"}, ConfigError, "rerank: wanted an image"),
    ]
    for of, text, given, options, error, words in refused:
        with pytest.raises(error, match=words):
            search(of, index, text, given, **options)
    assert search(model, index, "red", rerank=3, where="split = 'train'") == []
    embed(model, open_collection(pictures), tmp_path / "embedded", ALONE)
    folder = create_index(tmp_path / "embedded", str(tmp_path / "index"))
    (pictures / "6.png").unlink()
    with pytest.raises(RunError, match=r"6.png: wanted the image that was embedded, found none"):
        search(model, folder, "red", rerank=10)


def test_an_index_of_others_shows_no_other_image(model, pictures, tmp_path):
    """An index names any folder and any path: absolute, one above, a link, or another image of the same name."""
    embed(model, open_collection(pictures), tmp_path / "embedded", ALONE)
    index = create_index(tmp_path / "embedded", str(tmp_path / "index"))
    private = tmp_path / "private"
    private.mkdir()
    (private / "0.png").write_bytes(png(scene(20)[0]))
    (pictures / "link.png").symlink_to(private / "0.png")
    hit = index.search(model.embed_texts("red")[0].numpy(), top=1)[0]
    assert ImageReader(index).read(hit) == (pictures / hit.id).read_bytes()
    for id in ("../private/0.png", str(private / "0.png"), "deep/../../private/0.png", "link.png"):
        with pytest.raises(RunError):
            ImageReader(index).read(hit._replace(id=id))
    index.sources[0]["path"] = str(private)
    with pytest.raises(RunError, match="found another"):
        ImageReader(index).read(hit._replace(id="0.png"))
    index.sources[0]["path"] = "http://127.0.0.1:1/pictures"
    with pytest.raises(RunError, match="--source"):
        ImageReader(index).read(hit)
