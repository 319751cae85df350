"""Grounding without boxes in training: the place of a phrase by GradCAM of ITM on the text tower (ALBEF).

The map of a phrase is the mean over heads and tokens of weight x max(0, derivative of ITM's log-odds), in one
cross-attention layer of the text, resized to the image (bicubic). The pointing game asks whether its highest point lies
in the phrase's box. The layer is the best on the validation split.

A sample's caption is the phrase; its metadata holds `box` [x, y, width, height], in pixels of an image of `size`
[width, height] and, if they are there, `id` and `image_id`.

Shape legend: n phrases, B phrases of a batch, A layers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.distributed.coordination import check_same, run_on_all_ranks
from mvlm.errors import ConfigError
from mvlm.evaluation.workspace import SAME_WORK, Workspace
from mvlm.inference.attention_maps import matching_gradcam
from mvlm.inference.encode import BATCH, eval_loader, image_features, text_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.maskvlm import MaskVLM
from mvlm.tasks.metrics import Scored, percent_interval
from mvlm.tasks.metrics.labels import score_points
from mvlm_dataloading import DataError, Dataset, Tokenizer
from mvlm_dataloading.dataset.dataset import image_name


class Phrases(NamedTuple):
    """Phrases of a split, and what is known about each."""

    texts: list[str]
    boxes: list[list[float]]
    sizes: list[list[int]]
    ids: list[str]
    images: list[str]
    """Image of each phrase, over which intervals are bootstrapped."""


def phrases_of(dataset: Dataset) -> Phrases:
    """The phrases of a split. DataError for a sample without a box."""
    found = Phrases([], [], [], [], [])
    for i in range(len(dataset)):
        record = dataset.metadata(i)
        for field, length in (("box", 4), ("size", 2)):
            value: Any = record.get(field)
            numbers = isinstance(value, list) and len(value) == length and all(type(x) in (int, float) for x in value)
            if not numbers or min(value[-2:]) <= 0:
                raise DataError(
                    f"{dataset.where(i)}: wanted `{field}`, {length} numbers in pixels, found {value!r}; is it data of "
                    f"another task?"
                )
        found.texts.append(dataset.captions(i)[0])
        found.boxes.append(record["box"])
        found.sizes.append([max(1, round(length)) for length in record["size"]])
        found.ids.append(str(record.get("id", dataset.keys[i])))
        found.images.append(image_name(record) or str(dataset.keys[i]))
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
    found = torch.stack(matching_gradcam(network, v, w, key_mask)[2])  # (A, B, L, 1+N)
    tokens = key_mask[:, :, None].to(found.dtype)
    side = network.config.image_size // network.config.patch_size
    return ((found * tokens).sum(2) / tokens.sum(1))[..., 1:].unflatten(-1, (side, side))


def highest_points(
    network: MaskVLM,
    tokenizer: Tokenizer,
    dataset: Dataset,
    phrases: Phrases,
    texts: list[str],
    stage: str,
    workspace: Workspace,
) -> Tensor:
    """Highest point of the maps of `texts`, a text for each sample: float64 (n, A, 2), x and y in pixels.

    The ranks of the workspace share the work.
    """
    points = workspace.array(f"{stage}.points", (len(dataset), network.config.cross_layers, 2), torch.float64)
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
            start += len(rows)
            yield

    workspace.share(stage, len(dataset), BATCH, work, "phrases")
    return points.tensor


def evaluate_grounding(
    model: TrainedModel,
    split: Dataset,
    validation: Dataset | None,
    layer: int | None = None,
    workspace: Workspace | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures of a model on a split, in per cent, with their baselines; and a record {id, x, y} for each phrase.

    Args:
        validation: split on which the layer is chosen.
        layer: number of the layer from 0, instead of a choice.

    Raises:
        ConfigError: there is no such layer, or neither a layer nor a validation split; or the model has no ITM.
    """
    workspace, network, tokenizer = workspace or Workspace(), model.network, model.tokenizer
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
        known = phrases_of(validation) if layer is None and validation is not None else None
        return phrases_of(split), known

    (phrases, known), swept = run_on_all_ranks(workspace.world, read), None

    def scored(points: Tensor, of: Phrases, layer: int) -> Scored:
        return score_points(points[:, layer].tolist(), of.boxes, of.sizes, of.images)

    if layer is None:
        assert validation is not None
        assert known is not None
        points = highest_points(network, tokenizer, validation, known, known.texts, "validation", workspace)
        swept = [scored(points, known, number).figures["accuracy"] for number in range(points.shape[1])]
        layer = int(np.argmax(swept))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = MaskVLM(network.config).to(model.device).eval()
    others = other_phrases(phrases.texts)
    points = highest_points(network, tokenizer, split, phrases, phrases.texts, "phrases", workspace)
    of_wrong = highest_points(network, tokenizer, split, phrases, others, "wrong phrases", workspace)
    of_untrained = highest_points(untrained, tokenizer, split, phrases, phrases.texts, "untrained", workspace)
    own, wrong, blank = (scored(found, phrases, layer) for found in (points, of_wrong, of_untrained))
    figures: dict[str, Any] = {
        "phrases": len(split),
        "layer": layer,
        "validation_by_layer": swept,
        **own.all_figures,
        "wrong_phrase": wrong.figures["accuracy"],
        "untrained": blank.figures["accuracy"],
        "untrained_95": percent_interval(blank.scores, phrases.images),
        "above_wrong_phrase_95": percent_interval(own.scores - wrong.scores, phrases.images),
        "above_untrained_95": percent_interval(own.scores - blank.scores, phrases.images),
        "model": model.sha256,
        "fingerprint": split.fingerprint,
        "precision": "fp32",
    }
    places = points[:, layer].tolist()
    return figures, [{"id": key, "x": x, "y": y} for key, (x, y) in zip(phrases.ids, places, strict=True)]
