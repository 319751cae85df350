"""Commands and examples of docs/guides/export.md run as written, on a small model of another image size."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from mvlm.cli import find_command
from mvlm.portable import programs as module
from mvlm.tasks.load import load_model
from support.scenes import png, scene

PAGE = Path(__file__).parents[3] / "docs" / "guides" / "export.md"
pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def working_folder(trained, tmp_path, monkeypatch) -> Path:
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs/demo")
    (tmp_path / "cat.png").write_bytes(png(scene(5)[0]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_the_page_run(working_folder, monkeypatch, capsys):
    # `test_programs.py` writes real programs.
    def write(network, out, format):
        for name in ("image_encoder", "text_encoder", "matching_head"):
            (out / f"{name}.{format}").write_bytes(b"program")
        return {f"{name}.{format}": 0.0 for name in ("image_encoder", "text_encoder", "matching_head")}

    monkeypatch.setattr(module, "write_programs", write)
    commands = [shlex.split(line) for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 3
    for words in commands:
        find_command(words[1:])()
    for name in ("demo-pt2/text_encoder.pt2", "demo-onnx/preprocess.json", "demo-hub/README.md"):
        assert (working_folder / name).stat().st_size > 0


@pytest.mark.extended
def test_examples_of_the_page_run(working_folder, programs, small, capsys):
    pt2, onnx, clip = blocks("python")
    for format in ("pt2", "onnx"):
        (working_folder / f"demo-{format}").symlink_to(programs(format))
    names: dict = {}
    exec(pt2.replace("64, 64", "32, 32"), names)
    assert names["embedding"].shape == (2, 8)
    exec(onnx, names)
    model = load_model(small, "cpu", "fp32")
    image = scene(5)[0]  # already of the model's size, so no resize differs
    np.testing.assert_allclose(names["similarity"], model.similarity(image, names["texts"]), atol=1e-5)
    np.testing.assert_allclose(names["log_odds"], model.match(image, names["texts"]).log_odds, rtol=1e-4, atol=1e-5)
    exec(clip, names)
    np.testing.assert_allclose(names["image"], load_model("runs/demo", "cpu").embed_images("cat.png"))
    assert "tensor" in capsys.readouterr().out
