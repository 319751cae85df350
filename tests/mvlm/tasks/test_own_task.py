"""A task of the user's own in one file of under 100 lines: trained, evaluated, resumed; and files that are none."""

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

import mvlm.tasks
from mvlm.config.finetune import TaskOptions
from mvlm.errors import ConfigError, RunError
from mvlm.report.page import write_report
from mvlm.runs.folder import find_checkpoint
from mvlm.tasks import task_names
from mvlm.tasks.finetune import finetune
from mvlm.tasks.load import find_task, load_task
from mvlm.tasks.task import LabelTask
from mvlm_dataloading import Dataset, ShardWriter, open_dataset
from support.commands import assert_refused
from support.questions import finetune_config as configured
from support.scenes import png, scene

EXAMPLE = Path(__file__).parents[3] / "examples/counting_task.py"


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> Path:
    """Scenes with a count that follows from the colour."""
    folder = tmp_path_factory.mktemp("counts") / "data"
    with ShardWriter(folder, name="counts", source="", licence="", attribution="", recipe={}) as writer:
        for split in ("train", "test"):
            for i in range(16):
                writer.add(f"{split}{i:02}", png(scene(i)[0]), ["how many?"], {"count": i % 4}, split=split)
    return folder


@pytest.fixture
def in_the_folder(tmp_path, monkeypatch) -> Iterator[Callable[[], Callable[[list[str]], Callable[[], object]]]]:
    """Gives the folder of tasks a second place with the file of the task. Returns what finds `mvlm WORDS` there."""

    def begin() -> Callable[[list[str]], Callable[[], object]]:
        (tmp_path / "tasks").mkdir()
        (tmp_path / "tasks/counting.py").write_text(EXAMPLE.read_text())
        monkeypatch.setattr(mvlm.tasks, "__path__", [*mvlm.tasks.__path__, str(tmp_path / "tasks")])
        monkeypatch.delitem(sys.modules, "mvlm.cli")  # it makes its table of commands when it is imported
        task_names.cache_clear()
        return importlib.import_module("mvlm.cli").find_command

    yield begin
    sys.modules.pop("mvlm.tasks.counting", None)
    task_names.cache_clear()


@pytest.mark.slow
def test_the_example_is_trained_and_evaluated_by_its_file_and_by_its_name(
    trained, counts, tmp_path, run_mvlm, in_the_folder, capsys
):
    """One file in the folder of tasks is all that a new task needs: help, `eval` and the report know its name."""
    assert len(EXAMPLE.read_text().splitlines()) < 100
    run = tmp_path / "run"
    words = ["--checkpoint", trained, "--data", counts, "--out", run, "--max-steps", 2]
    settings = ["--batch-size", 8, "--device", "cpu", "--warmup-steps", 1]
    done = run_mvlm("finetune", EXAMPLE, *words, *settings)
    assert done.code == 0, done.err
    assert run_mvlm("finetune", EXAMPLE, *words, *settings, "--resume").code == 0
    options = ["--checkpoint", run, "--data", counts, "--device", "cpu"]
    found = run_mvlm("eval", EXAMPLE, *options, "--out", run / "eval/test.json")
    assert found.code == 0, found.err
    by_file = json.loads((run / "eval/test.json").read_text())
    # The page is written without the code, from the figures.
    page = write_report(run).read_text()
    assert "bootstrapped over images." in page
    assert "baseline: always the majority" in page
    assert "No baseline" not in page
    less = {name: x for name, x in by_file.items() if name not in ("majority", "bootstrapped_over")}
    (run / "eval/test.json").write_text(json.dumps(less))
    page = write_report(run).read_text()
    assert "bootstrapped over images" not in page
    assert "No baseline" in page
    # A checkpoint names no code to run: its task has to be named, and be the right one.
    other = run_mvlm("eval", "entailment", *options)
    assert other.code == 2
    assert "counting" in other.err[-1]
    written = ["--out", run / "eval/test.json", "--predictions", run / "predictions"]
    find_command = in_the_folder()
    for command in (["eval", "--help"], ["eval", "counting", *options, *written], ["report", run]):
        find_command([str(word) for word in command])()
    assert "  mvlm eval counting " in capsys.readouterr().out
    by_name = json.loads((run / "eval/test.json").read_text())
    assert (by_file["task"], by_file["records"]) == ("counting", by_name["records"])
    assert len(by_name["records"]) == 16
    lines = [json.loads(line) for line in (run / "predictions").read_text().splitlines()]
    assert lines == [{"id": r["sample"], "count": r["count"]} for r in by_name["records"]]
    assert "accuracy" in (run / "report.html").read_text()


@pytest.mark.slow
def test_options_of_predictions_become_flags_of_its_evaluation(trained, counts, tmp_path, run_mvlm):
    """Ones that its file states, in the types and ranges of `TaskOptions`."""
    stated = '    prediction_options: ClassVar = {"lengths": "Number of guesses.", "choose_by": "Judge."}\n'
    guess = "round(number) + self.options.lengths"
    file = tmp_path / "own.py"
    text = EXAMPLE.read_text().replace('    main = "accuracy"\n', '    main = "accuracy"\n' + stated)
    file.write_text(text.replace("import Any", "import Any, ClassVar").replace("round(number)}", f"{guess}}}"))
    finetune(configured(trained, counts, tmp_path / "run", str(file), lengths=3))
    assert any("Number of guesses. Default: the run's." in line for line in run_mvlm("eval", file, "--help").out)
    words = "eval", file, "--checkpoint", tmp_path / "run", "--data", counts, "--device", "cpu"
    sums = []
    for flags in ((), ("--lengths", 5)):
        assert run_mvlm(*words, "--out", tmp_path / "out.json", *flags).code == 0
        records = json.loads((tmp_path / "out.json").read_text())["records"]
        sums.append(sum(record["count"] for record in records))
    assert sums[1] - sums[0] == 2 * len(records)
    for flags in (("--lengths", 0), ("--lengths", "many"), ("--choose-by", "nobody"), ("--iterations", 2)):
        assert_refused(run_mvlm(*words, *flags), flags[0].strip("-"))
    file.write_text(text.replace('"Judge."', "about()"))
    assert_refused(run_mvlm(*words), "prediction_options as a dict of literals")


def test_the_example_bootstraps_over_images_and_has_a_baseline(tmp_path):
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(18):
            metadata = {"count": i // 9, "image_id": i // 9} if i < 16 else {"count": 2}
            writer.add(f"{i:02}", png(scene(i)[0]), ["how many?"], metadata, split="test")
    dataset = open_dataset(tmp_path / "d", "test")
    found = find_task(str(EXAMPLE)).score([{"sample": i, "count": 0} for i in range(18)], dataset)
    assert found["accuracy"] == found["majority"] == 50
    # Of 4 images one is right. Each is drawn whole, so with a chance of 0.3 it is never drawn.
    assert found["accuracy_95"][0] == 0
    assert found["accuracy_95"][1] > 90


@pytest.mark.slow
def test_a_head_with_buffers_and_tied_weights_is_averaged_and_loaded(trained, counts, tmp_path):
    """Only parameters are averaged, each by one name. All else is that of the model after the last step."""
    linear = "nn.Linear(3 * model.config.width, 1)"
    head = f"nn.Sequential(nn.BatchNorm1d(3 * model.config.width), {linear})\n        self.again = self.head[1]"
    file = tmp_path / "own.py"
    file.write_text(EXAMPLE.read_text().replace(linear, head))
    finetune(configured(trained, counts, tmp_path / "run", str(file), ema_decay=0.5, max_steps=3))
    found = load_task(tmp_path / "run", kind=find_task(str(file)))[0].state_dict()
    tensors = {}
    for part in ("model", "ema"):
        for tensor_file in (find_checkpoint(tmp_path / "run") / part).glob("*.safetensors"):
            tensors |= load_file(tensor_file)  # the averages replace the weights
    assert found["head.0.num_batches_tracked"] == 3
    assert torch.equal(found["again.weight"], tensors["head.1.weight"])
    assert not torch.equal(found["again.weight"], tensors["again.weight"])  # of the model, and not averaged
    for name in ("head.0.running_mean", "head.0.running_var", "head.1.weight", "model.text_encoder.position"):
        assert torch.equal(found[name], tensors[name]), name


@pytest.mark.slow
def test_a_resume_knows_the_task_by_its_file_and_not_by_its_path(trained, counts, tmp_path, monkeypatch, caplog):
    (tmp_path / "own.py").write_text(EXAMPLE.read_text())
    monkeypatch.chdir(tmp_path)
    finetune(configured(trained, counts, tmp_path / "run", "own.py"))
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["task_file"] == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()

    def warned_by_a_resume() -> bool:
        caplog.clear()
        finetune(configured(trained, counts, tmp_path / "run", str(tmp_path / "own.py"), resume=True))
        return "own.py: changed" in caplog.text

    assert not warned_by_a_resume()
    (tmp_path / "own.py").write_text(EXAMPLE.read_text().replace("smooth_l1_loss", "mse_loss"))
    assert warned_by_a_resume()
    (tmp_path / "own.py").write_text(EXAMPLE.read_text().replace('"counting"', '"adding"'))
    with pytest.raises(RunError, match="wanted the task, options and answers of this run, found others"):
        warned_by_a_resume()
    for other in ("retrieval", str(EXAMPLE)):
        with pytest.raises(RunError, match=rf"task: config.json has own.py, this command {other}"):
            finetune(configured(trained, counts, tmp_path / "run", other, resume=True))


def test_files_are_found_by_their_names_and_those_without_one_task_refused(tmp_path, run_mvlm):
    assert task_names() == ("caption", "entailment", "pairs", "retrieval", "vqa")
    assert [find_task(name).name for name in task_names()] == list(task_names())
    # A dataclass looks its annotations up in the module that defines it.
    late = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    record = "@dataclass\nclass Row:\n    a: int = 0\n"
    (tmp_path / "own.py").write_text(late + EXAMPLE.read_text() + record)
    assert find_task(str(tmp_path / "own.py")).name == "counting"
    (tmp_path / "none.py").write_text("from mvlm.tasks.task import Task\n")
    with pytest.raises(ConfigError, match="found 0"):
        find_task(str(tmp_path / "none.py"))
    assert_refused(run_mvlm("eval", "x.py", "--checkpoint", "a", "--data", "b"), "wanted a Python file with a task")


def test_a_task_of_labels_learns_from_a_view_that_repeats_samples():
    """A weighted training view has a sample more than once; an evaluated split has it once."""
    asked = []

    class Colours(LabelTask):
        labels = ("red", "blue")

        @classmethod
        def labelled(cls, dataset: Dataset, images: int | None = None, repeated: bool = False) -> list[dict[str, Any]]:
            asked.append((dataset, repeated))
            return []

    assert Colours.make_state(cast(Any, "train"), TaskOptions()) == {"labels": ["red", "blue"]}
    Colours.check_references(cast(Any, "validation"), {})
    assert asked == [("train", True), ("validation", False)]
