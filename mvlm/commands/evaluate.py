"""`mvlm eval` and `mvlm score`: a model, a fine-tuned run, or predictions, evaluated."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from mvlm.config.finetune import TaskOptions
from mvlm.tasks import stated
from mvlm.terminal import say

if TYPE_CHECKING:
    from mvlm.inference.trained_model import TrainedModel
    from mvlm_dataloading import Dataset

# Commands import what they need when they run, so that --help and errors are immediate.


def eval_retrieval(
    *,
    checkpoint: Path,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    rerank: int | None = None,
    image_size: int | None = None,
    text_length: int | None = None,
    device: str = "auto",
) -> None:
    """Measure a model's retrieval, by ITC and re-ranked by ITM, and its cross-modal gain.

    With data that have a split of edited images, such as those of `mvlm data scenes --tasks placed`, two-way choices
    say if it reads: a hidden word with its own image or an edited one, and a hidden cell with its own caption.

    The same command again continues after a kill. `torchrun ... -m mvlm eval retrieval` shares the work among ranks;
    the figures are the same.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        data: Folder of shards. A train split, if present, is used for the median-image baseline and to find images of
            unseen concepts.
        split: Split to evaluate on.
        out: JSON file for the figures. Until they are there, the folder OUT.parts beside it holds the work, on a disk
            that all ranks see. Default: print them only; one rank, which begins anew after a kill.
        rerank: Candidates of each query for ITM to re-rank; 0 ranks by ITC alone. Default: 32, or 0 for a model
            that was trained without ITM.
        image_size: Side of images in pixels; position embeddings are resized. Default: as trained.
        text_length: Longest text in tokens, at most the trained one. Default: as trained.
        device: auto, cpu or cuda.
    """
    from mvlm.commands.arguments import check_result_file
    from mvlm.device import chosen_precision
    from mvlm.distributed.coordination import check_same, joined_ranks, run_on_all_ranks
    from mvlm.errors import ConfigError
    from mvlm.evaluation.evaluate import default_rerank, format_table
    from mvlm.evaluation.two_way import edits_of
    from mvlm.evaluation.workspace import SAME_WORK, open_workspace
    from mvlm.machine import describe_machine, package_versions
    from mvlm.runs.load import load_without_head
    from mvlm_dataloading import open_dataset
    from mvlm_dataloading.files import write_json

    if rerank is not None and rerank < 0:
        raise ConfigError(f"rerank: wanted at least 0, got {rerank}")
    with joined_ranks(device) as world:

        def prepare() -> "tuple[TrainedModel, Dataset, Dataset | None, Dataset | None]":
            check_result_file(out, world.size)
            model = load_without_head(checkpoint, world.device, image_size=image_size, text_length=text_length)
            dataset = open_dataset(data, split)
            train = open_dataset(data, "train") if "train" in dataset.splits else None
            return model, dataset, train, edits_of(dataset)

        model, dataset, train, edits = run_on_all_ranks(world, prepare)
        precision = chosen_precision(world.device)
        spec = {
            "model": model.sha256,  # of the sizes that it is evaluated at, too
            "data": [None if each is None else each.fingerprint for each in (dataset, train, edits)],
            "device": world.device.type,
            "precision": precision,
            "rerank": rerank,
        }
        check_same(world, {"out": str(out), **spec}, SAME_WORK)
        rerank = default_rerank(model.network) if rerank is None else rerank
        with open_workspace(None if out is None else out.with_name(f"{out.name}.parts"), spec, world) as workspace:
            figures = {
                **{"checkpoint": str(checkpoint), "data": str(data), "split": split},
                **model.evaluate(dataset, train, rerank, workspace, edits).figures,
                "model": model.sha256,
                "fingerprint": dataset.fingerprint,
                "rerank": rerank,
                "precision": precision,
                "machine": describe_machine(world.device, world.size),
                "versions": package_versions(),
            }
            if world.first:
                if out is not None:
                    write_json(out, figures)
                say(format_table(figures))


def eval_classes(
    *,
    checkpoint: Path,
    classes: Path,
    templates: Path | None = None,
    out: Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
) -> None:
    """Classify images of classes without training: the nearest text wins.

    The same command again continues after a kill. `torchrun ... -m mvlm eval classes` shares the work among ranks; the
    figures are the same.

    Args:
        checkpoint: Run folder, one of its checkpoints, or exported folder.
        classes: Folder or uncompressed tar with a folder of images for each class, as ImageNet's `val`. A file beside
            the folders or above them names the classes, such as classnames.txt or LOC_synset_mapping.txt; else the
            folders do.
        templates: File with a text a line, with {} for the name of a class. Default: the name alone.
        out: JSON file for the figures. Until they are there, the folder OUT.parts beside it holds the work, on a disk
            that all ranks see. Default: print them only; one rank, which begins anew after a kill.
        image_size: Side of images in pixels; position embeddings are resized. Default: as trained.
        device: auto, cpu or cuda.
    """
    from mvlm.commands.arguments import check_no_input, check_result_file
    from mvlm.device import chosen_precision
    from mvlm.distributed.coordination import check_same, joined_ranks, run_on_all_ranks
    from mvlm.evaluation.class_images import ClassImages, open_classes
    from mvlm.evaluation.classification import classify_images, describe_classification
    from mvlm.evaluation.workspace import SAME_WORK, open_workspace
    from mvlm.machine import describe_machine, package_versions
    from mvlm.runs.load import load_without_head
    from mvlm_dataloading.files import write_json

    with joined_ranks(device) as world:

        def prepare() -> "tuple[TrainedModel, ClassImages]":
            check_result_file(out, world.size)
            check_no_input(out, templates)
            images = open_classes(classes, templates)
            return load_without_head(checkpoint, world.device, image_size=image_size), images

        model, images = run_on_all_ranks(world, prepare)
        precision = chosen_precision(world.device)
        spec = {"model": model.sha256, "classes": images.fingerprint, "device": world.device.type}
        spec["precision"] = precision
        check_same(world, {"out": str(out), **spec}, SAME_WORK)
        with open_workspace(None if out is None else out.with_name(f"{out.name}.parts"), spec, world) as workspace:
            figures = {
                **{"checkpoint": str(checkpoint), "classes": str(classes), "templates": images.templates},
                **classify_images(model.network, images, model.tokenizer, precision, workspace),
                "model": model.sha256,
                "fingerprint": images.fingerprint,
                "precision": precision,
                "machine": describe_machine(world.device, world.size),
                "versions": package_versions(),
            }
            if world.first:
                if out is not None:
                    write_json(out, figures)
                say(describe_classification(figures))


def eval_task(task: str) -> Callable[..., None]:
    """Make the command `mvlm eval TASK`, with a flag for each of the task's options of prediction.

    task: name of the task, or path of its Python file.
    """
    options = stated(task, "prediction_options")

    def evaluate(
        *,
        checkpoint: Path,
        data: Path,
        split: str = "test",
        out: Path | None = None,
        predictions: Path | None = None,
        device: str = "auto",
        **changes: Any,
    ) -> None:
        from mvlm.commands.arguments import check_no_input, check_replaced, check_result_file, report_figures
        from mvlm.config.ranges import check_values
        from mvlm.distributed.coordination import joined_ranks, run_on_all_ranks
        from mvlm.tasks.evaluate import evaluate_task
        from mvlm.tasks.load import find_task
        from mvlm.tasks.score import are_predictions, write_predictions
        from mvlm_dataloading import open_dataset

        def check() -> None:
            check_result_file(out)  # before minutes are spent
            if predictions is not None:
                check_no_input(predictions, out, flag="predictions")
                check_replaced(
                    predictions, "earlier predictions", lambda old: are_predictions(task, old), "predictions"
                )
            check_values(TaskOptions(**given))

        given = {name: value for name, value in changes.items() if value is not None}
        with joined_ranks(device) as world:
            run_on_all_ranks(world, check)
            kind = run_on_all_ranks(world, lambda: find_task(task))
            figures, records = evaluate_task(checkpoint, data, split, world.device, world, kind, **given)
            if world.first:
                about = {"checkpoint": str(checkpoint), "data": str(data)}
                report_figures({**about, **figures, **given}, out, records=records)
                if predictions is not None:
                    dataset = open_dataset(data, split)
                    write_predictions(predictions, task, records, [dataset.metadata(i) for i in range(len(dataset))])

    types: dict[str, Any] = get_type_hints(TaskOptions)
    signature = inspect.signature(evaluate)
    *shown, further = signature.parameters.values()
    shown += [
        further.replace(name=name, kind=further.KEYWORD_ONLY, default=None, annotation=types[name] | None)
        for name in options
    ]
    evaluate.__signature__ = signature.replace(parameters=shown)  # pyright: ignore[reportFunctionMemberAccess]
    evaluate.__annotations__ = {p.name: p.annotation for p in shown}
    help_of_options = "".join(f"\n        {name}: {text} Default: the run's." for name, text in options.items())
    evaluate.__name__ = f"eval_{task}"
    evaluate.__doc__ = f"""Evaluate a run of `mvlm finetune {task}` on a data set.

    Args:
        checkpoint: Run folder of `mvlm finetune {task}`, or one of its checkpoints.
        data: Folder of shards.
        split: Split to evaluate on.
        out: JSON file for the figures and the predictions. Default: print the figures only.
        predictions: File for the predictions alone, in the format of the task's benchmark and of `mvlm score`.
        device: auto, cpu or cuda.{help_of_options}
    """
    return evaluate


def score(
    task: str, predictions: Path, references: Path, /, other: Path | None = None, out: Path | None = None
) -> None:
    """Score predictions of any model by a task's official metric.

    It needs no model and no torch.

    Args:
        task: vqa, pairs, entailment or caption.
        predictions: File of predictions: vqa and caption, the JSON list that the servers take; pairs, CSV rows
            `identifier,prediction`; entailment, JSON lines {pairID, label}.
        references: File of the data set: VQA annotations; NLVR2's, SNLI-VE's JSON lines; COCO caption annotations.
        other: Another model's predictions: adds the paired difference, its interval and McNemar's p-value.
        out: JSON file for the figures. Default: print them only.
    """
    from mvlm.commands.arguments import check_no_input, check_result_file, report_figures
    from mvlm.tasks.score import score

    check_no_input(out, predictions, references, other)
    check_result_file(out)
    report_figures(score(task, predictions, references, other), out)
