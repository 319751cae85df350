"""`mvlm export` and its formats."""

import pytest

from support.commands import assert_refused

HUB_FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def names(path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), ("--format", "hub", "--push-to", "someone/demo", "--dry-run")])
def test_folders_for_mvlm_and_for_the_hub(run_mvlm, trained, tmp_path, words):
    assert run_mvlm("export", trained, tmp_path / "out", *words).out == [str(tmp_path / "out")]
    assert names(tmp_path / "out") == (HUB_FILES if words else HUB_FILES[1:])


def test_onnx_without_its_packages_names_the_extra(run_mvlm, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    outcome = run_mvlm("export", trained, tmp_path / "out", "--format", "onnx")
    assert_refused(outcome, "onnx", "pip install 'mvlm[export]'")
    assert not (tmp_path / "out").exists()
