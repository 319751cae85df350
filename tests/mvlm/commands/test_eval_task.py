"""`mvlm eval TASK` refuses options that no prediction would depend on."""

from typing import Any

import pytest

from mvlm.errors import ConfigError
from mvlm.tasks.evaluate import check_changes
from mvlm.tasks.finetune import finetune
from mvlm.tasks.task import TaskOptions
from support.commands import assert_refused
from support.folders import folder_hash
from support.questions import WRITERS, finetune_config


@pytest.mark.parametrize(
    "task, options, changes, message",
    [
        ("vqa", {"answers": "classifier"}, {"candidates": 5}, "wanted a run with answers of decoder, got classifier"),
        ("vqa", {"answers": "masked"}, {"candidates": 5}, "wanted a run with answers of decoder, got masked"),
        ("vqa", {}, {"candidates": 5, "generate": True}, "candidates: wanted answers that are chosen from the list"),
        ("vqa", {"generate": True}, {"candidates": 5}, "leave it out, or add --generate False"),
        (
            "caption",
            {},
            {"iterations": 3, "order": "left-to-right"},
            "wanted the order mask-predict, got left",
        ),
        ("caption", {"order": "left-to-right"}, {"iterations": 3}, "wanted the order mask-predict, got left"),
    ],
)
def test_options_without_effect_are_refused(task: str, options: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        check_changes(task, TaskOptions(**options | changes), changes)


@pytest.mark.parametrize(
    "task, options, changes",
    [
        ("vqa", {}, {"candidates": 5}),
        ("vqa", {"generate": True}, {"candidates": 5, "generate": False}),
        ("vqa", {"answers": "masked"}, {"generate": True}),
        ("caption", {}, {"iterations": 3, "lengths": 2}),
        ("caption", {"order": "left-to-right"}, {"iterations": 3, "order": "mask-predict"}),
        (
            "own",
            {"answers": "classifier", "order": "left-to-right"},
            {"candidates": 5, "iterations": 2},
        ),
    ],
)
def test_options_with_an_effect_are_taken(task: str, options: dict[str, Any], changes: dict[str, Any]):
    check_changes(task, TaskOptions(**options | changes), changes)


@pytest.mark.slow
def test_the_command_asks_the_run_first(trained, tmp_path, run_mvlm, without_tensorboard):
    data, run = WRITERS["vqa"](tmp_path / "data"), tmp_path / "run"
    finetune(finetune_config(trained, data, run, "vqa", answers="classifier", max_steps=1))
    before = folder_hash(tmp_path)
    words = ("--checkpoint", run, "--data", data, "--device", "cpu", "--out", tmp_path / "out.json")
    outcome = run_mvlm("eval", "vqa", *words, "--candidates", 5)
    assert_refused(outcome, "candidates: wanted a run with answers of decoder, got classifier; leave it out")
    assert folder_hash(tmp_path) == before
