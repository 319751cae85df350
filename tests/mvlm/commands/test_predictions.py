"""`mvlm eval TASK --predictions FILE` and `mvlm score --out FILE` replace their own files and no others."""

import json
from pathlib import Path

import pytest

from mvlm.tasks.score import WRITTEN, write_predictions
from support.commands import assert_refused
from support.folders import folder_hash

NO_RUN = "wanted a run, a checkpoint or an exported folder, found no such folder"
REFERENCES = {
    "vqa": '{"annotations": []}',
    "entailment": '{"pairID": "a", "gold_label": "neutral"}\n',
    "pairs": '{"identifier": "a-0-0-0", "label": "True"}\n',
    "caption": '[{"id": 1, "image_id": 1, "caption": "a"}]',
}


def evaluate(run_mvlm, tmp_path: Path, task: str, predictions: Path, *more: object):
    """An evaluation of a run that does not exist: whatever is refused before that is refused before any work."""
    words = ("--checkpoint", tmp_path / "none", "--data", tmp_path / "no data", "--device", "cpu")
    return run_mvlm("eval", task, *words, "--predictions", predictions, *more)


@pytest.mark.parametrize("task", WRITTEN)
def test_only_new_or_empty_files_and_predictions_of_the_task_are_written(run_mvlm, tmp_path, task):
    others = {"notes": "a note", "numbers": "[1]", "object": '{"a": 1}', "bytes": b"\xff\xfe", "table": "a,b\n"}
    others |= {f"{name} references": text for name, text in REFERENCES.items()}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    records = [{"sample": 0, "answer": "a\u2028b", "label": "true", "caption": "c"}]
    samples = [{"question_id": 1, "identifier": "a-0-0-0", "image_id": "coco 1"}]
    for other in WRITTEN:
        write_predictions(tmp_path / other, other, records, samples)
    (tmp_path / "empty").touch()
    before, out = folder_hash(tmp_path), tmp_path / "out.json"
    for path in (tmp_path / "new/file", tmp_path / "empty", tmp_path / task):
        assert_refused(evaluate(run_mvlm, tmp_path, task, path), NO_RUN)
    for name in (*others, *(set(WRITTEN) - {task}), "."):
        assert_refused(evaluate(run_mvlm, tmp_path, task, tmp_path / name), "predictions: wanted ")
    for same in (out, tmp_path / "x/../out.json"):
        assert_refused(evaluate(run_mvlm, tmp_path, task, same, "--out", out), "predictions: wanted another file")
    assert folder_hash(tmp_path) == before


def test_scores_replace_earlier_scores_alone(run_mvlm, tmp_path):
    lines = '{"pairID": 1, "label": "neutral", "gold_label": "neutral"}\n'
    files = [tmp_path / name for name in ("mine.jsonl", "truth.jsonl", "other.jsonl", "notes.txt")]
    for file in files:
        file.write_text(lines)
    words = ("score", "entailment", *files[:2], "--other", files[2], "--out")
    for file in files:
        assert_refused(run_mvlm(*words, file), "out: wanted")
        assert file.read_text() == lines
    assert_refused(run_mvlm(*words, tmp_path / "x/../truth.jsonl"), "out: wanted")
    for _ in range(2):
        assert run_mvlm(*words, tmp_path / "out.json").code == 0
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] == 100
