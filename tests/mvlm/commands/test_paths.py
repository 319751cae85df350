"""Paths given to commands: missing data, runs and devices, wrong kinds, other architectures."""

import json

import pytest
import torch

from mvlm.runs.checkpoint import sha256
from support.commands import MICRO_FLAGS, assert_refused
from support.folders import folder_hash
from support.scenes import png, scene

PRETRAIN = f"pretrain tiny {' '.join(MICRO_FLAGS)} --data"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (f"{PRETRAIN} none --out run", "none: wanted a data folder"),
        (f"{PRETRAIN} {{data}} --out run --tokenizer none.json", "none.json"),
        (f"{PRETRAIN} {{data}} --out file/x/y", "file/x/y: could not be read or written"),
        ("pretrain --config none --out run", "none: wanted the configuration"),
        ("pretrain --config empty --out run", "empty: wanted the configuration"),
        ("eval retrieval --checkpoint {run} --data none", "none: wanted a data folder"),
        ("eval retrieval --checkpoint {run} --data {data} --device gpu", "device"),
        ("eval retrieval --checkpoint {run} --data {data} --split tset", "tset"),
        ("eval retrieval --checkpoint {run} --data {data} --rerank -1", "rerank"),
        ("eval retrieval --checkpoint none --data {data}", "none: wanted a run"),
        ("eval retrieval --checkpoint {run} --data {data} --out file/x", "file"),
        ("fill --checkpoint none --image a.png --caption [MASK]", "none: wanted a run"),
        ("reconstruct --checkpoint none --image a.png --caption red --out b.png", "none: wanted a run"),
        ("embed none out --checkpoint {run}", "none: wanted a data set"),
        ("embed {data} out --checkpoint none", "none: wanted a run"),
        ("embed {data} out --checkpoint {run} --precision fp8", "precision"),
        ("export none out", "none: wanted a run"),
        ("export file out", "file: wanted a run"),
        ("export empty out", "empty: wanted a run"),
        ("export {run} file/x/y", "file"),
        ("report none", "none: wanted a run"),
        ("report none {run}", "none: wanted a run"),
        ("report file", "file: wanted a run"),
        ("report empty", "empty/config.json"),
        ("report empty {run}", "empty/metrics.jsonl"),
    ],
)
def test_a_path_that_is_not_what_is_wanted_is_refused(run_mvlm, scenes, trained, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    before = folder_hash(tmp_path)
    outcome = run_mvlm(*words.format(run=trained, data=scenes).split())
    assert outcome.code == 2
    assert message in outcome.err[-1]
    assert folder_hash(tmp_path) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_device_is_refused(run_mvlm, scenes, trained, tmp_path):
    words = ("--data", scenes, "--device", "cuda")
    assert_refused(run_mvlm("pretrain", "tiny", "--out", tmp_path / "run", *MICRO_FLAGS, *words), "device")
    assert_refused(run_mvlm("eval", "retrieval", "--checkpoint", trained, *words), "device")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "eval retrieval --checkpoint run --data {data} --out test.json",
        "reconstruct --checkpoint run --image a.png --caption red --out b.png",
        "fill --checkpoint run --image a.png --caption [MASK]",
    ],
)
def test_a_checkpoint_of_another_architecture_is_refused(run_mvlm, scenes, run_copy, tmp_path, monkeypatch, words):
    """Another model.json, with a manifest that fits."""
    monkeypatch.chdir(tmp_path)
    for folder in (run_copy / "checkpoints").iterdir():
        config = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(config | {"width": 24}))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sha256"]["model.json"] = sha256(folder / "model.json")
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    before = folder_hash(tmp_path)
    assert_refused(run_mvlm(*words.format(data=scenes).split()), "model.json", "24")
    assert folder_hash(tmp_path) == before
