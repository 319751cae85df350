"""Grounding without boxes in training: the place of a phrase by GradCAM of ITM on the text tower (ALBEF).

The map of a phrase is the mean over heads and tokens of weight x max(0, derivative of ITM's log-odds), in one
cross-attention layer of the text, resized to the image (bicubic). The pointing game asks whether its highest point lies
in the phrase's box. Where a sample lists candidate boxes (RefCOCO+), the best is the one with the largest sum of the
map over the square root of its area, and is right if it overlaps the phrase's box by half. The layer is the best on the
validation split.

A sample's caption is the phrase; its metadata holds `box` [x, y, width, height], in pixels of an image of `size`
[width, height] and, if they are there, `id`, `image_id` and `candidates`, a list of boxes. A file of detections may
give the candidates instead.

Shape legend: n phrases, B phrases of a batch, A layers.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.errors import ConfigError, RunError
from mvlm.evaluation.workspace import SAME_WORK, Workspace
from mvlm.inference.attention_maps import text_gradcam
from mvlm.inference.encode import BATCH, eval_loader, image_features, text_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm.tasks.metrics.pointing import box_contains, overlap, pointing_figures
from mvlm.tasks.records import read_json
from mvlm_dataloading import DataError, Dataset, Tokenizer
from mvlm_dataloading.dataset.dataset import image_name

ENOUGH_OVERLAP = 0.5


class Phrases(NamedTuple):
    """Phrases of a split, and what is known about each."""

    texts: list[str]
    boxes: list[list[float]]
    sizes: list[list[int]]
    candidates: list[list[list[float]]]
    """Boxes of each phrase; empty lists if the data has none."""
    ids: list[str]
    images: list[str]
    """Image of each phrase, over which intervals are bootstrapped."""


class Answers(NamedTuple):
    """Answers of a model for each phrase and layer."""

    points: Tensor
    """float64 (n, A, 2), x and y in pixels."""
    chosen: Tensor
    """int64 (n, A), number of the best candidate, -1 without candidates."""


def read_candidates(file: Path) -> dict[str, list[list[float]]]:
    """Boxes of each image id from a JSON list of detections {image_id, box}, as MAttNet's dets.json of RefCOCO+.

    RunError for a file of another format.
    """
    boxes: dict[str, list[list[float]]] = {}
    try:
        for record in read_json(file, "a JSON list of detections {image_id, box}"):
            x, y, width, height = map(float, record["box"])
            boxes.setdefault(str(record["image_id"]), []).append([x, y, width, height])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, RunError):
            raise
        raise RunError(
            f"{file}: wanted a JSON list of detections {{image_id, box [x, y, width, height]}}, found another format "
            f"({error!r}); is it another file?"
        ) from None
    return boxes


def _are_numbers(value: Any, length: int) -> TypeGuard[list[float]]:
    """True for a list of so many numbers."""
    return isinstance(value, list) and len(value) == length and all(type(one) in (int, float) for one in value)


def phrases_of(dataset: Dataset, detected: dict[str, list[list[float]]] | None = None) -> Phrases:
    """The phrases of a split. DataError for a sample without a box, or without candidates where others have them.

    Args:
        detected: candidates by image id (`read_candidates`), instead of the metadata's.
    """
    found = Phrases([], [], [], [], [], [])
    for i in range(len(dataset)):
        record = dataset.metadata(i)
        for field, length in (("box", 4), ("size", 2)):
            value = record.get(field)
            if not _are_numbers(value, length) or min(value[-2:]) <= 0:
                raise DataError(
                    f"{dataset.where(i)}: wanted `{field}`, {length} numbers in pixels, found {value!r}; is it data of "
                    f"another task?"
                )
        found.texts.append(dataset.captions(i)[0])
        found.boxes.append(record["box"])
        found.sizes.append([max(1, round(length)) for length in record["size"]])
        boxes = record.get("candidates", [])
        if detected is not None:  # COCO's images have "coco NUMBER" as their id
            boxes = detected.get(str(record.get("image_id")).removeprefix("coco "), [])
        found.candidates.append([box for box in boxes if min(box[2:]) > 0])
        found.ids.append(str(record.get("id", dataset.keys[i])))
        found.images.append(image_name(record) or str(dataset.keys[i]))
    if (detected is not None or any(found.candidates)) and not all(found.candidates):
        number = found.candidates.index([])
        raise DataError(f"{dataset.where(number)}: wanted candidates for each phrase, found none for this one")
    return found


def other_phrases(texts: list[str], seed: int = 0) -> list[str]:
    """Another phrase for each: the next different one in a random order. Its own if all are equal."""
    order = np.random.default_rng(seed).permutation(len(texts)).tolist()
    others = list(texts)
    for place, i in enumerate(order):
        following = (texts[j] for j in order[place + 1 :] + order[:place])
        others[i] = next((text for text in following if text != texts[i]), texts[i])
    return others


def phrase_maps(network: MaskVLM, tokenizer: Tokenizer, images: Tensor, texts: list[str]) -> Tensor:
    """Maps float32 (A, B, rows, columns) of images uint8 (B, 3, S, S) and their phrases, in fp32."""
    v = image_features(network, images, "fp32").v
    w, key_mask = text_features(network, texts, tokenizer, "fp32").w.padded()
    found = torch.stack(text_gradcam(network, v, w, key_mask).gradcam)  # (A, B, L, 1+N)
    tokens = key_mask[:, :, None].to(found.dtype)
    side = network.config.image_size // network.config.patch_size
    return ((found * tokens).sum(2) / tokens.sum(1))[..., 1:].unflatten(-1, (side, side))


def best_candidate(heat: Tensor, boxes: list[list[float]]) -> int:
    """Number of the box with the largest sum of a map (height, width) over the square root of its area."""
    scores = []
    for x, y, width, height in boxes:
        left, top = max(0, int(x)), max(0, int(y))
        inside = heat[top : max(top + 1, int(y + height)), left : max(left + 1, int(x + width))]
        scores.append(inside.sum().item() / (width * height) ** 0.5)
    return int(np.argmax(scores))


def answers(
    network: MaskVLM,
    tokenizer: Tokenizer,
    dataset: Dataset,
    phrases: Phrases,
    texts: list[str],
    stage: str,
    workspace: Workspace,
) -> Answers:
    """Answers on a split for `texts`, a text for each sample. The ranks of the workspace share the work."""
    layers = network.config.cross_layers
    points = workspace.array(f"{stage}.points", (len(dataset), layers, 2), torch.float64)
    chosen = workspace.array(f"{stage}.chosen", (len(dataset), layers), torch.int64)
    device = next(network.parameters()).device

    def work(start: int, stop: int) -> Iterator[None]:
        for batch, _ in eval_loader(dataset.rows(start, stop), network, tokenizer):
            rows = range(start, start + len(batch.images))
            maps = phrase_maps(network, tokenizer, batch.images.to(device), [texts[i] for i in rows]).cpu()
            for place, i in enumerate(rows):
                width, height = phrases.sizes[i]
                heat = F.interpolate(maps[:, place, None], size=(height, width), mode="bicubic", align_corners=False)
                flat = heat.flatten(1).argmax(1)  # (A,)
                points.write(i, torch.stack([flat % width + 0.5, flat // width + 0.5], dim=1).double()[None])
                boxes = phrases.candidates[i]
                best = [best_candidate(each[0], boxes) if boxes else -1 for each in heat]
                chosen.write(i, torch.tensor([best]))
            start += len(rows)
            yield

    workspace.share(stage, len(dataset), BATCH, work, "phrases")
    return Answers(points.tensor, chosen.tensor)


def hits(phrases: Phrases, found: Answers) -> tuple[Tensor, Tensor]:
    """Right answers of each phrase and layer, float64 (n, A): of the pointing game, and of the candidates."""
    points = [
        [box_contains(box, p) for p in rows] for box, rows in zip(phrases.boxes, found.points.tolist(), strict=True)
    ]
    best = [
        [row >= 0 and overlap(boxes[row], box) >= ENOUGH_OVERLAP for row in rows]
        for box, boxes, rows in zip(phrases.boxes, phrases.candidates, found.chosen.tolist(), strict=True)
    ]
    return torch.tensor(points).double(), torch.tensor(best).double()


def evaluate_grounding(
    model: TrainedModel,
    split: Dataset,
    validation: Dataset | None,
    layer: int | None = None,
    workspace: Workspace | None = None,
    detected: dict[str, list[list[float]]] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a model on a split, in per cent, with their baselines; and a record {id, x, y} for each phrase.

    Args:
        validation: split on which the layer is chosen.
        layer: number of the layer from 0, instead of a choice.
        detected: candidates by image id (`read_candidates`), instead of the metadata's.

    Raises:
        ConfigError: there is no such layer, or neither a layer nor a validation split; or the model has no ITM.
    """
    workspace, (network, tokenizer) = workspace or Workspace(), model
    check_same(workspace.world, {"layer": layer}, SAME_WORK)  # the validation split is a stage only without one

    def read() -> tuple[Phrases, Phrases | None]:
        if not network.matching_is_trained:
            raise ConfigError(
                "checkpoint: wanted a model trained with ITM, whose maps point at phrases, found one without; name "
                "another"
            )
        if layer is None and validation is None:
            raise ConfigError("layer: wanted a validation split to choose the layer on, found none; add --layer N")
        if layer is not None and not 0 <= layer < network.config.cross_layers:
            raise ConfigError(f"layer: wanted 0 to {network.config.cross_layers - 1}, got {layer}")
        known = phrases_of(validation, detected) if layer is None and validation is not None else None
        return phrases_of(split, detected), known

    (phrases, known), swept = run_on_all_ranks(workspace.world, read), None
    boxed = bool(phrases.candidates[0])
    if layer is None:
        assert validation is not None
        assert known is not None
        by_layer = hits(known, answers(network, tokenizer, validation, known, known.texts, "validation", workspace))
        swept = (100 * by_layer[bool(known.candidates[0])].mean(0)).tolist()
        layer = int(np.argmax(swept))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = MaskVLM(network.config).to(model.device).eval()
    own = answers(network, tokenizer, split, phrases, phrases.texts, "phrases", workspace)
    others = other_phrases(phrases.texts)
    wrong = answers(network, tokenizer, split, phrases, others, "wrong phrases", workspace)
    blank = answers(untrained, tokenizer, split, phrases, phrases.texts, "untrained", workspace)
    points = own.points[:, layer].tolist()
    (right, best), (of_wrong, best_of_wrong), (of_blank, best_of_blank) = (
        [x[:, layer].tolist() for x in hits(phrases, found)] for found in (own, wrong, blank)
    )
    figures: dict[str, Any] = {
        "phrases": len(split),
        "layer": layer,
        "validation_by_layer": swept,
        **pointing_figures(points, phrases.boxes, phrases.sizes),
        "accuracy_95": _interval(right, phrases),
        "wrong_phrase": _per_cent(of_wrong),
        "untrained": _per_cent(of_blank),
        "untrained_95": _interval(of_blank, phrases),
        "above_wrong_phrase_95": _interval(_differences(right, of_wrong), phrases),
        "above_untrained_95": _interval(_differences(right, of_blank), phrases),
        "model": model.sha256,
        "fingerprint": split.fingerprint,
        "precision": "fp32",
    }
    if boxed:
        enough = [
            float(np.mean([overlap(other, box) >= ENOUGH_OVERLAP for other in boxes]))
            for box, boxes in zip(phrases.boxes, phrases.candidates, strict=True)
        ]
        figures["boxes"] = {
            "accuracy": _per_cent(best),
            "accuracy_95": _interval(best, phrases),
            "chance": _per_cent(enough),
            "wrong_phrase": _per_cent(best_of_wrong),
            "untrained": _per_cent(best_of_blank),
        }
    records: list[dict[str, Any]] = [
        {"id": key, "x": x, "y": y} for key, (x, y) in zip(phrases.ids, points, strict=True)
    ]
    if boxed:
        for record, boxes, row in zip(records, phrases.candidates, own.chosen[:, layer].tolist(), strict=True):
            record["box"] = boxes[row]
    return figures, records


def _per_cent(values: list[float]) -> float:
    return 100 * float(np.mean(values))


def _differences(ours: list[float], others: list[float]) -> list[float]:
    return [own - other for own, other in zip(ours, others, strict=True)]


def _interval(values: list[float], phrases: Phrases) -> list[float]:
    return [100 * x for x in grouped_bootstrap(values, phrases.images)]
