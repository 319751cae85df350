"""Recognition with a trained model: zero-shot by the texts of classes, linear probe and few-shot on its image features.

Zero-shot takes the contrastive embeddings; the probes take [CLS] of the image encoder. The baseline `untrained` is the
same architecture with random weights.

Shape legend: n images, K classes, C width, E contrastive width.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mvlm.device import chosen_precision
from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.errors import ConfigError
from mvlm.evaluation.retrieval import best_rank
from mvlm.evaluation.workspace import SAME_WORK, Workspace
from mvlm.inference.encode import BATCH, eval_loader, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.inference.zero_shot import label_embeddings
from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.metrics.classification import classification_figures
from mvlm.tasks.metrics.significance import grouped_bootstrap, mean_interval
from mvlm.tasks.recognition.classes import class_names, field_of, labels_of, read_templates
from mvlm.tasks.recognition.probe import Labelled, few_shot, probe
from mvlm_dataloading import DataError, Dataset
from mvlm_dataloading.dataset.dataset import image_name

log = logging.getLogger(__name__)

SHOTS = (1, 2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class RecognitionOptions:
    """Classes, texts and probes of an evaluation."""

    by: str | None = None
    """Field of the metadata with the class, or `concept`. Default: `label`, or the concept of the emoji sets."""
    classes: Path | None = None
    """File of class names, one a line. Default: the classes of the split."""
    templates: Path | None = None
    """File of templates, one a line, {} or {c} for the class. Default: the class name alone."""
    probe: bool = False
    """Linear probe, and few-shot, which need the splits train and validation."""
    shots: tuple[int, ...] = ()
    """Training images a class. Default: those of 1, 2, 4, 8, 16 that every class has."""
    seeds: int = 5
    """Draws of the training images, for each number of shots."""


class Features(NamedTuple):
    """Features of a split's images."""

    cls: Tensor
    """float32 (n, C), [CLS] of the image encoder."""
    embedding: Tensor
    """float32 (n, E), unit length."""


def features_of(model: TrainedModel, dataset: Dataset, stage: str, workspace: Workspace) -> Features:
    """Features of a split. The ranks of the workspace share the work."""
    network, tokenizer = model
    cls = workspace.array(f"{stage}.cls", (len(dataset), network.config.width), torch.float32)
    embedding = workspace.array(f"{stage}.embedding", (len(dataset), network.config.itc_width), torch.float32)

    def work(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(dataset.rows(start, stop), network, tokenizer):
            found = image_features(network, batch.images, model.precision)
            cls.write(start, found.v[:, 0].float())
            embedding.write(start, found.embedding.float())
            start += len(batch.images)
            yield

    workspace.share(stage, len(dataset), BATCH, work, "images")
    return Features(cls.tensor, embedding.tensor)


def needed_splits(split: str, probe: bool) -> tuple[str, ...]:
    """Splits that an evaluation reads, the evaluated one first. ConfigError for a split to which its probe is fitted.

    A probe is chosen on validation, and then fitted to train and validation together.
    """
    if not probe:
        return (split,)
    if split in ("train", "validation"):
        raise ConfigError(f"probe: wanted a split to which no probe is fitted, such as test, got {split}")
    return (split, "train", "validation")


def evaluate_recognition(
    model: TrainedModel,
    data: dict[str, Dataset],
    split: str,
    options: RecognitionOptions | None = None,
    workspace: Workspace | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a model on a split, in per cent, and a record {id, label} for each image, with `probe` if it was made.

    Args:
        data: the splits by name: `split`, and for probes train and validation.

    Raises:
        DataError: a sample has no class, or the class of a sample is not among the training split's.
        ConfigError: a setting or a file of it cannot be used.
    """
    options, workspace = options or RecognitionOptions(), workspace or Workspace()
    needed = needed_splits(split, options.probe)

    def read() -> tuple[list[str], list[str], list[str], dict[str, list[str]] | None]:
        if missing := [name for name in needed if name not in data]:
            raise ConfigError(
                f"wanted the splits {', '.join(needed)}, found none named {missing[0]}; name another data set"
            )
        labels = labels_of(data[split], options.by)
        splits = _training_splits(data, options, labels) if options.probe else None
        return labels, class_names(labels, options.classes), read_templates(options.templates), splits

    labels, names, templates, splits = run_on_all_ranks(workspace.world, read)
    own = {"by": options.by, "probe": options.probe, "shots": list(options.shots), "seeds": options.seeds}
    own |= {"classes": _fingerprint(names), "templates": _fingerprint(templates)}
    check_same(workspace.world, own, SAME_WORK)
    dataset = data[split]
    groups = [image_name(dataset.metadata(i)) or str(dataset.keys[i]) for i in range(len(dataset))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = MaskVLM(model.network.config).to(model.device)
    untrained = TrainedModel(network, model.tokenizer, model.precision)
    found = {"model": model, "untrained": untrained}
    features = {name: features_of(each, dataset, f"{name} {split}", workspace) for name, each in found.items()}
    zero_shot = {
        name: _nearest(features[name].embedding, label_embeddings(each, names, templates), names, labels)
        for name, each in found.items()
    }
    counts = [labels.count(name) for name in set(labels)]
    figures: dict[str, Any] = {
        "by": field_of(dataset, options.by),
        "classes": len(names),
        "templates": len(templates),
        "images": len(labels),
        **_figures(zero_shot["model"][0], labels, names, groups),
        "top5": 100 * int((zero_shot["model"][1] < 5).sum()) / len(labels),
        "baselines": {
            "chance": 100 / len(names),
            "majority": 100 * max(counts) / len(labels),
            "untrained": _figures(zero_shot["untrained"][0], labels, names, groups)["accuracy"],
        },
        "model": model.sha256,
        "fingerprint": dataset.fingerprint,
        "precision": chosen_precision(model.device, model.precision),
    }
    records = [{"id": dataset.keys[i], "label": label} for i, label in enumerate(zero_shot["model"][0])]
    if splits is not None:
        train_names = sorted({*splits["train"]})
        for name, each in found.items():
            tables = {
                part: Labelled(
                    features_of(each, data[part], f"{name} {part}", workspace).cls,
                    torch.tensor([train_names.index(label) for label in known]),
                )
                for part, known in splits.items()
            }
            made, c = probe(tables["train"], tables["validation"], len(train_names))
            predicted = [train_names[i] for i in made.predict(features[name].cls).tolist()]
            key = "probe" if name == "model" else "untrained_probe"
            figures[key] = {"c": c, **_figures(predicted, labels, train_names, groups)}
            if name == "model":
                for record, label in zip(records, predicted, strict=True):
                    record["probe"] = label
                figures["few_shot"] = _few_shot(tables, train_names, features[name].cls, labels, options)
    return figures, records


def _fingerprint(texts: list[str]) -> str:
    """Hash of texts in their order, short enough for a message."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]


def _training_splits(data: dict[str, Dataset], options: RecognitionOptions, labels: list[str]) -> dict[str, list[str]]:
    """Labels of train and validation. DataError if train lacks a class of another split."""
    splits = {part: labels_of(data[part], options.by) for part in ("train", "validation")}
    known = set(splits["train"])
    for part, found in (("validation", splits["validation"]), ("evaluated", labels)):
        unknown = sorted(set(found) - known)
        if unknown:
            raise DataError(
                f"{data['train'].folder}: wanted every class of the {part} split in train, found none of "
                f"{unknown[0]!r} ({len(unknown)} classes are missing); choose other classes with --by"
            )
    fewest = min(splits["train"].count(name) for name in known)
    asked = [number for number in options.shots if number > fewest]
    if asked or not 2 <= options.seeds <= 20 or any(number < 1 for number in options.shots):
        raise ConfigError(
            f"shots, seeds: wanted 1 to {fewest} images a class, the fewest in train, and 2 to 20 seeds, got "
            f"{list(options.shots)} and {options.seeds}"
        )
    return splits


def _few_shot(
    tables: dict[str, Labelled], names: list[str], x: Tensor, labels: list[str], options: RecognitionOptions
) -> dict[str, Any]:
    """Accuracy for each number of shots: mean over seeds, its 95 % interval, and each."""
    fewest = int(tables["train"].y.bincount(minlength=len(names)).min())
    numbers = options.shots or [number for number in SHOTS if number <= fewest]
    left_out = [number for number in SHOTS if number > fewest]
    if not options.shots and left_out:
        log.info("few-shot: the rarest class has %d training images, so %s shots are left out", fewest, left_out)
    wanted, found = torch.tensor([names.index(label) for label in labels]), {}
    for number in numbers:
        values = []
        for seed in range(options.seeds):
            made = few_shot(tables["train"], tables["validation"], len(names), number, seed)
            values.append(100 * (made.predict(x) == wanted).double().mean().item())
        low, high = mean_interval(values)
        found[str(number)] = {
            "accuracy": sum(values) / len(values),
            "accuracy_95": [max(0.0, low), min(100.0, high)],
            "by_seed": values,
        }
    return found


def _nearest(images: Tensor, classes: Tensor, names: list[str], labels: list[str]) -> tuple[list[str], Tensor]:
    """The nearest class of each image, and the rank of the right one, int64 (n,), 0 = first.

    If the right class ties with a wrong one, or scores are NaN, the wrong one is nearer, as in retrieval.
    """
    scores = images.double() @ classes.double().T  # (n, K)
    number = {name: i for i, name in enumerate(names)}
    own = torch.tensor([number[label] for label in labels])
    right = own[:, None] == torch.arange(len(names))
    ranks = best_rank(scores, right)
    nearest = torch.where(ranks == 0, own, scores.masked_fill(right, float("-inf")).argmax(1))
    return [names[i] for i in nearest.tolist()], ranks


def _figures(predicted: list[str], labels: list[str], names: list[str], groups: list[str]) -> dict[str, Any]:
    figures = classification_figures(predicted, labels, names)
    right = [float(a == b) for a, b in zip(predicted, labels, strict=True)]
    return {**figures, "accuracy_95": [100 * x for x in grouped_bootstrap(right, groups)]}
