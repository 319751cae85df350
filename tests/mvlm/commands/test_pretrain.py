"""`mvlm pretrain`: broken data, folders that are in use, settings, resuming, and repeating a run."""

import json

import pytest

from mvlm.config.model import PRESETS
from mvlm.model import fast
from mvlm.runs.folder import read_metrics
from mvlm.runs.load import load_model
from mvlm.training.trainer import Trainer
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
    assert [line.split(":")[0] for line in outcome.err] == ["skipped an image that cannot be decoded"]
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


def test_pretraining_refuses_a_folder_with_a_different_run(run_mvlm, scenes, run_copy):
    before = folder_hash(run_copy)
    for resume in ((), ("--resume",)):
        outcome = run_mvlm("pretrain", "tiny", "--data", scenes, "--out", run_copy, *MICRO_FLAGS, "--seed", 5, *resume)
        assert_refused(
            outcome,
            f"{run_copy}: wanted the settings of the run",
            "seed: config.json has 0, this command 5",
            "choose another --out",
        )
        assert folder_hash(run_copy) == before


@pytest.mark.slow
def test_a_refused_run_leaves_its_folder_free(run_mvlm, scenes, tmp_path):
    """Settings that are found wrong only when the run is put together; the corrected command is given then."""
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS)
    outcome = run_mvlm(*words, "--accumulate", 3)
    assert_refused(outcome, "batch_size: wanted a multiple of 1 ranks x 3 microbatches = 3, got 8")
    assert not list(tmp_path.rglob("*.json*"))
    assert run_mvlm(*words, "--accumulate", 2).code == 0


@pytest.mark.slow
def test_pretraining_in_the_folder_of_the_same_run_needs_resume(run_mvlm, scenes, tmp_path):
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS)
    assert run_mvlm(*words).code == 0
    before = folder_hash(tmp_path)
    assert_refused(run_mvlm(*words), "holds this run already; ", "with --resume, or choose another --out")
    assert folder_hash(tmp_path) == before
    outcome = run_mvlm(*words, "--resume")
    assert outcome.code == 0
    assert "is complete: 2 of 2 steps" in outcome.err[-1]
    assert folder_hash(tmp_path) == before


def test_pretraining_refuses_a_folder_with_other_files(run_mvlm, scenes, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years of work")
    before = folder_hash(tmp_path)
    assert_refused(
        run_mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path, *MICRO_FLAGS),
        "found other files; choose another",
    )
    assert folder_hash(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, message",
    [
        (["--model.heads", "0"], "heads must be at least 1, got 0"),
        (["--model.heads", "3"], "heads must divide width: wanted a divisor of 16, got 3"),
        (["--model.mask-block", "12"], "patch_size must divide mask_block: wanted a divisor of 12, got 8"),
        (["--model.image-mask-ratio", "0"], "image_mask_ratio must hide 1 to 4 of 4 blocks, got 0"),
        (["--model.vocab-size", "100"], "model.vocab_size: wanted a vocabulary of at least 261"),
        (["--max-steps", "0"], "max_steps must be at least 1, got 0"),
        (["--lr-cross", "nan"], "lr_cross must be a finite number, got nan"),
        (["--clip-norm", "-1"], "clip_norm must be above 0, got -1.0"),
        (["--beta2", "1.5"], "beta2 must be in [0, 1), got 1.5"),
        (["--seed", "99999999999999999999"], "seed must be in [-2^63, 2^64), got 99999999999999999999"),
        (["--crop-scale", "0.5", "1.5"], "crop_scale must be 0 < smallest <= largest <= 1"),
        (["--tokenizer", "none.json"], "none.json: wanted a tokenizer.json, found no such file"),
    ],
)
def test_settings_out_of_their_ranges_are_refused(run_mvlm, scenes, tmp_path, words, message):
    outcome = run_mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS, *words)
    assert outcome.code == 2
    assert message in " ".join(" ".join(outcome.err).split())  # a long message in a box is wrapped
    assert "Traceback" not in " ".join(outcome.err)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_exits_with_1(run_mvlm, scenes, tmp_path, monkeypatch):
    loss = fast.linear_pixel_loss
    monkeypatch.setattr(fast, "linear_pixel_loss", lambda *inputs, **more: loss(*inputs, **more) + float("nan"))
    outcome = run_mvlm("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS, "--max-steps", 12)
    assert outcome.code == 1
    assert len(outcome.err) == 1
    assert outcome.err[0].startswith("mvlm: step 11: mim is nan; the update was not made (11 in a row, ")


@pytest.mark.slow
def test_resuming_is_the_same_command_with_resume(run_mvlm, scenes, tmp_path, monkeypatch):
    words = ("pretrain", "tiny", "--data", scenes, "--out", tmp_path / "run", *MICRO_FLAGS, "--max-steps", 4)
    one_step = Trainer.one_step

    def stop(run, batches):
        if run.step == 3:
            raise KeyboardInterrupt
        return one_step(run, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "one_step", stop)
        assert run_mvlm(*words, "--checkpoint-every-steps", 2).code == 130
    outcome = run_mvlm(*words, "--resume")
    assert outcome.code == 0
    assert outcome.err == [
        "data resumed: same samples in the same order, same pixels, captions and masks",
        f"resuming from {tmp_path}/run/checkpoints/step_00000002",
    ]
    assert [row["step"] for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [1, 2, 3, 4]
    assert load_model(tmp_path / "run").network.config.width == 16


@pytest.mark.slow
def test_a_run_is_repeated_from_its_configuration_and_exported(run_mvlm, run_copy, tmp_path):
    """The same run elsewhere, with every setting of the file but those that are given."""
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


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bacth_size": 4}, "unknown setting 'bacth_size'; did you mean batch_size?"),
        ({"task": "vqa"}, "wanted the configuration of a pretraining run, found one of fine-tuning"),
        ({"format_version": 1}, "wanted a configuration of version 2 or 3, got version 1"),
    ],
)
def test_a_configuration_of_unknown_settings_or_version_is_refused(run_mvlm, run_copy, tmp_path, change, message):
    file = run_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_refused(run_mvlm("pretrain", "--config", file, "--out", tmp_path / "again"), message)
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_help_of_every_preset_lists_its_settings(run_mvlm, preset):
    outcome = run_mvlm("pretrain", preset, "--help")
    assert outcome.code == 0
    text = "\n".join(outcome.out)
    for flag in ("--data", "--out", "--max-steps", "--batch-size", "--checkpoint-every-steps", "--log-every", "--seed"):
        assert flag in text
    assert "--resume" in text
