"""The questions to a trained model, against the network's own outputs, evaluation, and formulas in numpy."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.errors import ConfigError
from mvlm.evaluation.retrieval import encode_split, rank_all
from mvlm.inference.trained_model import TrainedModel
from mvlm.portable.clip_model import ClipTokenizer
from mvlm_dataloading import open_dataset, tokenizer_for
from mvlm_dataloading.tools.reindex import rebuild_indices
from support.data import write_dataset
from support.models import micro_model
from support.scenes import png, scene


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    """The eight images of the test split, uint8 (32, 32, 3)."""
    return [scene(3 * i + 1)[0] for i in range(8)]


@pytest.mark.slow
def test_embeddings_of_a_split_are_those_of_evaluation_to_the_digit(model, heldout_split, tokenizer):
    features = encode_split(model.network, heldout_split, tokenizer, "fp32")
    assert torch.equal(model.embed_images(heldout_split), features.image_embedding)
    assert torch.equal(model.embed_texts(heldout_split), features.text_embedding)
    assert torch.equal(model.embed_texts(features.captions, truncate=True), features.text_embedding)
    products = features.image_embedding.double().numpy() @ features.text_embedding.double().numpy().T
    np.testing.assert_allclose(model.similarity(heldout_split, heldout_split).numpy(), products, atol=1e-6)
    assert torch.equal(
        model.similarity(features.image_embedding, features.text_embedding),
        model.similarity(heldout_split, heldout_split),
    )


@pytest.mark.parametrize(
    "given", [" red heart", "red heart\n", "red  heart", "red\u2028heart\ufeff", "red\u200e heart"]
)
def test_a_text_is_cleaned_as_a_caption_of_a_data_set(model, pixels, given):
    image, text = pixels[0], "red heart"
    assert torch.equal(model.embed_texts(given), model.embed_texts(text))
    assert torch.equal(model.match(image, given).log_odds, model.match(image, text).log_odds)
    assert model.attention(image, given).words == ["[CLS]", "red", "heart"]
    assert torch.equal(*(torch.from_numpy(model.reconstruct(image, x).rebuilt) for x in (given, text)))
    assert model.fill(f"{given} [MASK]", image).text == model.fill(f"{text} [MASK]", image).text
    tokens = ClipTokenizer(model.tokenizer, 12)
    assert torch.equal(tokens(given), tokens(text))
    with pytest.raises(ConfigError, match="text 0: wanted words, found none"):
        model.embed_texts("\u200e\ufeff ")


def test_captions_of_a_data_set_are_taken_as_they_stand(model, tmp_path):
    """Captions of tars that are used in place may have several blanks: training and evaluation read them."""
    with tarfile.open(tmp_path / "test-000000.tar", "w") as tar:
        for name, content in (("0.png", png(scene(0)[0])), ("0.txt", b"red  heart")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    rebuild_indices(tmp_path)
    split = open_dataset(tmp_path, "test")
    assert split.captions(0) == ["red  heart"]
    wanted = encode_split(model.network, split, model.tokenizer, "fp32").text_embedding
    assert torch.equal(model.embed_texts(split), wanted)
    assert not torch.equal(model.embed_texts("red  heart"), wanted)


def test_an_image_in_any_form_has_the_embedding_that_it_has_in_a_data_set(model, heldout_split, pixels, tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(8)]
    for path, image in zip(paths, pixels, strict=True):
        path.write_bytes(png(image))
    wanted = model.embed_images(heldout_split)
    tensors = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    for images in (
        paths,
        [str(path) for path in paths],
        [path.read_bytes() for path in paths],
        [Image.fromarray(image) for image in pixels],
        pixels,
        np.stack(pixels),
        [image / 255 for image in pixels],
        tensors,
        list(tensors.float() / 255),
        iter(paths),
    ):
        assert torch.equal(model.embed_images(images), wanted)
    content = paths[2].read_bytes()
    for image in (paths[2], str(paths[2]), content, bytearray(content), memoryview(content), pixels[2], tensors[2]):
        torch.testing.assert_close(model.embed_images(image), wanted[2:3], rtol=0, atol=1e-6)
    assert model.embed_images([]).shape == (0, 8)


def test_iterables_are_read_as_they_are_needed(model, pixels):
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield pixels[taken % 8]

    batches = model.image_embeddings(endless(), batch_size=4)
    assert next(batches).shape == (4, 8)
    assert next(batches).shape == (4, 8)
    assert taken <= 4 * 4  # a thread is one batch ahead
    texts = model.text_embeddings((f"red {i}" for i in range(10**12)), batch_size=3)
    assert next(texts).shape == (3, 8)


def log_odds_of(model: TrainedModel, image: np.ndarray, text: str) -> float:
    """ITM's log-odds of one pair alone, by the network."""
    tokens = torch.from_numpy(model.tokenizer.encode([text], 12)[0])
    with torch.no_grad():
        v = model.network.encode_image(torch.from_numpy(image).permute(2, 0, 1)[None])
        w, mask = model.network.encode_text(tokens, torch.tensor([0, len(tokens)]), len(tokens))
        logits = model.network.matching_logits(*model.network.fuse(v, w, mask))[0].double().numpy()
    return logits[1] - logits[0]


@pytest.mark.slow
def test_matches_are_those_of_each_pair_alone(model, pixels):
    texts = [f"{word} top left on black"[: 8 + 2 * i].strip() for i, word in enumerate(["red", "blue", "green"] * 2)]
    found = model.match(pixels[:6], texts, batch_size=4)
    wanted = [log_odds_of(model, image, text) for image, text in zip(pixels, texts, strict=False)]
    np.testing.assert_allclose(found.log_odds.numpy(), wanted, atol=1e-4)
    np.testing.assert_allclose(found.probability.numpy(), 1 / (1 + np.exp(-np.array(wanted))), atol=1e-5)
    one_image = model.match(pixels[3], texts).log_odds.numpy()
    np.testing.assert_allclose(one_image, [log_odds_of(model, pixels[3], text) for text in texts], atol=1e-4)
    one_text = model.match(pixels, texts[1], batch_size=3).log_odds.numpy()
    np.testing.assert_allclose(one_text, [log_odds_of(model, image, texts[1]) for image in pixels], atol=1e-4)
    assert model.match([], []).probability.shape == (0,)
    for number in (5, 7, 8):
        with pytest.raises(ConfigError, match="wanted as many texts as images, or a single image or text"):
            model.match(pixels[:6], ["red"] * number, batch_size=4)
    with pytest.raises(ConfigError, match="a single image or text that is not in a list, found different numbers"):
        model.match(pixels[:1], ["red", "blue"])


@pytest.mark.slow
def test_candidates_are_ordered_as_evaluation_orders_them(model, heldout_split, tokenizer, pixels):
    features = encode_split(model.network, heldout_split, tokenizer, "fp32")
    for direction, queries, candidates in (("ir", features.captions, pixels), ("tr", pixels, features.captions)):
        wanted = rank_all(model.network, features, 1000, "fp32")[direction]
        for number, query in enumerate(queries):
            found = model.rerank(query, candidates, truncate=True)
            assert found.order[:5].tolist() == wanted.top[number].tolist()
            assert found.score[0].item() == pytest.approx(wanted.score[number].item(), abs=1e-4)
            assert sorted(found.order.tolist()) == list(range(len(candidates)))
            assert (found.score[:-1] >= found.score[1:]).all()


def test_classes_are_a_softmax_over_mean_embeddings_of_the_labels(model, pixels):
    labels, templates = ["red", "blue", "green top"], ["{}", "a {} square"]
    found = model.classify(pixels, labels, templates)
    text = np.stack(
        [
            np.mean([model.embed_texts(t.format(label))[0].double().numpy() for t in templates], axis=0)
            for label in labels
        ]
    )
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    logits = model.embed_images(pixels).double().numpy() @ text.T / 0.07
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(found.probability.numpy(), wanted, atol=1e-5)
    assert found.best == [labels[i] for i in wanted.argmax(1)]
    alone = model.classify(pixels[0], labels).probability
    np.testing.assert_allclose(alone.numpy(), model.classify(pixels[0], labels, ["{}"]).probability.numpy())
    assert alone.shape == (1, 3)


def test_hidden_patches_are_those_that_the_mask_touches(model, pixels):
    hide = np.zeros((32, 32), bool)
    hide[7:9, 20] = True  # rows 0 and 1 of patches, column 2
    found = model.reconstruct(pixels[0], "red", hide)
    assert np.argwhere(found.hidden).tolist() == [[0, 2], [1, 2]]
    assert np.array_equal(found.image, pixels[0])
    outside = ~np.kron(found.hidden, np.ones((8, 8), bool))
    assert np.array_equal(found.rebuilt[outside], pixels[0][outside])
    assert not np.array_equal(found.rebuilt, pixels[0])
    assert (found.masked[~outside] == 190).all()
    coarse = np.zeros((2, 2), bool)
    coarse[1, 0] = True
    assert np.argwhere(model.reconstruct(pixels[0], "red", coarse).hidden).tolist() == [[2, 0], [2, 1], [3, 0], [3, 1]]
    fine = np.zeros((1000, 3), bool)
    fine[999, 1] = True  # a third of the width: columns 1 and 2
    assert np.argwhere(model.reconstruct(pixels[0], "red", torch.from_numpy(fine)).hidden).tolist() == [[3, 1], [3, 2]]
    drawn = [model.reconstruct(pixels[0], "red", seed=seed).hidden for seed in (0, 0, 1, 2, 3)]
    assert np.array_equal(drawn[0], drawn[1])
    assert any(not np.array_equal(drawn[0], other) for other in drawn[2:])
    assert all(mask.sum() == 8 for mask in drawn)


def test_the_hash_of_a_model_is_of_weights_configuration_and_tokenizer(tokenizer, train_split):
    def hash_of(network, words=tokenizer, precision="auto"):
        return TrainedModel(network, words, precision).sha256

    same = hash_of(micro_model(dtype=torch.float32))
    assert hash_of(micro_model(dtype=torch.float32), precision="fp32") == same
    changed = micro_model(dtype=torch.float32)
    with torch.no_grad():
        changed.pixel_head.bias[3] += 1e-6
    others = [
        hash_of(changed),
        hash_of(micro_model(dtype=torch.float32, temperature=0.1)),
        hash_of(micro_model(dtype=torch.float32), tokenizer_for(train_split, 270)),
    ]
    assert len({same, *others}) == 4


def test_long_texts_are_cut_on_request(model):
    long = "red " * 40
    cut = model.embed_texts(long, truncate=True)
    assert torch.equal(cut, model.embed_texts(long + "blue", truncate=True))
    assert torch.equal(cut, model.embed_texts(long + "blue " * 30_000, truncate=True))  # as a line of OCR
    assert not torch.equal(cut, model.embed_texts("red"))


def test_the_images_of_a_split_are_those_of_its_files(tmp_path, model):
    """Images of another size than the model's: the resize is the loader's."""
    split = open_dataset(write_dataset(tmp_path / "waves", 9), "train")
    files = [split.image_bytes(i) for i in range(9)]
    assert torch.equal(model.embed_images(files), model.embed_images(split))
