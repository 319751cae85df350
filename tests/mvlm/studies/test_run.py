"""Studies of a micro model, from trials to table and page."""

import csv
import gzip
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvlm import cli
from mvlm.errors import ConfigError, NonFiniteLossError, RunError
from mvlm.studies import run as studies
from mvlm.studies.page import MEASURES
from mvlm.studies.run import report_finished, run_study, trials_of
from mvlm.studies.study import Study, read_study
from mvlm.studies.trial import read_result, run_trial, take_result
from mvlm.studies.update_costs import update_flops
from mvlm.tasks.evaluate import evaluate_task
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import load_model
from mvlm.training.run import pretrain
from mvlm_dataloading import ShardWriter, open_dataset, tokenizer_for
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
    out, said = tmp_path_factory.mktemp("study"), list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.Logger, "handle", lambda _, record: said.append(record.getMessage()))
        patch.setattr(logging.Logger, "isEnabledFor", lambda *_: True)
        page = run_study(study(), scenes, out)
    ends = [line for line in said if " is complete" in line]
    assert len(ends) == 8
    assert "mvlm eval" not in "".join(ends)  # of checkpoints that are removed
    assert page == out / "study.html"
    assert page is not None
    text = page.read_text()
    assert "MLM, nats per masked token; x: steps" in text
    assert "2 seeds are too few" in text
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
def test_measures_are_the_figures_of_a_trial(finished: Path) -> None:
    def names(figures: dict[str, Any], prefix: str = "") -> set[str]:
        found = set()
        for name, value in figures.items():
            found |= names(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}"}
        return found

    figures = json.loads(next(finished.glob("trials/base/*/result.json")).read_text())["figures"]
    recalls = names({way: figures[way] for way in ("tr", "ir", "itc", "itm")})
    recalls |= {name.replace("tr.", "") for name in recalls if "ir." not in name}  # the mean of both directions
    others = {name for name, x in figures.items() if isinstance(x, float)} - {"seconds"}
    of_edits = {"two_way.words_pct", "two_way.cells_pct"}  # which these data have not
    assert recalls | {f"unseen.{name}" for name in recalls} | others | of_edits == MEASURES


@pytest.mark.slow
def test_a_result_on_other_images_is_not_taken(finished: Path, scenes, tmp_path: Path) -> None:
    trial = trials_of(study(), scenes, tmp_path)[0]
    other = replace(trial, evaluated={"test": "the fingerprint of other images"})
    assert take_result(other, finished) is None
    assert take_result(trial, finished) is not None
    with pytest.raises(RunError, match="found one of others; choose another --out"):
        read_result(other)


@pytest.mark.slow
def test_a_finished_study_runs_nothing_and_writes_the_same(finished: Path, scenes, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(finished, tmp_path / "own")
    left = tmp_path / "own/trials/same/seed_0/run/checkpoints/step_00000002"  # by a kill after the result
    left.mkdir(parents=True)
    monkeypatch.setattr(studies, "run_trial", None)  # a call would fail
    run_study(study(), scenes, tmp_path / "own")
    assert (tmp_path / "own/study.csv").read_bytes() == (finished / "study.csv").read_bytes()
    assert not list((tmp_path / "own").rglob("checkpoints"))


@pytest.mark.slow
def test_parts_on_one_folder_make_the_study(finished: Path, scenes, tmp_path: Path) -> None:
    small = study(arms={"base": {}, "same": {}})
    assert run_study(small, scenes, tmp_path, (2, 2)) is None  # the first part is missing
    assert len(list(tmp_path.rglob("result.json"))) == 2
    assert run_study(small, scenes, tmp_path, (1, 2)) == tmp_path / "study.html"
    assert rows(tmp_path)["same", "ir.r1"] == rows(finished)["same", "ir.r1"]


@pytest.mark.slow
def test_equal_trials_of_another_study_are_taken_over(
    finished: Path, scenes, tmp_path: Path, monkeypatch, caplog
) -> None:
    ran, places = [], [tmp_path, tmp_path / "mistyped", finished]
    monkeypatch.setattr(studies, "run_trial", lambda trial: ran.append((trial.arm, trial.seed)))
    arms = {"renamed": {}, "other clip": {"clip_norm": 0.5}}
    with caplog.at_level("INFO"):
        run_study(study(base="renamed", seeds=[0, 1], arms=arms), scenes, tmp_path, reuse=places)
    assert str(tmp_path / "mistyped") in caplog.text
    assert ran == [("other clip", 0)]  # a trial that returns nothing was asked to stop
    taken = json.loads((tmp_path / "trials/renamed/seed_0/result.json").read_text())
    made = json.loads((finished / "trials/base/seed_0/result.json").read_text())
    assert taken == made | {"arm": "renamed"}


@pytest.mark.slow
def test_a_study_is_continued_from_one_file(finished: Path, scenes, tmp_path: Path) -> None:
    """`trials.jsonl` has all that the table is made from: it is what a repository keeps of a study."""
    lines = (finished / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8
    half = tmp_path / "half.jsonl.gz"
    half.write_bytes(gzip.compress("".join(line for line in lines if json.loads(line)["seed"] == 0).encode()))
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
        del result["settings"]["ema_decay"], result["settings"]["model.contrast_masked"]
    old.write_text("".join(f"{json.dumps(result)}\n" for result in results))
    report_finished(study(), scenes, tmp_path / "now", [old])
    assert (tmp_path / "now/study.csv").read_bytes() == (finished / "study.csv").read_bytes()
    report_finished(study(), scenes, tmp_path / "now", [old])  # the results that were copied are as old
    arms = {"base": {"ema_decay": 0.9}}
    with pytest.raises(RunError, match="found none"):
        report_finished(study(arms=arms), scenes, tmp_path / "other", [old])


@pytest.mark.slow
def test_mistakes_are_refused(finished: Path, scenes, trained, tmp_path: Path, monkeypatch) -> None:
    """Before a trial is run."""
    copy, other = shutil.copytree(finished, tmp_path / "copy"), tmp_path / "other"
    other.mkdir()
    (other / "dataset.json").write_text("{}")
    broken = shutil.copytree(finished, tmp_path / "broken")
    next(broken.rglob("result.json")).write_text('{"format_version": 1}')
    base = {"arms": {"base": {}}}
    refused: list[Any] = [
        ({"arms": {"base": {"clip_norm": 0.5}}}, copy, {}, RunError, "found one with another clip_norm"),
        ({"rerank": 4}, copy, {}, RunError, "found one with another rerank"),
        ({"arms": {"base": {"fraction": 0.5}}}, copy, {}, RunError, "found one with another samples"),
        ({}, broken, {}, RunError, "wanted the result of a trial, found object missing"),
        ({}, other, {}, RunError, "that of a study, found dataset"),
        ({}, tmp_path / "new", {"reuse": [finished / "study.csv"]}, RunError, "study.csv: wanted results of trials"),
        ({}, tmp_path / "new", {"checkpoint": trained}, ConfigError, "set initial_model in its settings"),
        ({"seeds": [0], "measures": ["no.figure"], **base}, tmp_path / "new", {}, ConfigError, "measures: wanted"),
        ({"measures": ["gain_txt_nats"]}, tmp_path / "new", {}, ConfigError, "did you mean gain_text_nats"),
    ]  # fmt: skip
    for changes, out, options, error, words in refused:
        with pytest.raises(error, match=words):
            run_study(study(**changes), scenes, out, **options)
    assert not list((tmp_path / "new").rglob("run"))
    monkeypatch.setenv("WORLD_SIZE", "2")  # each rank would take another trial, and wait for the others in it
    with pytest.raises(ConfigError, match="study: wanted one process, found ranks of torchrun; give --jobs N"):
        cli.find_command(
            ["study", "studies/objectives.toml", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
        )()


@pytest.mark.extended
@pytest.mark.slow
def test_a_trial_without_itm_is_ranked_by_itc_and_stopped_time_counts(scenes, tmp_path: Path) -> None:
    """Also one that continues a model that was trained without."""
    without = study().settings | {"itm_weight": 0.0}
    arms = {"base": {}, "no ITM": {"itm_weight": 0.0}}
    planned = trials_of(study(seeds=[0], arms=arms, rerank=5), scenes, tmp_path / "arms")
    assert {t.arm: t.rerank for t in planned} == {"base": 5, "no ITM": 0}
    (start,) = trials_of(study(seeds=[0], arms={"base": {}}, settings=without), scenes, tmp_path / "start")
    pretrain(start.config)  # pyright: ignore[reportArgumentType]
    metrics = start.config.out / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row | {"seconds": row["seconds"] + 1000}) + "\n" for row in lines))
    settings = without | {"initial_model": str(start.config.out)}
    (trial,) = trials_of(study(seeds=[0], arms={"base": {}}, settings=settings), scenes, tmp_path)
    assert trial.files == {"initial_model": load_model(start.config.out, "cpu").sha256}
    result = run_trial(trial)
    assert result is not None
    assert result["figures"]["reranked"] == 0
    stopped = run_trial(start)
    assert stopped is not None
    assert 1000 < stopped["seconds"] < 1300


@pytest.mark.slow
def test_a_budget_of_flops_buys_cheap_arms_more_steps(scenes, tmp_path: Path, monkeypatch) -> None:
    """An arm has the FLOPs of its own tokenizer: with hardly a merge, captions have more tokens."""
    few = {"few": {"model": {"vocab_size": 262}}}
    trials = {t.arm: t for t in trials_of(study(arms=study().arms | few, seeds=[0]), scenes, tmp_path)}
    flops = {arm: trial.flops or 0 for arm, trial in trials.items()}
    (alone,) = trials_of(study(arms=few, base="few", seeds=[0]), scenes, tmp_path)
    assert flops["few"] == alone.flops
    step = flops["base"] / 2
    split, config = open_dataset(scenes, "train"), trials["base"].config
    tokenizer = tokenizer_for(split, MICRO["vocab_size"])
    longest = config.model.text_length
    lengths = [len(tokenizer.encode([split.captions(i)[0]], longest)[0]) for i in range(len(split))]
    assert step == pytest.approx(update_flops(config, sum(lengths) / len(lengths)))  # pyright: ignore[reportArgumentType]
    bought = {t.arm: t for t in trials_of(study(budget={"flops": 10.5 * step}), scenes, tmp_path) if t.seed == 0}
    assert bought["base"].config.max_steps == 10
    assert bought["no MIM"].config.max_steps > 10
    cheap = bought["no MIM"].flops or 0
    assert 0 < cheap <= 10.5 * step < cheap + flops["no MIM"] / 2
    # An arm's own budget: steps, or the FLOPs of another arm.
    arms = {"long": {"budget": {"steps": 9}}, "as long": {"mim_weight": 0.0, "budget": {"flops_of": "long"}}}
    own = {t.arm: t for t in trials_of(study(arms=study().arms | arms, seeds=[0]), scenes, tmp_path)}
    assert own["long"].flops == pytest.approx(9 * step)
    assert own["base"].config.max_steps == 2
    assert own["as long"].config.max_steps == int(9 * step / (flops["no MIM"] / 2))
    # The time of another arm, with a step that takes a third as long.
    monkeypatch.setattr(studies, "step_times", lambda configs, out: {"long": 0.3, "in time": 0.1})
    arms["in time"] = {"mim_weight": 0.0, "budget": {"seconds_of": "long"}}
    timed = {t.arm: t for t in trials_of(study(arms=study().arms | arms, seeds=[0]), scenes, tmp_path)}
    assert timed["in time"].config.max_steps == 27
    assert timed["in time"].step_seconds == 0.1
    with pytest.raises(ConfigError, match="budget: wanted enough for one step"):
        trials_of(study(budget={"flops": 0.9 * step}), scenes, tmp_path)


@pytest.mark.slow
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


def test_a_fraction_is_drawn_from_all_training_images(tmp_path: Path) -> None:
    """The whole has every test image in train, so its fraction has about as many of them."""
    image, one = png(scene(0)[0]), tmp_path / "one"
    with ShardWriter(one, name="one", source="tests", licence="CC0", attribution="", recipe={}) as writer:
        for i in range(80):
            split = ("train", "test")[i % 2]
            assert writer.add(f"{split}{i:03d}", image, [f"number {i}"], {}, split=split) is None
    view = open_dataset(studies.training_data(0.5, one, tmp_path), "train")
    assert view.description["rejected"] == {"not in the fraction": 40 - len(view)}
    assert 10 <= len(view) <= 30


@pytest.mark.slow
def test_the_model_of_each_trial_is_fine_tuned_and_evaluated(scenes, questions, tmp_path) -> None:
    stage = {"data": str(questions), "splits": ["test", "train"], "max_steps": 1, "warmup_steps": 0, "batch_size": 8,
             "answers": "classifier", "eval_every_steps": 0, "device": "cpu"}  # fmt: skip
    settings = study().settings | {"eval_every_steps": 0}
    both = study(
        arms={"base": {}}, seeds=[1], settings=settings, measures=["ir.r1", "vqa.train.accuracy"], then={"vqa": stage}
    )
    assert run_study(both, scenes, tmp_path / "study") is not None
    (trial,) = trials_of(both, scenes, tmp_path / "by-hand")
    pretrain(trial.config)  # pyright: ignore[reportArgumentType]
    finetune(trial.then[0].config)
    result = json.loads((tmp_path / "study/trials/base/seed_1/result.json").read_text())
    for split in ("test", "train"):
        assert result["figures"]["vqa"][split] == evaluate_task(trial.then[0].config.out, questions, split)[0]
    assert (
        rows(tmp_path / "study")["base", "vqa.train.accuracy"]["mean"]
        == f"{result['figures']['vqa']['train']['accuracy']:.6g}"
    )
    assert not list((tmp_path / "study").rglob("checkpoints"))
    longer = replace(both, then={"vqa": stage | {"max_steps": 2}})
    with pytest.raises(RunError, match="found one with another then"):
        run_study(longer, scenes, tmp_path / "study")
    with pytest.raises(ConfigError, match="wanted vqa, one of its splits test, train, and a figure"):
        run_study(replace(both, measures=["vqa.artist.accuracy"]), scenes, tmp_path / "other")


@pytest.mark.extended
@pytest.mark.slow
def test_the_study_of_the_papers_claim_runs_from_start_to_page(scenes, tmp_path) -> None:
    paper = read_study(Path(__file__).parents[3] / "studies/paper.toml")
    few = {"batch_size": 8, "warmup_steps": 0, "device": "cpu", "eval_every_steps": 0}
    stage = paper.then["retrieval"] | few | {"data": str(scenes), "max_steps": 1}
    settings = study().settings | few
    short = replace(paper, seeds=[0], budget={"steps": 2}, rerank=2, settings=settings, then={"retrieval": stage})
    assert run_study(short, scenes, tmp_path) is not None
    found = rows(tmp_path)
    steps = {arm: int(found[arm, "itm.r1"]["steps"]) for arm in paper.arms}
    assert steps["ITC + ITM, FLOPs of all four"] > steps["ITC + ITM + MLM + MIM"] == 2
    assert all((arm, "retrieval.test.mean_r1") in found for arm in paper.arms)
