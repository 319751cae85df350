"""`mvlm data ...` of downstream tasks: from files as published to shards, to a fine-tuned model."""

import json

import pytest

from support import published_tasks
from support.commands import assert_refused

TASKS = {
    "vqa": ("vqa-v2", published_tasks.vqa_v2, 12, []),
    "pairs": ("nlvr", published_tasks.nlvr, 4, ["--permutations", "2"]),
    "entailment": ("snli-ve", published_tasks.snli_ve, 6, []),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_model_is_fine_tuned_and_scored_on_files_as_published(run_data, run_mvlm, trained, tmp_path, task):
    name, write, questions, words = TASKS[task]
    write(tmp_path / "in")
    assert run_data(name, tmp_path / "in", tmp_path / "data", *words).code == 0
    flags = ["--max-steps", 2, "--batch-size", 4, "--warmup-steps", 1, "--device", "cpu"]
    data = ["--data", tmp_path / "data"]
    outcome = run_mvlm("finetune", task, "--checkpoint", trained, *data, "--out", tmp_path / "run", *flags)
    assert outcome.code == 0, outcome.err
    figures = tmp_path / "figures.json"
    outcome = run_mvlm(
        "eval", task, "--checkpoint", tmp_path / "run", *data, "--split", "validation", "--out", figures,
        "--device", "cpu",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = json.loads(figures.read_text())
    assert len(found["records"]) == questions
    assert 0 <= found["accuracy"] <= 100
    if task == "vqa":
        assert set(found["by_answer_type"]) == {"other", "yes/no", "number"}


def test_duplicates_of_questions_stay_and_images_are_held_out_in_one_way(run_data, tmp_path):
    published_tasks.vqa_v2(tmp_path / "in")
    assert_refused(run_data("vqa-v2", tmp_path / "in", tmp_path / "o", "--drop-duplicates"), "leave the flag out")
    both = ["--held-out", 2, "--minival", tmp_path / "no.json"]
    assert_refused(run_data("vqa-v2", tmp_path / "in", tmp_path / "o", *both), "--minival")
    assert not (tmp_path / "o").exists()
