"""What the page shows, against the model's own answers."""

import io
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm.app import answers
from mvlm.app.answers import MAX_CHARACTERS, MAX_LABELS, check_image, check_lines, check_text
from mvlm.app.uploads import MAX_BYTES
from mvlm.errors import ConfigError, RunError
from support import hostile_images


@pytest.fixture(scope="module")
def image(heldout_split) -> Image.Image:
    return Image.open(io.BytesIO(heldout_split.image_bytes(2))).convert("RGB")


@pytest.mark.slow
def test_an_image_finds_itself_first(gallery, heldout_split, image) -> None:
    found = answers.search(gallery, "  ", image)
    assert len(found) == 8
    assert found[0].image == heldout_split.image_bytes(2)
    assert found[0].caption == heldout_split.captions(2)[0]


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


@pytest.mark.parametrize("name, count", [("vqa", 1), ("entailment", 1), ("caption", 1), ("pairs", 2)])
def test_a_task_is_asked_as_the_model_is(answering, image, name, count) -> None:
    model = answering(name)
    assert answers.images_of_task(model) == count
    assert f"fine-tuned for {name}. The tab Ask" in answers.about_task(model)
    texts = [] if name == "caption" else ["a red square"]
    (wanted,) = model.predict(image if count == 1 else [image, image], *texts)
    assert answers.ask(model, *[image] * count, *texts) == next(iter(wanted.values()))
    with pytest.raises(ConfigError, match=r"^image: wanted "):
        answers.ask(model, *[None] * count, *texts)
    for text in (" ", "a" * 10**7) if texts else ():
        with pytest.raises(ConfigError, match=r"^text"):
            answers.ask(model, *[image] * count, text)


def test_models_without_predictions_have_no_tab(answering, model) -> None:
    assert answers.images_of_task(model) == answers.images_of_task(answering("retrieval")) == 0
    assert "`mvlm finetune vqa`" in answers.about_task(model)
    assert "`mvlm eval retrieval`" in answers.about_task(answering("retrieval"))


def test_each_mask_has_rows_of_guesses(model, image) -> None:
    text, rows = answers.fill(model, image, "a [MASK] [MASK]")
    expected = model.fill("a [MASK] [MASK]", image, 5)
    assert text == expected.text
    assert [row[0] for row in rows] == ["1"] * 5 + ["2"] * 5
    assert [row[1] for row in rows] == [guess.token for guesses in expected.guesses for guess in guesses]
    assert rows[0][2] == f"{100 * expected.guesses[0][0].probability:.1f} %"


def test_patches_are_read_as_they_were_written(model) -> None:
    side = model.network.config.image_size // model.network.config.patch_size
    hidden = np.random.default_rng(0).random((side, side)) < 0.5
    text = answers.write_patches(hidden)
    assert text == "".join("1" if hidden[row, column] else "0" for row in range(side) for column in range(side))
    np.testing.assert_array_equal(answers.read_patches(model, text), hidden)
    for other in (None, "", text[1:], text + "0", text[1:] + "2", "\u0661" * len(text)):
        with pytest.raises(ConfigError, match="image: wanted its patches, found others"):
            answers.read_patches(model, other)


def test_hidden_patches_are_rebuilt_under_both_texts(model, image) -> None:
    hidden = answers.hide_part(model, "left half")
    right, wrong = answers.rebuild(model, image, hidden, "a circle", "a square")
    for shown, text in ((right, "a circle"), (wrong, "a square")):
        small = model.reconstruct(image, text, hidden).rebuilt
        np.testing.assert_array_equal(np.asarray(shown.resize(small.shape[:2], Image.Resampling.NEAREST)), small)
    again, same = answers.rebuild(model, image, hidden, "a circle", " ")
    np.testing.assert_array_equal(np.asarray(again), np.asarray(same))


def test_a_click_changes_the_patch_under_it_and_no_other(model) -> None:
    before = answers.hide_part(model, "nothing")
    side = len(before)
    patch = answers.SIDE / side
    after = answers.toggle_patch(before, [1.5 * patch, 0.5 * patch])
    assert np.argwhere(after).tolist() == [[0, 1]]
    assert not before.any()
    assert not answers.toggle_patch(after, [1.5 * patch, 0.5 * patch]).any()
    assert answers.toggle_patch(before, [answers.SIDE, answers.SIDE])[-1, -1]  # on the very edge


def test_a_shared_page_takes_as_many_texts_as_it_encodes_soon(model, image, monkeypatch) -> None:
    """Here a text takes 0.1 s, so 20 take 2 s."""
    now = [0.0]

    def embed(texts: list[str]) -> None:
        now[0] += 0.1 * len(texts)

    monkeypatch.setattr(model, "embed_texts", embed)
    monkeypatch.setattr(answers, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert answers.most_shared_texts(model) == 20
    monkeypatch.undo()
    assert 2 <= answers.most_shared_texts(model) <= answers.MAX_TEXTS
    labels, templates = "\n".join("abcdefg"), "a {}\nb {}\nc {}"
    assert len(answers.classify(model, image, labels, templates, most_texts=21)) == 7
    with pytest.raises(ConfigError, match="templates"):
        answers.classify(model, image, labels, templates, most_texts=20)
    with pytest.raises(ConfigError, match="templates"):
        answers.classify(model, image, labels, "", most_texts=6)


def test_questions_that_cannot_be_answered_are_refused(gallery, model, image) -> None:
    labels, templates = "\n".join(str(i) for i in range(100)), "\n".join(["a {}"] * 11)
    nothing = answers.hide_part(model, "nothing")
    for name, ask in (
        ("query", lambda: answers.search(gallery, None, None)),
        ("image", lambda: answers.fill(model, None, "a [MASK]")),
        ("image", lambda: answers.classify(model, None, "a\nb", "")),
        ("image", lambda: answers.look(model, None, "a")),
        ("image", lambda: answers.rebuild(model, None, np.ones((4, 4), bool), "a", "")),
        ("image", lambda: answers.rebuild(model, image, nothing, "a", "")),
        ("labels", lambda: answers.classify(model, image, "a circle\na circle", "")),
        ("templates", lambda: answers.classify(model, image, labels, templates)),
        *(("text", lambda text=text: check_text(text)) for text in (None, "  ", "a" * 10**7)),
        ("lines", lambda: check_lines("a\n" * (MAX_LABELS + 1), "lines")),
        ("lines", lambda: check_lines("a" * (MAX_CHARACTERS + 1), "lines")),
        ("lines", lambda: check_lines("\n" * 10**7, "lines")),
    ):
        with pytest.raises(ConfigError, match=f"^{name}: wanted "):
            ask()


def test_a_good_image_comes_as_it_is_and_others_are_refused(tmp_path: Path, heldout_split) -> None:
    """A visitor learns nothing of this machine. /dev/zero has a size of 0 and no end; a pipe would be waited for."""
    file = tmp_path / "x.png"
    file.write_bytes(heldout_split.image_bytes(2))
    assert np.array_equal(np.asarray(check_image(file)), np.asarray(Image.open(file).convert("RGB")))
    bomb = b'<!DOCTYPE svg [<!ENTITY a "' + b"a" * 50 + b'"><!ENTITY b "&a;&a;">]><svg>&b;</svg>'
    for content in (
        hostile_images.png(60_000, 60_000, 1), hostile_images.png(9_000, 9_000, 1),
        hostile_images.png(6300, 6300, 6300), bomb, heldout_split.image_bytes(2)[:-60], b"", b"#!/bin/sh\n",
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(RunError, match=r"^image: wanted ") as refused:
            check_image(file)
        assert str(tmp_path) not in str(refused.value)
    with file.open("wb") as large:
        large.truncate(MAX_BYTES + 1_000_000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for other in (file, Path("/dev/zero"), tmp_path / "pipe", tmp_path / "link", tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=r"^image: wanted "):
            check_image(other)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_of_the_system_reads_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would hand an EPS file to Ghostscript."""
    started = tmp_path / "started"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {started}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.png").write_bytes(EPS)
    with pytest.raises(RunError):
        check_image(tmp_path / "x.png")
    assert not started.exists()
