"""Queries: the order of evaluation, texts and images together, and what is refused."""

import pytest
import torch

from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.retrieval import encode_split, rank_all
from mvlm.inference.trained_model import TrainedModel
from mvlm.search.collection import open_collection
from mvlm.search.embed import embed
from mvlm.search.index import create_index
from mvlm.search.query import ImageReader, query_vector, search
from support.models import micro_model
from support.packages import needs
from support.scenes import png, scene

pytestmark = needs("lancedb")


@pytest.fixture(scope="module")
def index(model, scenes, tmp_path_factory, alone):
    """The test split, whose images all differ."""
    folder = tmp_path_factory.mktemp("search")
    embed(model, open_collection(scenes, ["test"]), folder / "embedded", alone)
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


@pytest.mark.slow
def test_images_of_answers_are_read_from_their_collection(model, index, heldout_split):
    images = ImageReader(index)
    for kind in ("images", "texts"):
        for hit in search(model, index, "red", kind=kind, top=4):
            assert images.read(hit) == heldout_split.image_bytes(hit.row)


@pytest.mark.parametrize("numbers", [{"top": 0}, {"top": -1, "rerank": 5}, {"rerank": -2}])
def test_numbers_below_their_least_are_refused(model, index, numbers):
    with pytest.raises(ConfigError, match="top: wanted at least 1, and rerank of at least 0, got"):
        search(model, index, "a red square", **numbers)


def test_queries_that_cannot_be_answered_are_refused(model, index, tokenizer, pictures, alone, tmp_path):
    other = TrainedModel(micro_model(seed=1, dtype=torch.float32), tokenizer, "fp32")
    with pytest.raises(RunError, match=r"wanted queries of the model .* of this index, found .*; use that model"):
        search(other, index, "red")
    with pytest.raises(ConfigError, match="query: wanted a text, an image or both, found neither"):
        search(model, index)
    with pytest.raises(ConfigError, match="rerank: wanted a text in the query to re-rank images, found none"):
        search(model, index, image=png(scene(0)[0]), rerank=3)
    with pytest.raises(ConfigError, match="rerank: wanted an image in the query to re-rank texts, found none"):
        search(model, index, "red", kind="texts", rerank=3)
    assert search(model, index, "red", rerank=3, where="split = 'train'") == []
    embed(model, open_collection(pictures), tmp_path / "embedded", alone)
    folder = create_index(tmp_path / "embedded", str(tmp_path / "index"))
    (pictures / "6.png").unlink()
    with pytest.raises(RunError, match=r"6.png: wanted the image that was embedded, found none"):
        search(model, folder, "red", rerank=10)
