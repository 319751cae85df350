"""`mvlm export`: its formats, and what is refused."""

import json

import pytest

from mvlm.portable import programs as module
from support.commands import assert_refused

HUB_FILES = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]


def names(path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.slow
def test_the_default_is_a_folder_for_mvlm(run_mvlm, trained, tmp_path):
    assert run_mvlm("export", trained, tmp_path / "out").out == [str(tmp_path / "out")]
    assert names(tmp_path / "out") == HUB_FILES[1:]


def test_programs_are_listed_with_their_differences(run_mvlm, trained, tmp_path, monkeypatch):
    def write(network, out, format):
        for name in ("image_encoder", "text_encoder", "matching_head"):
            (out / f"{name}.{format}").write_bytes(b"program")
        return {f"{name}.{format}": 2e-7 for name in ("image_encoder", "text_encoder", "matching_head")}

    monkeypatch.setattr(module, "write_programs", write)  # tests/mvlm/portable makes real ones
    outcome = run_mvlm("export", trained, tmp_path / "out", "--format", "pt2")
    assert outcome.out[0] == "image_encoder.pt2: largest difference from the network 2.0e-07"
    assert outcome.out[-1] == str(tmp_path / "out")
    programs = [f"{name}.pt2" for name in ("image_encoder", "matching_head", "text_encoder")]
    assert names(tmp_path / "out") == sorted([*programs, "preprocess.json", "tokenizer.json"])
    assert json.loads((tmp_path / "out/preprocess.json").read_text())["format"] == "pt2"


@pytest.mark.slow
def test_a_dry_run_for_the_hub(run_mvlm, trained, tmp_path):
    words = ("--format", "hub", "--push-to", "someone/demo", "--dry-run")
    assert run_mvlm("export", trained, tmp_path / "out", *words).out == [str(tmp_path / "out")]
    assert names(tmp_path / "out") == HUB_FILES


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "tflite"], "--format: invalid choice"),
        (["--push-to", "a/b"], "--push-to: wanted --format hub beside it, got --format safetensors"),
        (["--format", "onnx", "--dry-run"], "--dry-run: wanted --format hub beside it, got --format onnx"),
        (["--format", "hub", "--push-to", "demo"], "push-to: wanted an id OWNER/NAME on the hub, got 'demo'"),
        (["--format", "hub", "--data", "nowhere"], "nowhere: wanted the data that the run was trained on"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(run_mvlm, trained, tmp_path, words, message):
    outcome = run_mvlm("export", trained, tmp_path / "out", *words)
    assert outcome.code == 2
    assert len(outcome.err) == 1
    if "invalid choice" not in message:
        assert message in outcome.err[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_missing_run_and_a_full_folder_are_refused(run_mvlm, trained, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    for format in ("safetensors", "pt2", "onnx", "hub"):
        assert_refused(
            run_mvlm("export", tmp_path / "none", tmp_path / "out", "--format", format), "none: wanted a run"
        )
        outcome = run_mvlm("export", trained, tmp_path / "full", "--format", format)
        assert_refused(outcome, "full: wanted a new or empty folder, found other files; choose another one")
    assert names(tmp_path) == ["full"]


@pytest.mark.slow
def test_onnx_without_its_packages_names_the_extra(run_mvlm, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    outcome = run_mvlm("export", trained, tmp_path / "out", "--format", "onnx")
    assert_refused(outcome, "onnx: wanted its packages", "pip install 'mvlm[export]'")
    assert not (tmp_path / "out").exists()
