"""`mvlm reconstruct` and `mvlm fill`: images and captions that are refused."""

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


def test_captions_without_masks_and_wrong_numbers_of_guesses_are_refused(run_mvlm, trained, tmp_path):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    words = ("--checkpoint", trained, "--image", tmp_path / "a.png")
    assert_refused(run_mvlm("fill", *words, "--caption", "red"), "caption: wanted at least one [MASK], got 'red'")
    late = "red " * 40 + "[MASK]"
    assert_refused(run_mvlm("fill", *words, "--caption", late), "caption: wanted every [MASK] among the first")
    most = load_model(trained)[1].vocab_size
    for top in (0, most + 1):
        outcome = run_mvlm("fill", *words, "--caption", "a [MASK]", "--top", top)
        assert_refused(outcome, f"top: wanted 1 to {most}, got {top}")
