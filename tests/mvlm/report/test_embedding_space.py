"""Nearest neighbours, map and confusions of a report, against numpy on made-up embeddings."""

import numpy as np
import pytest
import torch

from mvlm.evaluation.retrieval import EncodedSplit
from mvlm.report import embedding_space as space
from mvlm_dataloading import Dataset, open_dataset
from support.scenes import write_scenes


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Dataset:
    return open_dataset(write_scenes(tmp_path_factory.mktemp("space") / "data", {"train": 4, "test": 10}), "test")


def features_of(split: Dataset, images: np.ndarray, texts: np.ndarray) -> EncodedSplit:
    """Features of a split with these embeddings; the caption of a row is that of the split."""
    captions = [caption for i in range(len(split)) for caption in split.captions(i)]
    owner = torch.tensor([i for i in range(len(split)) for _ in split.captions(i)])
    nothing = torch.zeros(0)
    v, w = (torch.from_numpy(x / np.linalg.norm(x, axis=1, keepdims=True)).float() for x in (images, texts))
    return EncodedSplit(nothing, nothing, nothing, v, w, torch.arange(len(v)), owner, nothing, captions)


@pytest.fixture
def features(split) -> EncodedSplit:
    rng = np.random.default_rng(0)
    return features_of(split, rng.normal(size=(10, 6)), rng.normal(size=(15, 6)))


def test_neighbours_are_the_most_similar_other_images(split, features):
    embeddings = features.image_embedding.double().numpy()
    names = [split.captions(i)[0] for i in range(10)]
    found = space.neighbours(split, features)
    assert len(found) == space.QUERIES
    for row in found:
        query = names.index(row.query.text)
        similarity = embeddings @ embeddings[query]
        order = [i for i in np.argsort(-similarity) if i != query][: space.NEIGHBOURS]
        assert [image.text for image, _ in row.found] == [names[i] for i in order]
        np.testing.assert_allclose([s for _, s in row.found], similarity[order], atol=1e-6)


def test_neighbours_are_different_images_in_data_with_a_row_for_each_caption(split, features):
    """Samples 0 to 3 are one image and 4 to 6 another; their copies are neither queries nor neighbours."""
    image = torch.tensor([0, 0, 0, 0, 4, 4, 4, 7, 8, 9])
    embeddings = features.image_embedding[image]
    copies = EncodedSplit(**{**vars(features), "image": image, "image_embedding": embeddings})
    different = {split.captions(i)[0]: i for i in (0, 4, 7, 8, 9)}
    found = space.neighbours(split, copies)
    assert len({row.query.text for row in found}) == len(found) == 5
    for row in found:
        query = different[row.query.text]
        similarity = (embeddings @ embeddings[query]).tolist()
        others = sorted((i for i in different.values() if i != query), key=lambda i: -similarity[i])
        assert [different[image.text] for image, _ in row.found] == others
        np.testing.assert_allclose([s for _, s in row.found], [similarity[i] for i in others], atol=1e-6)


def test_a_map_has_an_image_of_several_samples_once(split, features):
    image = torch.tensor([0, 0, 0, 0, 4, 4, 4, 7, 8, 9])
    copies = EncodedSplit(**{**vars(features), "image": image, "image_embedding": features.image_embedding[image]})
    found = space.embedding_map(split, copies)
    alone = space.principal_components(features.image_embedding[[0, 4, 7, 8, 9]])
    assert len({point.image.text for point in found.points}) == len(found.points) == 5
    assert found.explained == pytest.approx(alone[1])


def test_the_map_is_the_first_two_principal_components():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5)) * [5, 0.1, 3, 0.2, 0.1] + [9, 8, 7, 6, 5]
    places, explained = space.principal_components(torch.from_numpy(x))
    values, vectors = np.linalg.eigh(np.cov(x.T))  # rising
    wanted = (x - x.mean(0)) @ vectors[:, [-1, -2]]
    for axis in range(2):
        assert abs(np.corrcoef(places[:, axis], wanted[:, axis])[0, 1]) == pytest.approx(1)
        assert np.std(places[:, axis].numpy()) == pytest.approx(np.std(wanted[:, axis]))
    assert explained == pytest.approx(values[-2:].sum() / values.sum())
    again, _ = space.principal_components(torch.from_numpy(x[::-1].copy()))
    torch.testing.assert_close(again.flip(0), places)  # the order of images turns nothing round


def test_a_map_has_room_for_every_image(split, features):
    found = space.embedding_map(split, features)
    assert len(found.points) == 10
    for axis in ("left", "top"):
        places = [getattr(point, axis) for point in found.points]
        assert (min(places), max(places)) == (0, 100)
    equal = features_of(split, np.ones((10, 6)), np.ones((15, 6)))
    assert {(point.left, point.top) for point in space.embedding_map(split, equal).points} == {(0, 100)}


def test_confusions_are_the_captions_that_a_wrong_image_beats_by_most(split, features):
    images, texts = features.image_embedding.double().numpy(), features.text_embedding.double().numpy()
    wanted = []
    for i, (caption, owner) in enumerate(zip(features.captions, features.owner.tolist(), strict=True)):
        for j in range(10):
            wanted.append((texts[i] @ images[j] - texts[i] @ images[owner], caption, owner, j))
    best = {}
    for margin, caption, owner, j in sorted(wanted, reverse=True):
        if margin > 0:
            best.setdefault(caption, (margin, owner, j))
    found = space.confusions(split, features)
    assert [confusion.caption for confusion in found] == list(best)[: space.CONFUSIONS]
    for confusion in found:
        margin, owner, j = best[confusion.caption]
        assert (confusion.own.text, confusion.wrong.text) == (split.captions(owner)[0], split.captions(j)[0])
        assert confusion.wrong_similarity - confusion.own_similarity == pytest.approx(margin)
        assert (confusion.own.mark, confusion.wrong.mark) == ("right", "wrong")


def test_an_image_with_the_same_caption_is_no_confusion(split):
    images = np.eye(10)
    owner = [i for i in range(10) for _ in split.captions(i)]
    right = features_of(split, images, images[owner])
    assert space.confusions(split, right) == []
    swapped = features_of(split, images[[1, 0, *range(2, 10)]], images[owner])
    assert {confusion.caption for confusion in space.confusions(split, swapped)} == {
        caption for i in (0, 1) for caption in split.captions(i)
    }
    same = EncodedSplit(**{**vars(swapped), "captions": ["a square"] * len(owner)})
    assert space.confusions(split, same) == []
