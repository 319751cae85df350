"""Predictions of fine-tuned models for images and texts of no data set."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
from PIL import Image

import mvlm
from mvlm import ConfigError, RunError
from mvlm.evaluation.workspace import Workspace
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm.tasks.finetune import finetune
from mvlm_dataloading import open_dataset
from support.questions import WRITERS, finetune_config

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "classifier": ("vqa", {"answers": "classifier"}),
    "masked": ("vqa", {"answers": "masked", "question_length": 24}),
    "entailment": ("entailment", {}),
    "pairs": ("pairs", {}),
    "caption": ("caption", {}),
}
OWN = """
from mvlm.tasks.entailment import Entailment
class Weather(Entailment):
    name = "weather"
"""


@pytest.fixture(scope="session")
def asked(made_once) -> Path:
    """A folder with the data set of each task."""

    def write(folder: Path) -> None:
        for name, writer in WRITERS.items():
            writer(folder / name)

    return made_once("asked", write)


@pytest.fixture(scope="session")
def tuned(made_once, trained, asked) -> Path:
    """A folder with a fine-tuned run of each form of a task."""

    def tune(folder: Path) -> None:
        for form, (task, settings) in FORMS.items():
            finetune(finetune_config(trained, asked / task, folder / form, task, **settings))

    return made_once("tuned", tune)


def image_files(folder: Path, data: Path, count: int) -> list[Path]:
    """The first test images of a data set, as files."""
    dataset = open_dataset(data, "test")
    folder.mkdir()
    files = [folder / f"{i:03d}.png" for i in range(count)]
    for i, file in enumerate(files):
        file.write_bytes(dataset.image_bytes(i))
    return files


def halves(folder: Path, data: Path) -> list[list[Path]]:
    """The two images of each test strip of a data set of pairs, as files."""
    dataset, found = open_dataset(data, "test"), []
    folder.mkdir()
    for i in range(len(dataset)):
        strip = Image.open(io.BytesIO(dataset.image_bytes(i)))
        side = strip.height
        found.append([folder / f"{i:03d}-{k}.png" for k in range(2)])
        for k, file in enumerate(found[-1]):
            strip.crop((k * side, 0, (k + 1) * side, side)).save(file)
    return found


def spread_answers(task: Any, dataset: Any) -> None:
    """Take the mean logits from the bias of the head, so that samples differ in their likeliest answer."""
    found = []
    hook = task.head.register_forward_hook(lambda module, inputs, output: found.append(output))
    task.evaluate(dataset, "fp32", IMPLEMENTATIONS["fast"], Workspace())
    hook.remove()
    task.head.answers.bias -= torch.cat(found).mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_files_get_the_predictions_of_their_data_set(tuned, asked, tmp_path, form):
    """In batches that a split's are not, and with equal images encoded once or not."""
    name = FORMS[form][0]
    dataset, model = open_dataset(asked / name, "test"), mvlm.load_model(tuned / form, "cpu", "fp32")
    task: Any = model.task
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        if form not in ("masked", "caption"):
            spread_answers(task, dataset)
    _, records = task.evaluate(dataset, "fp32", IMPLEMENTATIONS["fast"], Workspace())
    wanted = [{key: value for key, value in record.items() if key != "sample"} for record in records]
    assert len({str(record) for record in wanted}) > 1 or form == "masked"
    folder = tmp_path / "images"
    files: Any = halves(folder, asked / name) if name == "pairs" else image_files(folder, asked / name, len(dataset))
    texts = None if name == "caption" else [dataset.captions(i)[0] for i in range(len(dataset))]
    assert model.predict(files, texts, batch_size=5) == wanted
    if texts is not None:
        again = model.predict(files[0], texts, batch_size=3)
        assert again == [model.predict(files[0], text)[0] for text in texts]
        assert again[0] == wanted[0]


@pytest.mark.slow
def test_methods_of_a_task_are_those_of_its_models_alone(tuned, trained, tmp_path, asked):
    file = image_files(tmp_path / "images", asked / "caption", 1)[0]
    answering = mvlm.load_model(tuned / "classifier", "cpu")
    task: Any = answering.task
    assert answering.answer(file, "colour? " * 500) in task.state["answers"]  # cut, as in an evaluation
    assert mvlm.load_model(tuned / "entailment", "cpu").entails(file, "rain") in (
        "contradiction", "neutral", "entailment",
    )  # fmt: skip
    assert isinstance(mvlm.load_model(tuned / "caption", "cpu").caption(file), str)
    pretrained = mvlm.load_model(trained, "cpu")
    for model, method, words in (
        (answering, "caption", ()), (answering, "entails", ("rain",)), (pretrained, "answer", ("why?",)),
        (pretrained, "predict", ("why?",)),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"^{method}: .*mvlm finetune"):
            getattr(model, method)(file, *words)
    with pytest.raises(ConfigError, match=r"^texts:"):
        answering.predict(file)
    with pytest.raises(ConfigError, match=r"^texts:"):
        answering.predict([file, file], ["one"])
    with pytest.raises(RunError, match="2 images"):
        mvlm.load_model(tuned / "pairs", "cpu").predict([file] * 3, "rain")
    assert answering.match(file, "a red square").probability.shape == (1,)  # the network answers as before


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
def test_the_command_writes_a_row_for_each_question(tuned, asked, tmp_path, run_mvlm, ending):
    """Questions come from files, a folder with a broken image, and a table with images relative to it."""
    files = image_files(tmp_path / "images", asked / "vqa", 3)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    table = tmp_path / "table.csv"
    table.write_text("picture,words\nimages/001.png,what is behind it?\n")
    out = tmp_path / f"found.{ending}"
    columns = ("--image-column", "picture", "--text-column", "words")
    done = run_mvlm(
        "predict", tuned / "classifier", tmp_path / "images", table, *columns, "--text", "what colour is the square?",
        "--out", out, "--device", "cpu",
    )  # fmt: skip
    assert done.code == 0, done
    if ending == "parquet":
        rows = pyarrow.parquet.read_table(out).to_pylist()
    elif ending == "json":
        rows = json.loads(out.read_text())
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    # The table's row comes first, where it stands behind the folder too: files are paired when all are known.
    assert [Path(row["image"]).name for row in rows] == ["001.png", "000.png", "001.png", "002.png", "broken.png"]
    assert [bool(row.get("error")) for row in rows] == [False] * 4 + [True]
    model = mvlm.load_model(tuned / "classifier", "cpu")
    assert rows[0]["answer"] == model.predict(files[1], "what is behind it?")[0]["answer"]
    assert rows[3]["answer"] == model.predict(files[2], rows[3]["text"])[0]["answer"]


@pytest.mark.slow
def test_a_task_of_the_users_own_names_its_file(trained, asked, tmp_path, run_mvlm):
    own = tmp_path / "weather.py"
    own.write_text(OWN)
    assert run_mvlm(
        "finetune", own, "--checkpoint", trained, "--data", asked / "entailment", "--out", tmp_path / "run",
        "--max-steps", 1, "--batch-size", 8, "--device", "cpu", "--warmup-steps", 1,
    ).code == 0  # fmt: skip
    file = image_files(tmp_path / "images", asked / "entailment", 1)[0]
    words = ("predict", tmp_path / "run", file, "--text", "it rains", "--device", "cpu")
    assert run_mvlm(*words).code == 2
    assert run_mvlm("predict", tmp_path / "run", own, *words[3:], "--task", own).code == 2  # no image
    done = run_mvlm(*words, "--task", own)
    assert done.code == 0
    assert done.out[-1].split("\t")[-1] in ("contradiction", "neutral", "entailment")
