"""What the page shows, against the model's own answers."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.app import answers
from mvlm.errors import ConfigError


@pytest.fixture(scope="module")
def image(heldout_split) -> Image.Image:
    return Image.open(io.BytesIO(heldout_split.image_bytes(2))).convert("RGB")


def test_an_image_finds_itself_first(gallery, heldout_split, image) -> None:
    found = answers.search(gallery, "  ", image)
    assert len(found) == 8
    assert found[0].image == heldout_split.image_bytes(2)
    assert found[0].caption == heldout_split.captions(2)[0]


def test_a_text_finds_images_in_the_order_of_itc_and_itm(gallery, model, heldout_split) -> None:
    text = heldout_split.captions(0)[0]
    ranking = model.rerank(text, [heldout_split.image_bytes(i) for i in range(8)])
    assert [hit.image for hit in answers.search(gallery, text, None)] == [
        heldout_split.image_bytes(i) for i in ranking.order.tolist()
    ]


@pytest.mark.slow
def test_a_text_and_an_image_are_answered_together(gallery, model, heldout_split) -> None:
    """By the mean of both and ITM with the text: with few images, the image still decides."""
    images = [Image.open(io.BytesIO(heldout_split.image_bytes(i))).convert("RGB") for i in range(len(heldout_split))]
    orders = {tuple(found.image for found in gallery.search("a red square", image)) for image in [None, *images]}
    assert len(orders) > 1
    text = model.embed_texts("a red square")[0]
    embeddings = model.embed_images(heldout_split)
    mean = torch.nn.functional.normalize(text + model.embed_images(images[3])[0], dim=0)
    log_odds = model.match([heldout_split.image_bytes(i) for i in range(len(heldout_split))], "a red square").log_odds
    scores = model.network.log_scale.exp().item() * (embeddings @ mean).double() + log_odds
    wanted = [heldout_split.image_bytes(i) for i in scores.sort(descending=True, stable=True).indices.tolist()]
    assert [found.image for found in gallery.search("a red square", images[3])] == wanted[:12]


def test_an_empty_query_is_refused(gallery) -> None:
    with pytest.raises(ConfigError, match="query: wanted a text, an image or both, found neither"):
        answers.search(gallery, None, None)


def test_the_example_of_a_gallery_is_one_of_its_images(gallery, heldout_split) -> None:
    found = gallery.example()
    assert found.image in [heldout_split.image_bytes(i) for i in range(8)]
    assert len(found.caption.split()) >= 3


def test_each_mask_has_rows_of_guesses(model, image) -> None:
    text, rows = answers.fill(model, image, "a [MASK] [MASK]")
    expected = model.fill("a [MASK] [MASK]", image, 5)
    assert text == expected.text
    assert [row[0] for row in rows] == ["1"] * 5 + ["2"] * 5
    assert [row[1] for row in rows] == [guess.token for guesses in expected.guesses for guess in guesses]
    assert rows[0][2] == f"{100 * expected.guesses[0][0].probability:.1f} %"


def test_labels_are_classified_once(model, image) -> None:
    chances = answers.classify(model, image, "a circle\na square\na circle", "")
    expected = model.classify(image, ["a circle", "a square"])
    assert chances == dict(zip(["a circle", "a square"], expected.probability[0].tolist(), strict=True))
    with pytest.raises(ConfigError, match="labels: wanted two or more, one a line, got 1"):
        answers.classify(model, image, "a circle\na circle", "")


def test_labels_times_templates_are_bounded(model, image) -> None:
    labels, templates = "\n".join(str(i) for i in range(100)), "\n".join(["a {}"] * 10)
    assert len(answers.classify(model, image, labels, templates)) == 100
    with pytest.raises(ConfigError, match="templates: wanted at most 1,000 texts, got 100 labels times 11 templates"):
        answers.classify(model, image, labels, templates + "\nb {}")


def test_patches_are_read_as_they_were_written(model) -> None:
    side = model.network.config.image_size // model.network.config.patch_size
    hidden = np.random.default_rng(0).random((side, side)) < 0.5
    text = answers.write_patches(hidden)
    assert text == "".join("1" if hidden[row, column] else "0" for row in range(side) for column in range(side))
    np.testing.assert_array_equal(answers.read_patches(model, text), hidden)
    for other in (None, "", text[1:], text + "0", text[1:] + "2", "\u0661" * len(text)):
        with pytest.raises(ConfigError, match="image: wanted its patches, found others"):
            answers.read_patches(model, other)


def test_words_have_an_overlay_each(model, image) -> None:
    shown = answers.look(model, image, "a circle")
    assert [word for _, word in shown] == ["the whole text", *model.attention(image, "a circle").words[1:]]
    assert {each.size for each, _ in shown} == {(answers.SIDE, answers.SIDE)}


def test_hidden_patches_are_rebuilt_under_both_texts(model, image) -> None:
    hidden = answers.hide_part(model, "left half")
    right, wrong = answers.rebuild(model, image, hidden, "a circle", "a square")
    for shown, text in ((right, "a circle"), (wrong, "a square")):
        small = model.reconstruct(image, text, hidden).rebuilt
        np.testing.assert_array_equal(np.asarray(shown.resize(small.shape[:2], Image.Resampling.NEAREST)), small)
    again, same = answers.rebuild(model, image, hidden, "a circle", " ")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(same))


@pytest.mark.parametrize(
    "part, share", [("nothing", 0), ("left half", 0.5), ("right half", 0.5), ("top half", 0.5), ("bottom half", 0.5)]
)
def test_parts_hide_their_share_of_the_patches(model, part: str, share: float) -> None:
    hidden = answers.hide_part(model, part)
    assert hidden.mean() == share
    side = len(hidden)
    where = {"left half": hidden[:, : side // 2], "right half": hidden[:, side // 2 :],
             "top half": hidden[: side // 2], "bottom half": hidden[side // 2 :]}.get(part)  # fmt: skip
    assert where is None or where.all()


def test_the_scattered_part_is_that_of_training(model) -> None:
    config = model.network.config
    hidden = answers.hide_part(model, answers.PARTS[-1])
    assert abs(hidden.mean() - config.image_mask_ratio) <= (config.mask_block / config.image_size * 4) ** 2 / 2
    assert 0 < hidden.sum() < hidden.size


def test_a_click_changes_the_patch_under_it_and_no_other(model) -> None:
    before = answers.hide_part(model, "nothing")
    side = len(before)
    patch = answers.SIDE / side
    after = answers.toggle_patch(before, [1.5 * patch, 0.5 * patch])
    assert np.argwhere(after).tolist() == [[0, 1]]
    assert not before.any()
    assert not answers.toggle_patch(after, [1.5 * patch, 0.5 * patch]).any()
    assert answers.toggle_patch(before, [answers.SIDE, answers.SIDE])[-1, -1]  # on the very edge


def test_hidden_patches_are_drawn_grey(model, image) -> None:
    hidden = answers.hide_part(model, "left half")
    drawn = np.asarray(answers.draw_hidden(image, hidden))
    third = answers.SIDE // 3
    assert (np.median(drawn[:, :third], axis=(0, 1)) == 128).all()
    assert answers.draw_hidden(None, hidden) is None


@pytest.mark.parametrize("ask", [
    lambda model: answers.fill(model, None, "a [MASK]"),
    lambda model: answers.classify(model, None, "a\nb", ""),
    lambda model: answers.look(model, None, "a"),
    lambda model: answers.rebuild(model, None, np.ones((4, 4), bool), "a", ""),
])  # fmt: skip
def test_a_question_without_an_image_is_refused(model, ask) -> None:
    with pytest.raises(ConfigError, match="image: wanted an image, found none; upload one"):
        ask(model)


def test_a_rebuild_without_hidden_patches_is_refused(model, image) -> None:
    with pytest.raises(ConfigError, match="wanted a part that is rubbed out, found none"):
        answers.rebuild(model, image, answers.hide_part(model, "nothing"), "a", "")
