"""Features of evaluations during training: in memory, or in files that do not outlast the evaluation."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mvlm.runs.folder import RunFolder
from mvlm.tasks.finetune import finetune
from mvlm.training import trainer
from mvlm.training.run import pretrain
from mvlm.training.stopping import StopRequest
from support.faults.forks import ended_well, in_ranks
from support.folders import reproducible_rows
from support.models import pretrain_config
from support.questions import finetune_config

NEEDED = 4 * 8 * 17 * 16
"""Bytes of the features of 8 images of 4 x 4 patches and [CLS], 16 numbers each."""


@pytest.fixture
def folders(monkeypatch) -> list[Path | None]:
    """Folder of each workspace that an evaluation opens; features that need more than `NEEDED` - 1 bytes are many."""
    opened: list[Path | None] = []

    class Recorded(trainer.Workspace):
        def __init__(self, folder, *rest, **options):
            super().__init__(folder, *rest, **options)
            opened.append(folder)
            assert folder is None or not (folder / "stale").exists()

    monkeypatch.setattr(trainer, "Workspace", Recorded)
    monkeypatch.setattr(trainer, "IN_MEMORY", NEEDED - 1)
    return opened


@pytest.mark.slow
@pytest.mark.parametrize("task", [pytest.param(None, marks=pytest.mark.extended), "retrieval"])
def test_many_features_lie_in_files_while_an_evaluation_lasts(trained, scenes, tmp_path, folders, monkeypatch, task):
    # Two ranks add in another order than one. In bf16 that is far more than the tolerance below.
    settings = {"max_steps": 1, "warmup_steps": 0, "eval_every_steps": 1, "precision": "fp32"}

    def train(out: Path) -> None:
        if task is None:
            pretrain(pretrain_config(scenes, out, **settings))
        else:
            finetune(finetune_config(trained, scenes, out, task, **settings))

    left = RunFolder(tmp_path / "files").evaluation_files
    train(tmp_path / "files")
    assert folders == [left]
    assert not left.exists()
    assert [ended_well(pid) for pid in in_ranks(lambda: train(tmp_path / "ranks"), 2)] == [True, True]
    assert not RunFolder(tmp_path / "ranks").evaluation_files.exists()
    folders.clear()
    monkeypatch.setattr(trainer, "IN_MEMORY", NEEDED)
    train(tmp_path / "memory")
    assert folders == [None]
    assert reproducible_rows(tmp_path / "files") == reproducible_rows(tmp_path / "memory")
    for a, b in zip(reproducible_rows(tmp_path / "files"), reproducible_rows(tmp_path / "ranks"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.slow
def test_features_stay_in_memory_if_the_disk_has_no_room(scenes, tmp_path, folders, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 2 * NEEDED))
    pretrain(pretrain_config(scenes, tmp_path / "run", max_steps=1, eval_every_steps=1))
    assert folders == [None]


@pytest.mark.extended
def test_a_stop_leaves_no_files_and_those_of_a_kill_are_removed(scenes, tmp_path, folders, monkeypatch):
    out = tmp_path / "run"
    left = RunFolder(out).evaluation_files
    config = {"max_steps": 4, "eval_every_steps": 1, "checkpoint_every_steps": 1}
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "requested", lambda _: left.exists())  # while the evaluation goes on
        pretrain(pretrain_config(scenes, out, **config))
    assert folders == [left]
    assert not left.exists()
    left.mkdir()
    (left / "stale").write_text("left by a kill")
    pretrain(pretrain_config(scenes, out, resume=True, **config))
    assert len(folders) == 4
    assert not left.exists()
    assert "tr_r1" in reproducible_rows(out)[-1]
