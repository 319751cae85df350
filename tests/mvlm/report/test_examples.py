"""Examples of a report, with the micro model and with made-up ranks."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from mvlm.evaluation.cross_modal_gain import partners_of
from mvlm.evaluation.evaluate import unseen_images
from mvlm.evaluation.retrieval import Ranks, encode_split
from mvlm.report import examples
from mvlm.report.html import data_uri
from mvlm_dataloading import ShardWriter, open_dataset
from support.models import micro_model
from support.scenes import png, scene, write_scenes


@pytest.fixture(scope="module")
def model():
    return micro_model(dtype=torch.float32).eval()


def test_a_thumbnail_is_what_the_model_sees(tmp_path):
    """An image that is turned by its EXIF data, and one of 16 bits."""
    grey = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8), (64, 64))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn
    turned, deep = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.stack([grey] * 3, axis=-1)).save(turned, "PNG", exif=exif)
    Image.fromarray(grey.astype(np.uint16) * 257).save(deep, "PNG")
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for key, file in (("a", turned), ("b", deep)):
            writer.add(key, file.getvalue(), ["words"], split="test")
    split = open_dataset(tmp_path / "d", "test")
    for i, along in enumerate((0, 1)):
        _, _, content = examples.thumbnail(split, i, 64).partition(",")
        found = np.array(Image.open(io.BytesIO(base64.b64decode(content)))).mean(-1)
        np.testing.assert_allclose(found, grey.T if along == 0 else grey, atol=1)


def test_chosen_samples_are_a_fixed_choice():
    chosen = examples.chosen_samples(5, 100, 1)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 5
    assert set(chosen) < set(range(100))
    assert chosen == examples.chosen_samples(5, 100, 1)
    assert chosen != examples.chosen_samples(5, 100, 2)
    assert chosen != [0, 1, 2, 3, 4]
    assert examples.chosen_samples(5, 3, 1) == [0, 1, 2]


def test_samples_are_read_in_the_order_of_the_split(model, tokenizer, heldout_split):
    samples = examples.read_samples(model, tokenizer, heldout_split, [6, 1, 3])
    assert samples.patch_ids.shape == (3, 8)
    for row, i in enumerate((1, 3, 6)):
        pixels, caption = scene(3 * i + 1)
        assert (samples.images[row].permute(1, 2, 0).numpy() == pixels).all()
        tokens, masked = samples.tokens[row], samples.masked_tokens[row]
        assert tokens.tolist() == tokenizer.encode([caption], 12)[0].tolist()
        assert masked.min() > 0
        assert masked.max() < len(tokens) - 1
        assert len(masked) == max(1, round(0.3 * (len(tokens) - 2)))


def text_of(pieces: list[examples.Example]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_caption_with_its_masked_tokens_and_its_guesses(tokenizer):
    tokens = torch.from_numpy(tokenizer.encode(["red top left on white"], 12)[0])
    number = len(tokens) - 2
    plain = examples.marked_caption(tokenizer, tokens, torch.tensor([], dtype=torch.int64), None)
    assert text_of(plain).strip() == "red top left on white"
    masked = torch.tensor([1, number])
    assert text_of(examples.marked_caption(tokenizer, tokens, masked, None)).count("▢") == 2
    guesses = torch.tensor([tokens[1].item(), tokens[1].item()])
    found = [piece for piece in examples.marked_caption(tokenizer, tokens, masked, guesses) if piece.mark]
    assert [piece.mark for piece in found] == ["right", "wrong"]
    assert found[0].text == found[1].text == examples.token_text(tokenizer, int(tokens[1]))


def test_filled_captions_pair_each_caption_with_its_image_and_a_wrong_one(model, tokenizer, heldout_split):
    found = examples.filled_captions(model, tokenizer, heldout_split)
    assert len(found) == len(heldout_split)
    images = {scene_uri(3 * i + 1) for i in range(8)}
    for i, filled in enumerate(found):
        assert filled.right_image == scene_uri(3 * i + 1)
        assert filled.wrong_image in images - {filled.right_image}
        assert text_of(filled.masked).count("▢") == sum(bool(piece.mark) for piece in filled.with_right) > 0
        assert not any(piece.mark for piece in filled.masked)


def scene_uri(number: int) -> str:
    return data_uri(torch.from_numpy(scene(number)[0]).permute(2, 0, 1))


def test_reconstructions_are_strips_of_four_images(model, tokenizer, heldout_split):
    strips = examples.reconstructions(model, tokenizer, heldout_split)
    assert [len(strip) for strip in strips] == [4] * 8
    for i, (original, masked, own, wrong) in enumerate(strips):
        assert (original.text, masked.text) == ("original", "masked")
        assert original.image == scene_uri(3 * i + 1)
        assert own.text == scene(3 * i + 1)[1] != wrong.text
        assert len({panel.image for panel in (original, masked, own, wrong)}) == 4


def test_the_wrong_one_is_of_another_image_in_data_with_a_row_for_each_caption(model, tokenizer, tmp_path):
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(12):
            metadata = {"image_id": i // 3}
            writer.add(f"{i:02}", png(scene(i // 3)[0]), [f"row {i} of {scene(i // 3)[1]}"], metadata, split="test")
    split = open_dataset(tmp_path / "d", "test")
    uris = [scene_uri(image) for image in range(4)]
    filled = examples.filled_captions(model, tokenizer, split)
    assert [uris.index(one.right_image) for one in filled] == [i // 3 for i in range(12)]
    assert all(one.wrong_image in set(uris) - {one.right_image} for one in filled)
    partner = partners_of(split).tolist()
    assert [uris.index(one.wrong_image) for one in filled] == [p // 3 for p in partner]
    for i, (_, _, own, wrong) in enumerate(examples.reconstructions(model, tokenizer, split)):
        assert (own.text, wrong.text) == (split.captions(i)[0], split.captions(partner[i])[0])


def test_retrievals_show_the_best_and_the_worst(model, tokenizer, heldout_split, train_split, monkeypatch):
    """The best are right and have the highest scores; the worst have most wrong answers before them."""
    features = encode_split(model, heldout_split, tokenizer, "fp32")

    def ranks(direction):
        number = 8 if direction == "tr" else 12
        found = torch.arange(number) % 3 * 2  # rank 0, 2, 4, 0, 2, 4, ...
        return Ranks(found, found, torch.zeros(number, 3, dtype=torch.int64), torch.arange(number).float(), found)

    monkeypatch.setattr(examples, "rank_all", lambda *_, **__: {way: ranks(way) for way in ("tr", "ir")})
    unseen = unseen_images(heldout_split, train_split)
    assert unseen is not None
    assert not unseen.any()  # so the best may be any that are right
    groups = {g.title.split(":")[0]: g for g in examples.retrievals(model, heldout_split, train_split, features)}
    shown = {title: [found.rank for found in group.retrievals] for title, group in groups.items()}
    assert shown["Image to text, best"] == [1, 1, 1]  # images 6, 3, 0
    assert shown["Text to image, best"] == [1, 1, 1, 1]
    assert shown["Image to text, worst"][:2] == [5, 5]
    assert shown["Text to image, worst"] == [5, 5, 5, 5]
    best = [found.query.text for found in groups["Text to image, best"].retrievals]
    assert best == [features.captions[caption] for caption in (9, 6, 3, 0)]  # the highest score first


def test_a_right_answer_is_marked(heldout_split, model, tokenizer):
    features = encode_split(model, heldout_split, tokenizer, "fp32")
    found = examples.retrieval(heldout_split, features, "tr", 1, [2, 0, 1], 1)
    assert [answer.mark for answer in found.answers] == ["right", "", "right"]  # captions 1 and 2 are image 1's
    assert [answer.text for answer in found.answers] == [features.captions[t] for t in (2, 0, 1)]
    assert found.rank == 2
    assert found.query.image
    found = examples.retrieval(heldout_split, features, "ir", 4, [0, 3], 1)
    assert [answer.mark for answer in found.answers] == ["", "right"]
    assert all(answer.image for answer in found.answers)
    assert (found.query.text, found.query.image) == (features.captions[4], "")


def test_unseen_concepts_come_first_among_the_best(model, tokenizer, heldout_split, tmp_path, monkeypatch):
    train = open_dataset(write_scenes(tmp_path / "reds", {"train": 1}), "train")  # only scene 0, which is red
    unseen = unseen_images(heldout_split, train)
    assert unseen is not None
    colours = [heldout_split.captions(i)[0].split()[0] for i in range(8)]
    assert unseen.tolist() == [colour != "red" for colour in colours]
    features = encode_split(model, heldout_split, tokenizer, "fp32")

    def all_right(direction):
        number = 8 if direction == "tr" else 12
        zeros = torch.zeros(number, dtype=torch.int64)
        red = ~unseen if direction == "tr" else ~unseen[features.owner]
        return Ranks(zeros, zeros, zeros[:, None], red.float(), zeros)  # the red images have the highest scores

    monkeypatch.setattr(examples, "rank_all", lambda *_, **__: {way: all_right(way) for way in ("tr", "ir")})
    groups = examples.retrievals(model, heldout_split, train, features)
    (best,) = [group for group in groups if group.title.startswith("Text to image, best")]
    assert best.title.endswith(", among unseen concepts")
    assert len(best.retrievals) == 4
    assert not any("red" in found.query.text.split() for found in best.retrievals)
