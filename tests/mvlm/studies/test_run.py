"""Studies of a micro model, from trials to table and page."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mvlm import cli
from mvlm.errors import ConfigError, NonFiniteLossError, RunError
from mvlm.runs.load import load_model
from mvlm.studies import run as studies
from mvlm.studies.run import plan_trials, report_finished, run_study
from mvlm.studies.study import Study
from mvlm.studies.trial import read_result, run_trial, take_result
from mvlm.training.run import pretrain
from mvlm_dataloading import ShardWriter, open_dataset
from support.models import MICRO
from support.scenes import png, scene


def study(**changes) -> Study:
    """Two arms that are equal but for their names, one that differs in its seed, one without MIM; two seeds."""
    values = {
        "name": "micro",
        "question": "Do <names> matter?",
        "preset": "tiny",
        "base": "base",
        "seeds": [0, 1],
        "measures": ["ir.r1", "tr.r10", "masked_nats", "masked_l1"],
        "budget": {"steps": 2},
        "settings": {
            "model": {**MICRO, "image_mean": list(MICRO["image_mean"]), "image_std": list(MICRO["image_std"])},
            "batch_size": 8,
            "warmup_steps": 1,
            "eval_every_steps": 1,
            "device": "cpu",
        },
        "arms": {"base": {}, "same": {}, "other seed": {"seed": 50}, "no MIM": {"mim_weight": 0.0}},
        "limits": "Two steps.",
    }
    return Study(**(values | changes))


@pytest.fixture(scope="module")
def finished(scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("study")
    page = run_study(study(), scenes, out)
    assert page == out / "study.html"
    return out


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "study.csv").open() as file:
        return {(row["arm"], row["measure"]): row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_an_arm_that_differs_in_its_name_alone_differs_by_nothing(finished: Path) -> None:
    table = rows(finished)
    for measure in study().measures:
        same = table["same", measure]
        assert {float(same[c]) for c in ("difference", "low_over_seeds", "high_over_seeds", "sd_paired")} == {0.0}
        assert same["mean"] == table["base", measure]["mean"]
        assert same["seeds"] == "2"
    assert float(table["other seed", "masked_nats"]["difference"]) != 0
    assert float(table["no MIM", "masked_l1"]["difference"]) != 0


@pytest.mark.slow
def test_a_result_on_other_images_is_not_taken(finished: Path, scenes, tmp_path: Path) -> None:
    trial = plan_trials(study(), scenes, tmp_path)[0]
    other = replace(trial, evaluated={"test": "the fingerprint of other images"})
    assert take_result(other, finished) is None
    assert take_result(trial, finished) is not None
    with pytest.raises(RunError, match="found one of others; choose another --out"):
        read_result(other)


@pytest.mark.slow
def test_table_and_page_say_what_was_run(finished: Path) -> None:
    table = rows(finished)
    base, cheap = table["base", "ir.r1"], table["no MIM", "ir.r1"]
    assert base["steps"] == "2"
    assert 0 < float(cheap["flops"]) < float(base["flops"])
    assert base["fingerprint"]
    assert base["machine"]
    assert base["low_over_seeds_and_images"] != ""
    assert table["base", "masked_nats"]["low_over_seeds_and_images"] == ""
    page = (finished / "study.html").read_text()
    assert "Do &lt;names&gt; matter?" in page
    assert "Two steps." in page
    assert "2 seeds an arm, 8 images" in page
    assert page.count("<polyline") >= 4


@pytest.mark.slow
def test_a_finished_study_runs_nothing_and_writes_the_same(finished: Path, scenes, monkeypatch) -> None:
    before = (finished / "study.csv").read_bytes()
    monkeypatch.setattr(studies, "run_trial", None)  # a call would fail
    run_study(study(), scenes, finished)
    assert (finished / "study.csv").read_bytes() == before
    assert not list(finished.rglob("checkpoints"))


@pytest.mark.slow
def test_parts_on_one_folder_make_the_study(finished: Path, scenes, tmp_path: Path) -> None:
    small = study(arms={"base": {}, "same": {}})
    assert run_study(small, scenes, tmp_path, (2, 2)) is None  # the first part is missing
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert run_study(small, scenes, tmp_path, (1, 2)) == tmp_path / "study.html"
    assert rows(tmp_path)["same", "ir.r1"] == rows(finished)["same", "ir.r1"]


@pytest.mark.slow
def test_equal_trials_of_another_study_are_taken_over(finished: Path, scenes, tmp_path: Path, monkeypatch) -> None:
    ran = []
    monkeypatch.setattr(studies, "run_trial", lambda trial: ran.append((trial.arm, trial.seed)))
    arms = {"renamed": {}, "other clip": {"clip_norm": 0.5}}
    run_study(study(base="renamed", seeds=[0, 1], arms=arms), scenes, tmp_path, reuse=[tmp_path, finished])
    assert ran == [("other clip", 0)]  # a trial that returns nothing was asked to stop
    taken = json.loads((tmp_path / "trials/renamed/seed_0/result.json").read_text())
    made = json.loads((finished / "trials/base/seed_0/result.json").read_text())
    assert taken == made | {"arm": "renamed"}


@pytest.mark.slow
def test_a_study_is_continued_from_one_file(finished: Path, scenes, tmp_path: Path) -> None:
    """`trials.jsonl` has all that the table is made from: it is what a repository keeps of a study."""
    lines = (finished / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8
    half = tmp_path / "half.jsonl"
    half.write_text("".join(line for line in lines if json.loads(line)["seed"] == 0))
    report_finished(study(), scenes, tmp_path / "part", [half])
    assert {row["seeds"] for row in rows(tmp_path / "part").values()} == {"1"}
    report_finished(study(), scenes, tmp_path / "whole", [half, finished / "trials.jsonl"])
    for name in ("study.csv", "trials.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (finished / name).read_bytes()
    with pytest.raises(RunError, match="wanted finished trials of micro, found none; run the study first"):
        report_finished(study(), scenes, tmp_path / "none")


@pytest.mark.slow
def test_a_result_older_than_a_setting_had_its_default(finished: Path, scenes, tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    results = [json.loads(line) for line in (finished / "trials.jsonl").read_text().splitlines()]
    for result in results:
        del result["settings"]["ema_decay"], result["settings"]["model.text_pooling"]
    old.write_text("".join(f"{json.dumps(result)}\n" for result in results))
    report_finished(study(), scenes, tmp_path / "now", [old])
    assert (tmp_path / "now/study.csv").read_bytes() == (finished / "study.csv").read_bytes()
    report_finished(study(), scenes, tmp_path / "now", [old])  # the results that were copied are as old
    arms = {"base": {"ema_decay": 0.9}}
    with pytest.raises(RunError, match="found none"):
        report_finished(study(arms=arms), scenes, tmp_path / "other", [old])


@pytest.mark.slow
def test_results_of_other_settings_are_refused(finished: Path, scenes, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy")
    changed = study(arms={"base": {"clip_norm": 0.5}})
    with pytest.raises(RunError, match=r"seed_0/result\.json: wanted .* found one with another clip_norm; choose"):
        run_study(changed, scenes, tmp_path / "copy")
    for change, name in (({"rerank": 4}, "rerank"), ({"arms": {"base": {"fraction": 0.5}}}, "samples")):
        with pytest.raises(RunError, match=f"found one with another {name}; choose"):
            run_study(study(**change), scenes, tmp_path / "copy")
    file = next((tmp_path / "copy").rglob("result.json"))
    file.write_text(json.dumps({"format_version": 1}))
    with pytest.raises(RunError, match="wanted the result of a trial, got KeyError"):
        run_study(study(), scenes, tmp_path / "copy")


def test_a_fraction_is_drawn_from_all_training_images(two_splits_of_one_image, tmp_path: Path) -> None:
    """The whole has every test image in train, so its fraction has about as many of them."""
    view = open_dataset(studies.training_data(0.5, two_splits_of_one_image, tmp_path), "train")
    assert view.description["rejected"] == {"not in the fraction": 40 - len(view)}
    assert 10 <= len(view) <= 30


@pytest.fixture
def two_splits_of_one_image(tmp_path: Path) -> Path:
    """40 training and 40 test samples, all with one image."""
    image = png(scene(0)[0])
    with ShardWriter(tmp_path / "one", name="one", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for split in ("train", "test"):
            for i in range(40):
                assert writer.add(f"{split}{i:03d}", image, [f"number {i}"], {}, split=split) is None
    return tmp_path / "one"


@pytest.mark.slow
def test_flops_of_an_arm_are_those_of_its_own_tokenizer(scenes, tmp_path: Path) -> None:
    arms = {"base": {}, "few": {"model": {"vocab_size": 262}}}  # hardly a merge, so captions have more tokens
    both = {t.arm: t.flops for t in plan_trials(study(arms=arms, seeds=[0]), scenes, tmp_path)}
    (alone,) = plan_trials(study(arms={"few": arms["few"]}, base="few", seeds=[0]), scenes, tmp_path)
    assert both["few"] == alone.flops


def test_an_arm_without_itm_is_ranked_by_itc(scenes, tmp_path: Path) -> None:
    arms = {"base": {}, "no ITM": {"itm_weight": 0.0}}
    trials = plan_trials(study(seeds=[0], arms=arms, base="base", rerank=5), scenes, tmp_path)
    assert {t.arm: t.rerank for t in trials} == {"base": 5, "no ITM": 0}


@pytest.mark.slow
def test_a_trial_that_continues_a_model_without_itm_is_ranked_by_itc(scenes, tmp_path: Path) -> None:
    without = study().settings | {"itm_weight": 0.0}
    (start,) = plan_trials(study(seeds=[0], arms={"base": {}}, settings=without), scenes, tmp_path / "start")
    pretrain(start.config)  # pyright: ignore[reportArgumentType]
    settings = without | {"initial_model": str(start.config.out)}
    (trial,) = plan_trials(study(seeds=[0], arms={"base": {}}, settings=settings), scenes, tmp_path)
    result = run_trial(trial)
    assert result is not None
    assert result["figures"]["reranked"] == 0


@pytest.mark.slow
def test_a_trials_time_has_that_of_a_process_that_was_stopped(scenes, tmp_path: Path) -> None:
    (trial,) = plan_trials(study(seeds=[0], arms={"base": {}}), scenes, tmp_path)
    pretrain(trial.config)  # pyright: ignore[reportArgumentType]
    metrics = trial.config.out / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row | {"seconds": row["seconds"] + 1000}) + "\n" for row in lines))
    result = run_trial(trial)
    assert result is not None
    assert 1000 < result["seconds"] < 1300


@pytest.mark.slow
def test_a_budget_of_flops_buys_cheap_arms_more_steps(scenes, tmp_path: Path) -> None:
    trials = {t.arm: t for t in plan_trials(study(), scenes, tmp_path) if t.seed == 0}
    flops = {arm: trial.flops or 0 for arm, trial in trials.items()}
    step = flops["base"] / 2
    bought = {t.arm: t for t in plan_trials(study(budget={"flops": 10.5 * step}), scenes, tmp_path) if t.seed == 0}
    assert bought["base"].config.max_steps == 10
    assert bought["no MIM"].config.max_steps > 10
    cheap = bought["no MIM"].flops or 0
    assert 0 < cheap <= 10.5 * step < cheap + flops["no MIM"] / 2
    with pytest.raises(ConfigError, match="budget: wanted enough for one step"):
        plan_trials(study(budget={"flops": 0.9 * step}), scenes, tmp_path)


def test_a_log_may_lie_in_a_study_s_folder(scenes, tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("")
    with pytest.raises(ConfigError, match="measures: wanted a figure"):
        run_study(study(measures=["no.figure"], seeds=[0], arms={"base": {}}), scenes, tmp_path)


def test_an_arm_that_diverges_does_not_stop_the_others(scenes, tmp_path: Path, monkeypatch) -> None:
    ran = []

    def diverges(trial):
        ran.append(trial.arm)
        if trial.arm == "base":
            raise NonFiniteLossError("the losses are not finite")
        return run_trial(trial)

    monkeypatch.setattr(studies, "run_trial", diverges)
    with pytest.raises(RunError, match="wanted finite losses, found others in base, seed 0; leave these arms out"):
        run_study(study(seeds=[0], arms={"base": {}, "same": {}}), scenes, tmp_path)
    assert ran == ["base", "same"]
    assert [file.parent.parent.name for file in tmp_path.rglob("result.json")] == ["same"]


@pytest.mark.slow
def test_results_to_reuse_are_checked(finished: Path, scenes, tmp_path: Path, monkeypatch, caplog) -> None:
    with pytest.raises(RunError, match=r"study.csv: wanted results of trials, trials.jsonl, got .*; leave it out"):
        run_study(study(), scenes, tmp_path / "one", reuse=[finished / "study.csv"])
    monkeypatch.setattr(studies, "run_trial", lambda trial: None)  # each is asked to stop
    with caplog.at_level("INFO"):
        run_study(study(), scenes, tmp_path / "two", reuse=[tmp_path / "gone"])
    assert f"{tmp_path}/gone: no results to take, there is no such place" in caplog.text
    shutil.copytree(finished, tmp_path / "own")
    (tmp_path / "own/trials/same/seed_0/result.json").unlink()
    run_study(study(), scenes, tmp_path / "own", reuse=[tmp_path / "own/trials.jsonl"])
    assert not (tmp_path / "own/trials/same/seed_0/result.json").exists()  # not taken from its own equal arm


@pytest.mark.slow
def test_checkpoints_that_a_kill_left_behind_a_result_are_removed(finished: Path, scenes, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "own")
    left = tmp_path / "own/trials/same/seed_0/run/checkpoints/step_00000002"
    left.mkdir(parents=True)
    run_study(study(), scenes, tmp_path / "own")
    assert not left.parent.exists()


def test_a_study_of_pretraining_takes_no_checkpoint(scenes, trained, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="begins from random weights; set initial_model in its settings"):
        plan_trials(study(), scenes, tmp_path, trained)
    settings = study().settings | {"initial_model": str(trained)}
    (trial,) = plan_trials(study(seeds=[0], arms={"base": {}}, settings=settings), scenes, tmp_path)
    assert trial.files == {"initial_model": load_model(trained, "cpu").sha256}


def test_ranks_of_torchrun_are_refused(monkeypatch, tmp_path: Path) -> None:
    """Each rank would take another trial, and wait for the others in it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="study: wanted one process, found ranks of torchrun; give --jobs N"):
        cli.run_command(["study", "studies/smoke.toml", "--data", str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_folder_of_other_files_is_refused(scenes, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}")
    with pytest.raises(RunError, match="that of a study, found dataset"):
        run_study(study(), scenes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dataset.json"]


@pytest.mark.slow
def test_a_wrong_measure_is_known_after_the_first_trial(scenes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"measures: wanted a figure of .*, got 'ir.r11'"):
        run_study(study(measures=["ir.r1", "ir.r11"]), scenes, tmp_path)
    assert len(list(tmp_path.rglob("result.json"))) == 1
