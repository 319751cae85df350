"""`mvlm reconstruct` and `mvlm fill`: images and captions that are refused."""

import numpy as np
import pytest
from PIL import Image

from mvlm.runs.load import load_model
from support.commands import assert_refused
from support.folders import folder_hash
from support.scenes import png, scene


def test_a_file_that_is_not_an_image_is_refused(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    before = folder_hash(tmp_path)
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png", "--caption", "red [MASK]")
    assert_refused(
        run_mvlm("reconstruct", *words, "--out", tmp_path / "b.png"), "a.png: wanted an image, could not read it"
    )
    assert_refused(run_mvlm("fill", *words), "a.png: wanted an image, could not read it")
    assert folder_hash(tmp_path) == before


def test_no_folder_is_made_for_a_rebuilt_image(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png", "--caption", "red")
    outcome = run_mvlm("reconstruct", *words, "--out", tmp_path / "x/y/b.png")
    assert_refused(outcome, f"out: wanted a file in a folder that is there, found no folder {tmp_path / 'x/y'}")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_captions_without_masks_and_wrong_numbers_of_guesses_are_refused(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png")
    assert_refused(run_mvlm("fill", *words, "--caption", "red"), "caption: wanted at least one [MASK], got 'red'")
    late = "red " * 40 + "[MASK]"
    assert_refused(run_mvlm("fill", *words, "--caption", late), "caption: wanted every [MASK] among the first")
    most = load_model(trained).tokenizer.vocab_size
    for top in (0, most + 1):
        outcome = run_mvlm("fill", *words, "--caption", "a [MASK]", "--top", top)
        assert_refused(outcome, f"top: wanted 1 to {most}, got {top}")


@pytest.mark.slow
def test_the_commands_give_what_the_python_interface_gives(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(5)[0]))
    model = load_model(trained)
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png", "--caption")
    outcome = run_mvlm("fill", *words, "red [MASK] left [MASK]", "--top", 2)
    shown = [
        "  ".join(f"{guess.token} {100 * guess.probability:.0f}%" for guess in guesses)
        for guesses in model.fill("red [MASK] left [MASK]", tmp_path / "a.png", 2).guesses
    ]
    assert outcome.out == [f"[MASK] {number}: {line}" for number, line in enumerate(shown, 1)]
    out = tmp_path / "b.png"
    assert run_mvlm("reconstruct", *words, "red", "--wrong-caption", "blue", "--out", out, "--seed", 3).code == 0
    right, wrong = (model.reconstruct(tmp_path / "a.png", text, seed=3) for text in ("red", "blue"))
    with Image.open(out) as drawn:
        panels = np.split(np.array(drawn), 4, axis=1)
    for panel, wanted in zip(panels, (right.image, right.masked, right.rebuilt, wrong.rebuilt), strict=True):
        assert np.array_equal(panel, wanted)


def test_a_caption_that_the_model_does_not_take_is_refused(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png", "--caption", "red " * 40)
    outcome = run_mvlm("reconstruct", *words, "--out", tmp_path / "b.png")
    assert_refused(outcome, "text 0: wanted at most 12 tokens, [CLS] and [SEP] included, found", "shorten it")
    assert not (tmp_path / "b.png").exists()
