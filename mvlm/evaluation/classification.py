"""Zero-shot classification of images: the share whose class has the nearest text (Radford et al., 2021).

The embedding of a class is the mean of those of its texts, one for each template, scaled to unit length.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvlm.evaluation.class_images import ClassImages
from mvlm.evaluation.workspace import Workspace
from mvlm.inference.encode import BATCH, image_features, text_features
from mvlm.inference.images import load_image, one_ahead
from mvlm.model.maskvlm import MaskVLM
from mvlm.statistics import grouped_bootstrap
from mvlm_dataloading import Tokenizer

TOP = (1, 5)
CLASSES_AT_ONCE = 16


def classify_images(
    model: MaskVLM, classes: ClassImages, tokenizer: Tokenizer, precision: str, workspace: Workspace
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy of zero-shot classification in per cent, with 95 % intervals bootstrapped over images.

    All ranks of the workspace share the work and return the same. The model must be in evaluation mode. A wrong class
    with the same similarity as the right one counts as nearer. RunError for an image that cannot be decoded,
    EvaluationStopped for an early end.
    """
    width = model.config.itc_width
    texts = workspace.array("class_texts", (len(classes.names), width), torch.float32)
    hits = workspace.array("class_hits", (len(classes), len(TOP)), torch.uint8)

    def embed(start: int, stop: int) -> Iterator[None]:
        for first in range(start, stop, CLASSES_AT_ONCE):
            names = classes.names[first : min(first + CLASSES_AT_ONCE, stop)]
            texts.write(first, embed_names(model, names, classes.templates, tokenizer, precision))
            yield

    workspace.share("class_texts", len(classes.names), CLASSES_AT_ONCE, embed, "classes")
    nearest = texts.tensor.to(next(model.parameters()).device)

    def judge(start: int, stop: int) -> Iterator[None]:
        for first, images in _batches(classes, model.config.image_size, start, stop):
            own = image_features(model, images, precision).embedding.float()
            labels = classes.labels[first : first + len(own)].to(own.device)
            hits.write(first, hits_of(own @ nearest.T, labels).cpu())
            yield

    workspace.share("class_images", len(classes), BATCH, judge, "images of classes")
    found = {f"top{k}": right for k, right in zip(TOP, hits.tensor.numpy().T, strict=True)}
    figures: dict[str, Any] = {"n_images": len(classes), "n_classes": len(classes.names)}
    for name, right in found.items():
        figures[name] = round(100 * float(right.mean()), 2)
        figures[f"{name}_95"] = [round(100 * end, 2) for end in grouped_bootstrap(right, by_kind=True)]
    return figures


def classify_briefly(
    model: MaskVLM, classes: ClassImages, tokenizer: Tokenizer, precision: str, workspace: Workspace
) -> dict[str, float]:
    """`classify_images` during training: `classes_top1`, `classes_top1_low` and `_high`, and likewise top5.

    The model's mode (training or evaluation) is restored.
    """
    was_training = model.training
    model.eval()
    try:
        found = classify_images(model, classes, tokenizer, precision, workspace)
    finally:
        model.train(was_training)
    figures = {}
    for k in TOP:
        low, high = found[f"top{k}_95"]
        names = (f"classes_top{k}{end}" for end in ("", "_low", "_high"))
        figures |= dict(zip(names, (found[f"top{k}"], low, high), strict=True))
    return figures


def hits_of(similarity: Tensor, labels: Tensor) -> Tensor:
    """Find if each image's class is among the nearest 1 and 5: uint8 (n, 2), 1 = it is.

    Args:
        similarity: (n, m), of n images with m classes.
        labels: int64 (n,), the right class of each image.
    """
    own = similarity.gather(1, labels[:, None])
    nearer = (~(similarity < own)).sum(1) - 1  # if it is not a number, all are
    return torch.stack([nearer < k for k in TOP], dim=1).to(torch.uint8)


def embed_names(model: MaskVLM, names: list[str], templates: list[str], tokenizer: Tokenizer, precision: str) -> Tensor:
    """Text embeddings of m classes, float32 (m, E) of unit length on the CPU: means over the templates."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [
        text_features(model, texts[i : i + BATCH], tokenizer, precision).embedding.float().cpu()
        for i in range(0, len(texts), BATCH)
    ]
    return F.normalize(torch.cat(parts).unflatten(0, (len(names), len(templates))).mean(1), dim=-1)


def _batches(classes: ClassImages, side: int, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Images `start` to `stop` - 1 in batches uint8 (B, 3, S, S), each with its first number. Threads decode ahead."""

    def load(i: int) -> Tensor:
        return load_image(classes.read(i), side, classes.name(i))

    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="mvlm-classes") as pool:
        firsts = range(start, stop, BATCH)
        batches = ((i, torch.stack([*pool.map(load, range(i, min(i + BATCH, stop)))])) for i in firsts)
        yield from one_ahead(batches)


def describe_classification(figures: dict[str, Any]) -> str:
    """Accuracy with its intervals, as `mvlm eval classes` prints it."""
    lines = [f"{figures['n_images']} images of {figures['n_classes']} classes, zero-shot"]
    for k in TOP:
        low, high = figures[f"top{k}_95"]
        lines.append(f"top-{k}  {figures[f'top{k}']:6.2f} %  (95 %: {low:.2f} to {high:.2f})")
    return "\n".join(lines)
