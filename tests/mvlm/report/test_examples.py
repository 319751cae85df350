"""Examples of a report, with the micro model, made-up ranks, and numpy on made-up embeddings."""

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.evaluation.cross_modal_gain import partners_of
from mvlm.evaluation.retrieval import EncodedSplit
from mvlm.inference.trained_model import TrainedModel
from mvlm.report import examples
from mvlm.report.html import data_uri
from mvlm_dataloading import Dataset, open_dataset
from support.models import micro_model
from support.scenes import scene, write_samples, write_scenes


@pytest.fixture(scope="module")
def network():
    return micro_model(dtype=torch.float32).eval()


def text_of(pieces: list[examples.Example]) -> str:
    return "".join(piece.text for piece in pieces)


def scene_uri(number: int) -> str:
    return data_uri(torch.from_numpy(scene(number)[0]).permute(2, 0, 1))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A row for each caption: three rows an image, and two of the four captions."""
    samples = [(i // 3, [f"row {i} of {scene(i // 3)[1]}"], {"image_id": i // 3}) for i in range(12)]
    return write_samples(tmp_path_factory.mktemp("rows") / "d", samples, "test")


def test_each_sample_is_shown_with_its_own_partner_and_with_anothers(network, tokenizer, rows):
    uris, partner = [scene_uri(image) for image in range(4)], partners_of(rows).tolist()
    filled = examples.filled_captions(network, tokenizer, rows)
    for i, one in enumerate(filled):
        assert (uris.index(one.right_image), uris.index(one.wrong_image)) == (i // 3, partner[i] // 3)
        assert partner[i] // 3 != i // 3
        assert text_of(one.masked).count("▢") == sum(bool(piece.mark) for piece in one.with_right) > 0
        assert not any(piece.mark for piece in one.masked)
    strips = examples.reconstructions(network, tokenizer, rows)
    assert (len(filled), len(strips)) == (12, 12)
    for i, (original, masked, own, wrong) in enumerate(strips):
        assert (original.text, masked.text, original.image) == ("original", "masked", uris[i // 3])
        assert (own.text, wrong.text) == (rows.captions(i)[0], rows.captions(partner[i])[0])
        assert len({panel.image for panel in (original, masked, own, wrong)}) == 4


@pytest.mark.slow
def test_each_image_has_maps_of_its_own_caption_and_of_a_wrong_one(tokenizer, heldout_split):
    model = TrainedModel(micro_model(dtype=torch.float32, text_length=40), tokenizer, "fp32")
    found = examples.word_maps(model, heldout_split)
    partner = partners_of(heldout_split)
    captions = [heldout_split.captions(i)[0] for i in range(len(heldout_split))]
    assert len(found) == 4
    for own, wrong in found:
        i = captions.index(own.caption)
        assert wrong.caption == captions[int(partner[i])]
        for maps in (own, wrong):
            match = model.match(heldout_split.image_bytes(i), maps.caption)
            assert abs(match.log_odds.item() - maps.log_odds) < 1e-4
            with Image.open(io.BytesIO(base64.b64decode(maps.panels.partition(",")[2]))) as panels:
                assert panels.width == examples.SIDE * (2 + len(maps.caption.split()))  # the image, [CLS], the words


@pytest.mark.slow
@pytest.mark.parametrize("caption", ["{} " + "a long caption " * 9, "https:" + "/a" * 40])
def test_captions_are_cut_to_what_the_model_takes(tokenizer, tmp_path, caption):
    """The second is a language that is written without blanks, or a URL."""
    data = write_scenes(tmp_path / "data", {"train": 4, "test": 4}, captions=lambda i: [caption.format(i)])
    model = TrainedModel(micro_model(dtype=torch.float32, text_length=14), tokenizer, "fp32")
    for pair in examples.word_maps(model, open_dataset(data, "test")):
        for maps in pair:
            assert 1 <= len(maps.caption.split()) < examples.MOST_WORDS
            assert len(maps.caption) > 3
            assert len(tokenizer.encode([maps.caption], 99)[0]) <= 14


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


@pytest.mark.parametrize("image", [list(range(10)), [0, 0, 0, 0, 4, 4, 4, 7, 8, 9]])
def test_neighbours_and_the_map_are_of_different_images(split, features, image):
    """Copies of an image that samples share are neither queries nor neighbours nor on the map."""
    copies = {"image": torch.tensor(image), "image_embedding": features.image_embedding[image]}
    features = replace(features, **copies)
    different = {split.captions(i)[0]: i for i in sorted(set(image))}
    embeddings = features.image_embedding.double().numpy()
    found = examples.neighbours(split, features)
    assert len({query.text for query, _ in found}) == len(found) == min(examples.QUERIES, len(different))
    for query, answers in found:
        similarity = embeddings @ embeddings[different[query.text]]
        others = sorted((i for i in different.values() if i != different[query.text]), key=lambda i: -similarity[i])
        assert [different[answer.text] for answer, _ in answers] == others[: examples.NEIGHBOURS]
        np.testing.assert_allclose([s for _, s in answers], similarity[others[: examples.NEIGHBOURS]], atol=1e-6)
    points, explained = examples.embedding_map(split, features)
    assert {point.text for point, _, _ in points} == set(different)
    alone = torch.from_numpy(embeddings[list(different.values())])
    places, share = examples.principal_components(alone)
    assert explained == pytest.approx(share)
    _, left, top = zip(*points, strict=True)
    for found, axis, sign in ((left, 0, 1), (top, 1, -1)):
        assert (min(found), max(found)) == (0, 100)
        assert sign * np.corrcoef(np.array(found, dtype=float), places[:, axis])[0, 1] == pytest.approx(1)


def test_the_map_is_the_first_two_principal_components():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 5)) * [5, 0.1, 3, 0.2, 0.1] + [9, 8, 7, 6, 5]
    places, explained = examples.principal_components(torch.from_numpy(x))
    values, vectors = np.linalg.eigh(np.cov(x.T))  # rising
    wanted = (x - x.mean(0)) @ vectors[:, [-1, -2]]
    for axis in range(2):
        assert abs(np.corrcoef(places[:, axis], wanted[:, axis])[0, 1]) == pytest.approx(1)
        assert np.std(places[:, axis].numpy()) == pytest.approx(np.std(wanted[:, axis]))
    assert explained == pytest.approx(values[-2:].sum() / values.sum())
    again, _ = examples.principal_components(torch.from_numpy(x[::-1].copy()))
    torch.testing.assert_close(again.flip(0), places)  # the order of images turns nothing round


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
    found = examples.confusions(split, features)
    assert [confusion.caption for confusion in found] == list(best)[: examples.CONFUSIONS]
    for confusion in found:
        margin, owner, j = best[confusion.caption]
        assert (confusion.own.text, confusion.wrong.text) == (split.captions(owner)[0], split.captions(j)[0])
        assert confusion.wrong_similarity - confusion.own_similarity == pytest.approx(margin)
        assert (confusion.own.mark, confusion.wrong.mark) == ("right", "wrong")


def test_an_image_with_the_same_caption_is_no_confusion(split):
    images = np.eye(10)
    owner = [i for i in range(10) for _ in split.captions(i)]
    right = features_of(split, images, images[owner])
    assert examples.confusions(split, right) == []
    swapped = features_of(split, images[[1, 0, *range(2, 10)]], images[owner])
    assert {confusion.caption for confusion in examples.confusions(split, swapped)} == {
        caption for i in (0, 1) for caption in split.captions(i)
    }
    same = replace(swapped, captions=["a square", " A  Square "] * (len(owner) // 2) + ["a square"] * (len(owner) % 2))
    assert examples.confusions(split, same) == []
