"""`mvlm reconstruct` and `mvlm fill`."""

import numpy as np
import pytest
from PIL import Image

from mvlm.tasks.load import load_model
from support.scenes import png, scene


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
