"""A study of a task: fine-tuned trials and baselines from one pretrained model."""

import csv
import json
from dataclasses import replace

import pytest

from mvlm.config.finetune import FinetuneConfig
from mvlm.errors import ConfigError, RunError
from mvlm.studies import trial as trials
from mvlm.studies.run import report_finished, run_study, trials_of
from mvlm.studies.study import Study
from mvlm.studies.trial import run_trial
from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import load_model
from mvlm_dataloading import DataError, open_dataset


def study(**changes) -> Study:
    values = {
        "name": "questions",
        "question": "Does the image help?",
        "task": "vqa",
        "base": "full",
        "seeds": [0],
        "measures": ["test.accuracy", "train.accuracy"],
        "splits": ["test", "train"],
        "budget": {"steps": 2},
        "settings": {
            "answers": "classifier",
            "batch_size": 8,
            "warmup_steps": 1,
            "eval_every_steps": 1,
            "device": "cpu",
        },
        "arms": {"full": {}, "text alone": {"blind": "image"}},
    }
    return Study(**(values | changes))


@pytest.mark.extended
@pytest.mark.slow
def test_trials_of_a_task_are_fine_tuned_and_evaluated_on_all_splits(questions, trained, tmp_path) -> None:
    assert run_study(study(), questions, tmp_path / "study", checkpoint=trained) == tmp_path / "study" / "study.html"
    with (tmp_path / "study" / "study.csv").open() as file:
        rows = {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}
    assert set(rows) == {(arm, f"{split}.accuracy") for arm in study().arms for split in ("test", "train")}
    result = json.loads((tmp_path / "study/trials/text-alone/seed_0/result.json").read_text())
    (alone,) = (t for t in trials_of(study(), questions, tmp_path / "other", trained) if t.arm == "text alone")
    assert isinstance(alone.config, FinetuneConfig)
    finetune(alone.config)  # by itself, without the study
    for split in ("test", "train"):
        figures, _ = evaluate_task(alone.config.out, questions, split)
        assert result["figures"][split] == figures
        assert float(rows["text alone", f"{split}.accuracy"]["mean"]) == pytest.approx(figures["accuracy"], rel=1e-5)
    assert rows["full", "test.accuracy"]["flops"] == ""
    assert len(result["curves"]["val_accuracy"]) == 2
    page = (tmp_path / "study" / "study.html").read_text()
    assert "Task vqa, 2 steps" in page
    assert "validation accuracy" in page
    # The model is that of the start. Older results said settings of another one.
    assert not [name for name in result["settings"] if name.startswith("model.")]
    results = [json.loads(line) for line in (tmp_path / "study" / "trials.jsonl").read_text().splitlines()]
    older = [json.dumps(r | {"settings": r["settings"] | {"model.width": 768}}) + "\n" for r in results]
    (tmp_path / "older.jsonl").write_text("".join(older))
    report_finished(study(), questions, tmp_path / "again", [tmp_path / "older.jsonl"], checkpoint=trained)
    again, first = ((tmp_path / name / "study.csv").read_bytes() for name in ("again", "study"))
    assert again == first


@pytest.mark.slow
def test_a_study_of_retrieval_has_the_recall_of_its_trials(scenes, trained, tmp_path) -> None:
    measures = ["test.mean_r1", "test.tr_r1", "test.ir_r10"]
    settings = {"batch_size": 8, "warmup_steps": 1, "device": "cpu", "precision": "fp32"}
    retrieval = study(task="retrieval", measures=measures, splits=["test"], settings=settings, arms={"full": {}})
    assert run_study(retrieval, scenes, tmp_path / "study", checkpoint=trained) is not None
    result = json.loads((tmp_path / "study/trials/full/seed_0/result.json").read_text())
    (trial,) = trials_of(retrieval, scenes, tmp_path / "other", trained)
    finetune(trial.config)  # pyright: ignore[reportArgumentType]
    model = load_model(trial.config.out, "cpu")
    found = model.evaluate(open_dataset(scenes, "test")).figures
    assert result["figures"]["test"]["tr_r1"] == pytest.approx(found["tr"]["r1"])
    assert result["figures"]["test"]["ir_r10"] == pytest.approx(found["ir"]["r10"])
    assert result["figures"]["test"]["mean_r1"] == pytest.approx((found["tr"]["r1"] + found["ir"]["r1"]) / 2)


@pytest.mark.slow
def test_mistakes_are_refused_before_a_trial_is_run(questions, trained, tmp_path) -> None:
    with pytest.raises(ConfigError, match="checkpoint: wanted a pretrained model to fine-tune, found none"):
        trials_of(study(), questions, tmp_path)
    with pytest.raises(DataError, match="wanted the split artist, found test, train, validation"):
        trials_of(study(splits=["artist"], measures=["artist.accuracy"]), questions, tmp_path, trained)
    for measure in ("test.acuracy", "artist.accuracy", "accuracy"):
        with pytest.raises(ConfigError, match=f"got '{measure}'; did you mean test.accuracy"):
            run_study(study(splits=["test"], measures=[measure]), questions, tmp_path, checkpoint=trained)
    assert not list(tmp_path.rglob("run"))
    (trial,) = trials_of(study(arms={"full": {}}), questions, tmp_path, trained)
    trial.folder.mkdir(parents=True)
    trial.file.write_text(json.dumps({"format_version": 1, "settings": trial.settings | {"start": "0" * 64}}))
    with pytest.raises(RunError, match="found one with another start; choose another --out"):
        run_study(study(arms={"full": {}}), questions, tmp_path, checkpoint=trained)


@pytest.mark.slow
def test_a_trial_that_has_begun_from_another_model_is_not_continued(questions, trained, tmp_path, monkeypatch) -> None:
    """The trial has no result yet, and its run would go on from the weights of the first model."""
    (trial,) = trials_of(study(arms={"full": {}}), questions, tmp_path / "study", trained)

    def stopped(config: FinetuneConfig, *options: bool) -> str:
        finetune(config, *options)
        return "SIGTERM"

    with monkeypatch.context() as patch:
        patch.setattr(trials, "finetune", stopped)
        assert run_trial(trial) is None
    assert not trial.file.exists()
    with pytest.raises(RunError, match="seed_0: the trial has begun from another pretrained model"):
        run_trial(replace(trial, start="0" * 64))
    fresh = replace(trial, folder=tmp_path / "fresh", start="0" * 64)
    with pytest.raises(RunError, match="changed since the study was set up; run the same command again"):
        run_trial(fresh)
    result = run_trial(trial)
    assert result is not None
    assert result["settings"]["start"] == trial.start


def test_files_that_settings_name_are_settings_by_their_content(questions, trained, tmp_path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text('["red", "blue"]')
    small = study(arms={"full": {}}, settings=study().settings | {"answer_list": str(answers)})
    (trial,) = trials_of(small, questions, tmp_path / "study", trained)
    made = {"format_version": 1, "settings": trial.settings}
    assert trial.same_settings(made)
    answers.write_text('["blue", "red"]')
    (changed,) = trials_of(small, questions, tmp_path / "study", trained)
    assert not changed.same_settings(made)
    older = {"format_version": 1, "settings": {k: v for k, v in trial.settings.items() if k != "files"}}
    assert changed.same_settings(older)  # it does not tell
