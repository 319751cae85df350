"""A study of masks and losses, from its file to its page; test_pages.py runs docs/explain/method.md."""

import tomllib
from pathlib import Path

import pytest

from mvlm.cli import find_command
from mvlm.errors import ConfigError
from support.scenes import write_scenes

STUDY = Path(__file__).parents[2] / "examples/study.toml"
SHORTER = {
    "steps = 100": "steps = 2", "size = 64": "size = 8", "warmup_steps = 10": "warmup_steps = 1",
    "width = 64": "width = 16\nimage_size = 64\ncross_layers = 1\ndecoder_layers = 1", "heads = 2": "heads = 1",
    "image_layers = 2": "image_layers = 1", "text_layers = 2": "text_layers = 1",
}  # fmt: skip


@pytest.mark.extended
@pytest.mark.slow
def test_a_study_of_losses_and_masks(tmp_path, monkeypatch, capsys, without_tensorboard):
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "data/emoji")
    text = STUDY.read_text() + '\n[arms."more masks".model]\nimage_mask_ratio = 0.75\n'
    assert tomllib.loads(text)["base"] in tomllib.loads(text)["arms"]
    for long, few in SHORTER.items():
        assert long in text
        text = text.replace(long, few)
    words = ["study", "study.toml", "--data", "data/emoji", "--out", "study"]
    for right, wrong, named in (
        ("image_mask_ratio", "image_masking_ratio", "image_mask"),
        ("= 0.75", "= 1.4", "more masks"),
        ('"ir.r10"', '"ir.r7"', "ir.r7"),
    ):  # fmt: skip
        (tmp_path / "study.toml").write_text(text.replace(right, wrong))
        with pytest.raises(ConfigError, match=named):
            find_command(words)()
        assert not list(tmp_path.glob("study/**/checkpoint*"))
    (tmp_path / "study.toml").write_text(text)
    find_command(words)()
    assert "study/study.html" in capsys.readouterr().out
    rows = (tmp_path / "study/study.csv").read_text()
    for arm in ("ITC and ITM alone", "all four", "more masks"):
        assert arm in rows
