"""A run's report: one HTML file with its images inside, readable offline."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from mvlm.config.json_files import read_config
from mvlm.evaluation.evaluate import default_rerank, describe_repeats, figures_of
from mvlm.evaluation.retrieval import encode_split
from mvlm.evaluation.workspace import open_workspace
from mvlm.inference.trained_model import hash_of
from mvlm.report import examples, figures
from mvlm.report.comparison import flat_settings, metrics_of
from mvlm.report.html import write_page
from mvlm.report.task_examples import MOST_WORDS, SHOWN, confusion, judged, majority, task_examples
from mvlm.runs.checkpoint import read_state
from mvlm.runs.folder import RunFolder, check_run_folder, find_checkpoint
from mvlm.runs.history import starts_of
from mvlm.runs.load import load_without_head, open_named_data
from mvlm.tasks import task_names
from mvlm.tasks.load import find_task, load_task
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
    check_run_folder(run)
    folder = RunFolder(run)
    config = read_config(folder.config)
    of_task = config.get("task", "retrieval") != "retrieval"
    split, sections = (_of_task if of_task else _of_retrieval)(folder, config, data)
    rows = metrics_of(folder)
    window = max(1, len(rows) // 60)
    parts, places = figures.parts(starts_of(folder.history), config)
    return write_page(
        out or folder.report,
        "task.html" if of_task else "retrieval.html",
        within=run if out is None else None,
        title=run.resolve().name,
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        window=window,
        charts=figures.curves(rows, window, of_task, places),
        parts=parts,
        settings=[(name, json.dumps(value)) for name, value in flat_settings(config).items()],
        attribution=attribution(split.description),
        **sections,
    )


def _of_retrieval(folder: RunFolder, config: dict[str, Any], data: Path | None) -> tuple[Dataset, dict[str, Any]]:
    """Split that the report's examples come from, and values for the template's sections on retrieval and masks.

    data: folder of that split; None for the one that the evaluation or the run names.
    """
    with figures_of(folder.evaluation, folder.evaluation_command(data or config["data"])) as found:
        tables = {
            "recalls": figures.recalls(found),
            "objectives": figures.objectives(found),
            "notes": [
                *figures.unseen_note(found),
                *describe_repeats(found),
                *figures.forgetting(config, metrics_of(folder)),
            ],
            "split": found["split"],
            "checkpoint": found["checkpoint"],
        }
    trained = load_without_head(folder.path)
    model, tokenizer = trained.network, trained.tokenizer
    split = _split_of(folder.evaluation, found, config, data)
    shards = data or split.folder
    train = open_dataset(shards, "train") if "train" in split.splits else None
    with open_workspace(None, {}) as workspace:  # features of a large split have no room in memory
        features = encode_split(model, split, tokenizer, workspace=workspace)
        points, explained = examples.embedding_map(split, features)
        of_features = {
            "groups": examples.retrievals(model, split, train, features, default_rerank(model), workspace),
            "neighbours": examples.neighbours(split, features),
            "embedding_map": points,
            "explained": explained,
            "confusions": examples.confusions(split, features),
        }
    return split, {
        **tables,
        "zero_shot": "task" not in config,
        "stale": found.get("model", trained.sha256) != trained.sha256,  # those of an earlier version name no model
        "reconstructions": examples.reconstructions(model, tokenizer, split),
        "filled_captions": examples.filled_captions(model, tokenizer, split),
        "word_maps": examples.word_maps(trained, split) if model.matching_is_trained else None,
        **of_features,
    }


def _of_task(folder: RunFolder, config: dict[str, Any], data: Path | None) -> tuple[Dataset, dict[str, Any]]:
    """Split that the report's examples come from, and values for the template's sections on a downstream task.

    data: folder of that split; None for the one that the evaluation or the run names.
    """
    name = (read_state(find_checkpoint(folder.path)).get("task") or {}).get("name", config["task"])
    file = folder.evaluation
    command = folder.evaluation_command(data or config["data"], config["task"])
    found = figures.read_evaluation(file, name, command)
    evaluations = {file.stem: found, **figures.other_evaluations(file, name)}
    own = name not in task_names()
    given = {option: found[option] for option in figures.OPTIONS if option in found}
    split = _split_of(file, found, config, data)
    sections: dict[str, Any] = {
        "task": name,
        "split": found["split"],
        "checkpoint": found.get("checkpoint", folder.path),
        "options": f"Evaluated with {', '.join(f'{k} {json.dumps(v)}' for k, v in given.items())}." if given else "",
        "figures": figures.figures_table(evaluations),
        "stale": [],
        "types": figures.types_tables(evaluations),
        "most_words": MOST_WORDS,
        "shown": SHOWN,
        "verdicts": None,
        "without_baseline": own and "majority" not in found,
        # Figures of an earlier version do not say it.
        "over": found.get("bootstrapped_over") or ("" if own else find_task(name).bootstrapped_over),
    }
    if own:  # code of a task of the user's own is not run here
        return split, sections
    task, tokenizer = load_task(folder.path, "cpu", **given)
    now = hash_of(task.config, tokenizer, task)
    # Figures of an earlier version name no model.
    sections["stale"] = [stem for stem, one in evaluations.items() if one.get("model", now) != now]
    verdicts = judged(task, file, found, split)
    if verdicts:
        sections |= {
            "verdicts": verdicts,
            "blind": task.options.blind,
            "majority": None if "majority" in found else majority(type(task), verdicts, found["records"], split),
            "confusion": confusion(verdicts, task.state.get("labels")),
            "groups": [(right, task_examples(task, verdicts, right, split)) for right in (True, False)],
        }
    return split, sections


def _split_of(file: Path, figures: dict[str, Any], config: dict[str, Any], data: Path | None) -> Dataset:
    """Open the split that an evaluation was made on.

    Args:
        file: file of the evaluation, for errors.
        figures: content of that file.
        config: settings of the run, which name a data folder if the evaluation does not.
        data: folder to take in place of the one that is named.
    """
    if data is not None:
        return open_dataset(data, figures["split"])
    return open_named_data(file, figures.get("data", config["data"]), figures["split"], figures.get("fingerprint"))


def attribution(description: dict[str, Any]) -> list[str]:
    """Source, licence and attribution of the data, as far as dataset.json states them."""
    return [f"{name}: {description[name]}" for name in ("source", "licence", "attribution") if description.get(name)]
