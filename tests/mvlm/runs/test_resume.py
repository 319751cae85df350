"""The checkpoint that a run resumes from, where rows of metrics are missing."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvlm.errors import RunError
from mvlm.runs.folder import RunFolder
from mvlm.runs.history import read_history
from mvlm.runs.resume import checkpoint_to_resume, missing_rows, open_run, rows_due
from mvlm.training.run import pretrain
from mvlm.training.trainer import Trainer
from mvlm.verify.verify import read_claims, verify_run, wrong_rows
from support.folders import checkpoint_contents, folder_hash, reproducible_rows
from support.forgery import change_rows, checkpoint
from support.models import pretrain_config


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """Configuration of a complete run of four steps, each with a row and a checkpoint. Read only."""
    config = pretrain_config(
        scenes, tmp_path_factory.mktemp("whole") / "run", max_steps=4, checkpoint_every_steps=1, keep_checkpoints=9
    )
    pretrain(config)
    return config


@pytest.fixture
def cut(whole, tmp_path):
    """The run as if it had been killed after its third checkpoint, to be changed and resumed."""
    out = Path(shutil.copytree(whole.out, tmp_path / "run"))
    shutil.rmtree(checkpoint(out, 4))
    change_rows(out, lambda row: row["step"] < 4)
    return replace(whole, out=out, resume=True)


def keep_bytes(run: Path, count: int) -> None:
    file = run / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:count])


def length(run: Path, rows: int) -> int:
    """Bytes of the first rows of metrics."""
    return sum(map(len, (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:rows]))


EDITS = {
    "nothing": (lambda run: None, 3, ""),
    "the last row": (lambda run: keep_bytes(run, length(run, 2)), 2, "none of step 3; they are made again, after"),
    "half of the last row": (lambda run: keep_bytes(run, length(run, 3) - 9), 2, "none of step 3; they"),
    "the last rows": (lambda run: keep_bytes(run, length(run, 1)), 1, "none of steps 2 to 3; they are made again"),
    "a row between": (lambda run: change_rows(run, lambda row: row["step"] != 2), 1, "step 3, found none of step 2;"),
    "all rows": (lambda run: keep_bytes(run, 0), None, "none of steps 1 to 3, and no older checkpoint whose rows"),
    "the file": (lambda run: (run / "metrics.jsonl").unlink(), None, "none of steps 1 to 3, and no older checkpoint"),
    "the first row": (lambda run: change_rows(run, lambda row: row["step"] > 1), None, "found none of step 1, and"),
    "a number": (lambda run: change_rows(run, lambda row: row.update(loss=row["step"] / 7)), 3, "are not those that"),
}  # fmt: skip
"""Change of the metrics of a run of three steps -> the step that it resumes from, and the message."""


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITS)
def test_a_run_resumes_where_its_rows_reach(cut, name, caplog):
    edit, step, said = EDITS[name]
    edit(cut.out)
    before = folder_hash(cut.out)
    if step is None:
        with pytest.raises(RunError, match=rf"metrics\.jsonl: .*{said}") as caught:
            open_run(cut)
        assert "\n" not in str(caught.value)
        assert "move history.jsonl away" in str(caught.value)
    else:
        assert open_run(cut) == checkpoint(cut.out, step)
        warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(warnings) == bool(said)
        assert said in "".join(warnings)
    assert folder_hash(cut.out) == before


@pytest.mark.parametrize("gone", ["history", "saves", "another checkpoint"])
def test_without_a_hash_of_the_rows_nothing_is_missing(cut, gone, caplog):
    """Runs of earlier versions lack the hash; removing it is also the way out that the error names."""
    keep_bytes(cut.out, 0)
    history = cut.out / "history.jsonl"
    if gone == "history":
        history.unlink()
    elif gone == "saves":
        history.write_text(history.read_text().splitlines()[0] + "\n")
    else:
        text = history.read_text()
        for event in read_history(history):
            text = text.replace(event.get("manifest", " "), "0" * 64)
        history.write_text(text)
    assert open_run(cut) == checkpoint(cut.out, 3)
    assert not caplog.records


def test_a_damaged_checkpoint_and_missing_rows_are_both_passed_over(cut, caplog):
    (checkpoint(cut.out, 3) / "state.json").write_text("{}")
    keep_bytes(cut.out, length(cut.out, 1))
    assert open_run(cut) == checkpoint(cut.out, 1)
    assert "step_00000003/state.json: damaged" in caplog.text
    assert "up to the checkpoint of step 2, found none of step 2; they are made again, after step 1" in caplog.text


@pytest.mark.slow
def test_rows_between_those_that_are_due_are_missed_too(scenes, tmp_path, monkeypatch, without_tensorboard, caplog):
    """A stop after the third step has a row, though rows are due every second step."""
    config = pretrain_config(scenes, tmp_path / "run", max_steps=6, log_every=2, checkpoint_every_steps=2)
    one_step = Trainer.one_step

    def stop(trainer, batches):
        one_step(trainer, batches)
        if trainer.step == 3:
            trainer.stop.reason = "a test"

    monkeypatch.setattr(Trainer, "one_step", stop)
    pretrain(config)
    run = RunFolder(config.out)
    assert missing_rows(run, checkpoint(config.out, 3)) == ""
    keep_bytes(config.out, length(config.out, 1))
    assert missing_rows(run, checkpoint(config.out, 3)) == "after step 2"
    assert checkpoint_to_resume(run, 6) == checkpoint(config.out, 2)
    keep_bytes(config.out, 0)
    assert missing_rows(run, checkpoint(config.out, 3)) == "of step 2"


@pytest.mark.slow
def test_a_resume_makes_missing_rows_again_and_the_run_is_sound(whole, cut, without_tensorboard, caplog):
    """Rows, weights, history and what `mvlm verify` reads are those of the whole run; the later checkpoints stay."""
    keep_bytes(cut.out, length(cut.out, 1))
    pretrain(cut)
    assert reproducible_rows(cut.out) == reproducible_rows(whole.out)
    assert checkpoint_contents(checkpoint(cut.out, 4)) == checkpoint_contents(checkpoint(whole.out, 4))
    assert [part["step"] for part in read_claims(cut.out, None).parts] == [0, 1]
    *checks, evaluation = verify_run(cut.out, steps=9)
    assert [problem for check in checks for problem in check.problems] == []
    assert evaluation.problems  # it has none
    for step in (2, 3):
        aside = cut.out / "checkpoints" / f"step_{step:08d}.ahead1"
        assert f"the checkpoint ahead of the rows of metrics is now {aside}" in caplog.text
        assert checkpoint_contents(aside) == checkpoint_contents(checkpoint(whole.out, step))


@pytest.mark.slow
def test_a_complete_run_says_which_rows_are_missing_and_changes_nothing(whole, tmp_path, caplog):
    out = Path(shutil.copytree(whole.out, tmp_path / "run"))
    keep_bytes(out, length(out, 2))
    before = folder_hash(out)
    pretrain(replace(whole, out=out, resume=True))
    assert folder_hash(out) == before
    assert "wanted all rows of the complete run, found none of steps 3 to 4; restore the file, or move" in caplog.text
    assert [*wrong_rows(read_claims(out, None))][:2] == ["no row of step 3", "no row of step 4"]


def test_rows_are_due_where_each_part_of_a_run_says():
    """Against a loop over steps; each step was made by the last part that began before it."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(1, high, (), generator=generator))

    for _ in range(50):
        parts = [{"event": "start", "step": 0, "log_every": draw(6)}]
        parts += [{"event": "start", "step": draw(40), "log_every": draw(6)} for _ in range(draw(4))]
        del parts[-1]["log_every"]  # of an older version
        step = draw(60)
        wanted = []
        for number in range(1, step + 1):
            made_by = [part for part in parts if part["step"] < number][-1]
            if number % made_by.get("log_every", 3) == 0:
                wanted.append(number)
        noise = [{"event": "save", "step": 7}]
        assert rows_due([*noise, *parts, *noise], step, 3) == wanted
    assert rows_due([json.loads('{"event": "start", "step": 0}')], 9, None) == []
