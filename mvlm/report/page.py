"""A run's report: one HTML file with its images inside, readable offline."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config
from mvlm.errors import RunError
from mvlm.evaluation.evaluate import default_rerank
from mvlm.evaluation.retrieval import encode_split
from mvlm.evaluation.workspace import open_workspace
from mvlm.files import check_folder
from mvlm.inference.trained_model import hash_of
from mvlm.report import embedding_space, examples
from mvlm.report.attention import pointing_game, word_maps
from mvlm.report.comparison import metrics_of
from mvlm.report.figures import curves, objectives, recalls, unseen_note
from mvlm.report.html import figures_of, write_page
from mvlm.report.task_examples import MOST_WORDS, SHOWN, task_examples
from mvlm.report.task_figures import (
    OPTIONS,
    confusion_table,
    figures_table,
    judged,
    options_note,
    other_evaluations,
    read_evaluation,
    task_curves,
    types_tables,
)
from mvlm.report.verdicts import confusion, majority
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import RunFolder, find_checkpoint
from mvlm.runs.load import load_model
from mvlm.tasks import task_names
from mvlm.tasks.registry import load_task
from mvlm.tasks.task import Task
from mvlm_dataloading import Dataset, open_dataset


def write_report(run: Path, data: Path | None = None, out: Path | None = None) -> Path:
    """Write the report of a run that has a checkpoint and an evaluation. Returns the file.

    A fine-tuned run has the figures of its task, with right and wrong examples; a pretraining run, or one that was
    fine-tuned for retrieval, has retrieval and reconstructions. The report of a task of the user's own has no examples.

    Args:
        run: The run folder.
        data: Folder of shards for the examples. Default: the one that the run was evaluated on.
        out: File to write. Default: `report.html` in the run folder.

    Raises:
        RunError: the folder is not a run, or has no checkpoint, evaluation or metrics; or the data are not those of the
            evaluation.
    """
    check_folder(run, "a run folder")
    folder = RunFolder(run)
    config = read_config(folder.config)
    of_task = config.get("task", "retrieval") != "retrieval"
    sections = (_of_task if of_task else _of_retrieval)(folder, config, data)
    rows = metrics_of(folder)
    window = max(1, len(rows) // 60)
    split: Dataset = sections.pop("dataset")
    return write_page(
        out or folder.report,
        "task.html" if of_task else "retrieval.html",
        title=run.resolve().name,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        window=window,
        charts=(task_curves if of_task else curves)(rows, window),
        settings=settings(config),
        attribution=attribution(split.description),
        **sections,
    )


def _of_retrieval(folder: RunFolder, config: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """Values of the sections on retrieval, masked inputs and embeddings; and the `dataset` of the examples."""
    if not folder.evaluation.is_file():
        raise RunError(
            f"{folder.evaluation}: wanted the run's evaluation, found none; first run `mvlm eval retrieval "
            f"--checkpoint {folder.path} --data {data or config['data']} --out {folder.evaluation}`"
        )
    trained = load_model(folder.path)
    model, tokenizer = trained.network, trained.tokenizer
    with figures_of(folder.evaluation) as figures:
        tables = {"recalls": recalls(figures), "objectives": objectives(figures), "unseen_note": unseen_note(figures)}
        source = {"split": figures["split"], "checkpoint": figures["checkpoint"]}
        stale = figures.get("model", trained.sha256) != trained.sha256  # those of an earlier version name no model
    shards = data or Path(str(figures.get("data", config["data"])))
    split = open_dataset(shards, source["split"])
    train = open_dataset(shards, "train") if "train" in split.splits else None
    with open_workspace(None, {}) as workspace:  # features of a large split have no room in memory
        features = encode_split(model, split, tokenizer, workspace=workspace)
        of_features = {
            "retrievals": examples.retrievals(model, split, train, features, default_rerank(model), workspace),
            "neighbours": embedding_space.neighbours(split, features),
            "embedding_map": embedding_space.embedding_map(split, features),
            "confusions": embedding_space.confusions(split, features),
        }
    return {
        **source,
        **tables,
        "zero_shot": "task" not in config,
        "stale": stale,
        "reconstructions": examples.reconstructions(model, tokenizer, split),
        "filled_captions": examples.filled_captions(model, tokenizer, split),
        "word_maps": word_maps(trained, split) if model.matching_is_trained else None,
        "pointing_game": pointing_game(folder.grounding, trained.sha256),
        "grounding": folder.grounding,
        **of_features,
        "dataset": split,
    }


def _of_task(folder: RunFolder, config: dict[str, Any], data: Path | None) -> dict[str, Any]:
    """Values of the sections on a task's figures and examples; and the `dataset` of the examples."""
    name = (read_state(find_checkpoint(folder.path)).get("task") or {}).get("name", config["task"])
    file = folder.evaluation
    command = f"mvlm eval {config['task']} --checkpoint {folder.path} --data {data or config['data']} --out {file}"
    figures = read_evaluation(file, name, command)
    evaluations = {file.stem: figures, **other_evaluations(file, name)}
    split = open_dataset(data or Path(str(figures.get("data", config["data"]))), figures["split"])
    task, now = None, ""  # code of a task of the user's own is not run here
    if name in task_names():
        task, tokenizer = load_task(folder.path, "cpu", **{key: figures[key] for key in OPTIONS if key in figures})
        now = hash_of(task.config, tokenizer, task)
    return {
        "task": name,
        "split": figures["split"],
        "checkpoint": figures.get("checkpoint", folder.path),
        "options": options_note(figures),
        "figures": figures_table(evaluations),
        # Figures of an earlier version name no model.
        "stale": [stem for stem, found in evaluations.items() if task and found.get("model", now) != now],
        "types": types_tables(evaluations),
        "most_words": MOST_WORDS,
        "shown": SHOWN,
        **(_samples(task, file, figures, split) if task and task.has_examples else {"verdicts": None}),
        "dataset": split,
    }


def _samples(task: Task, file: Path, figures: dict[str, Any], split: Dataset) -> dict[str, Any]:
    """Parts of the page that are about samples: examples, confusion and the majority's figure."""
    verdicts = judged(task, file, figures, split)
    counts = confusion(verdicts, task.state.get("labels"))
    return {
        "verdicts": verdicts,
        "blind": task.options.blind,
        "majority": None if "majority" in figures else majority(type(task), figures["records"], split),
        "confusion": confusion_table(counts) if counts else None,
        "groups": [(right, task_examples(task, verdicts, right, split)) for right in (True, False)],
    }


def settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and JSON value of every setting of the run and its model."""
    flat = {name: value for name, value in config.items() if name != "model"}
    flat |= {f"model.{name}": value for name, value in config["model"].items()}
    return [(name, json.dumps(value)) for name, value in flat.items()]


def attribution(description: dict[str, Any]) -> list[str]:
    """Source, licence and attribution of the data, as far as dataset.json states them."""
    return [f"{name}: {description[name]}" for name in ("source", "licence", "attribution") if description.get(name)]
