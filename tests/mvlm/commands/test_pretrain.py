"""`mvlm pretrain`: broken data, a run that was refused and ends with its next command, and one that is repeated."""

import shlex
from dataclasses import replace

import pytest

from mvlm.commands.pretrain import parse_config
from mvlm.config.model import MaskVLMConfig
from mvlm.errors import RunError
from mvlm.runs.folder import read_metrics, write_config
from mvlm.tasks.load import load_model
from mvlm_dataloading import open_dataset
from support.commands import MICRO_FLAGS, assert_refused
from support.folders import folder_hash
from support.scenes import BROKEN, overwrite


@pytest.mark.slow
@pytest.mark.parametrize("damage, message", BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_pretraining_on_broken_data_is_refused(run_mvlm, scenes_copy, tmp_path, damage, message):
    damage(scenes_copy, "train")
    before = folder_hash(tmp_path)
    outcome = run_mvlm("pretrain", "tiny", "--data", scenes_copy, "--out", tmp_path / "run", *MICRO_FLAGS)
    assert_refused(outcome, message)
    assert outcome.err[0].startswith(f"mvlm: {scenes_copy}")  # the error begins with the data that is wrong
    assert folder_hash(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_pretraining_skips_a_few_undecodable_images_and_stops_at_many(run_mvlm, scenes_copy, tmp_path):
    """Each is named, and more than 5 % of them, two of 32, stop the run."""
    overwrite(open_dataset(scenes_copy, "train"), "image", [4])
    outcome = run_mvlm(
        "pretrain", "tiny", "--data", scenes_copy, "--out", tmp_path / "one", *MICRO_FLAGS, "--max-steps", 5
    )
    assert outcome.code == 0
    skipped, end = outcome.err
    assert skipped.split(":")[0] == "skipped an image that cannot be decoded"
    assert end.startswith(f"{tmp_path / 'one'} is complete: 5 of 5 steps, 5 of them in ")
    assert read_metrics(tmp_path / "one/metrics.jsonl")[-1]["skipped"] == 1

    overwrite(open_dataset(scenes_copy, "train"), "image", [9])
    before = folder_hash(scenes_copy)
    outcome = run_mvlm(
        "pretrain", "tiny", "--data", scenes_copy, "--out", tmp_path / "two", *MICRO_FLAGS, "--max-steps", 5
    )
    assert outcome.code == 2
    assert "wanted at most 5% undecodable images, found 2 of 32; build the data set again" in outcome.err[-1]
    assert all(line.startswith("skipped an image that cannot be decoded") for line in outcome.err[:-1])
    assert folder_hash(scenes_copy) == before


def test_a_run_that_goes_on_has_the_settings_of_the_trained_model(trained, tmp_path):
    words = ["base", "--data", "data", "--out", str(tmp_path / "new"), "--initial-model", str(trained)]
    own = load_model(trained).network.config
    assert parse_config(words).model == own != MaskVLMConfig.preset("base")
    assert parse_config([*words, "--model.text-length", "30"]).model == replace(own, text_length=30)
    # A run that has begun has settings of its own, whatever became of the trained model.
    begun = parse_config([*words, "--model.text-length", "30"])
    write_config(begun)
    assert parse_config([*words[:-1], str(tmp_path / "gone"), "--resume"]).model == begun.model
    with pytest.raises(RunError, match="gone"):
        parse_config([*words[:4], str(tmp_path / "other"), "--initial-model", str(tmp_path / "gone")])


@pytest.mark.slow
def test_a_refused_run_leaves_its_folder_free(run_mvlm, scenes, tmp_path):
    """Settings that are found wrong only when the run is put together; the corrected command is given then.

    It ends with the command that evaluates the run.
    """
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS)
    assert_refused(run_mvlm(*words, "--accumulate", 3), "batch_size")
    assert not list(tmp_path.rglob("*.json*"))
    outcome = run_mvlm(*words, "--accumulate", 2)
    assert outcome.code == 0
    command = outcome.err[-1].partition("; next: ")[2].partition(", and then ")[0]
    assert run_mvlm(*shlex.split(command)[1:]).code == 0
    assert (tmp_path / "run/eval/test.json").is_file()


@pytest.mark.slow
def test_a_run_is_repeated_from_its_configuration_and_exported(run_mvlm, run_copy, tmp_path):
    """A config.json repeats a run elsewhere, with all settings but those that the command line gives."""
    outcome = run_mvlm("pretrain", f"--config={run_copy / 'config.json'}", "--out", tmp_path / "again")
    assert outcome.code == 0
    names = ("step", "loss", "mlm", "mim", "itc", "itm", "grad_norm", "lr")
    mine, theirs = (
        [[row[name] for name in names] for row in read_metrics(run / "metrics.jsonl")]
        for run in (tmp_path / "again", run_copy)
    )
    assert mine == theirs
    outcome = run_mvlm("export", tmp_path / "again", tmp_path / "portable")
    assert (outcome.code, outcome.out) == (0, [str(tmp_path / "portable")])
    assert load_model(tmp_path / "portable").network.config.width == 16
