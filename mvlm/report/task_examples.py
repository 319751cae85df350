"""Samples in a task's report: verdicts, their confusion, and right and wrong examples with maps of their words.

Examples are chosen by a rule that knows no picture. Maps are of the patches that each word attends to, by their effect
on what the task predicts: GradCAM as in `mvlm.inference.attention_maps`, with the task's prediction in place of ITM's
log-odds: the log-odds of the predicted label, the log-likelihood of the masked answer, or the log-probability of a
caption's word when that word is masked. The weights are those of the last cross-attention to the image that words have
an effect in.

Shape legend: B rows (images of a strip, or copies of a caption), L tokens, M keys (1 + patches), C width, W words, S
image side.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from mvlm.errors import RunError
from mvlm.inference.attention_maps import draw_overlay, gradcam, recorded_attention, word_maps, word_spans
from mvlm.inference.encode import packed_tokens
from mvlm.inference.images import decode_image, load_image
from mvlm.model import plain
from mvlm.objectives.losses import at_least_float32
from mvlm.report.html import data_uri, render
from mvlm.tasks.caption import Captioning
from mvlm.tasks.task import LabelTask, Task, Verdict
from mvlm.tasks.vqa import AnswerTable, VisualQuestionAnswering, answers_loss, mask_features
from mvlm_dataloading import Batch, Dataset

SHOWN = 6  # of each kind
MOST_WORDS = 12  # with a map each, [CLS] included
SIDE = 96  # pixels of a panel
CONFUSED = 10
"""Number of most frequent labels in a confusion matrix of a task that has no short list of labels, such as VQA."""


class TaskExample(NamedTuple):
    """A sample of a task with its prediction and maps of its words, as a report shows it."""

    key: str
    verdict: Verdict
    probability: float | None
    """Probability of the prediction, by the run's checkpoint."""
    rows: list[list[tuple[str, str]]]
    """For each image of the sample: the image, then the maps of words over it, each as its word and a data URI."""


def judged(task: Task, file: Path, figures: dict[str, Any], split: Dataset) -> list[Verdict] | None:
    """Judge each prediction of an evaluation as right or wrong; None if reports show no examples of the task.

    RunError if the mean score is not the evaluation's main figure: the split is then not the one that was evaluated.

    Args:
        file: file of the evaluation, for errors.
        figures: content of that file.
    """
    records = figures["records"]
    same = [record["sample"] for record in records] == list(range(len(split)))
    try:
        verdicts = task.judge(records, split) if same else []
        if verdicts is None:
            return None
        equal = same and abs(fmean(v.score for v in verdicts) - figures[task.main]) < 1e-6
    except (KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: wanted the records of {task.name}, got {error!r}; evaluate the run again") from None
    if not equal:
        raise RunError(
            f"{file}: wanted the records of the split {split.split} of {split.folder}, found those of other data; "
            f"evaluate the run again, or name its data with --data"
        )
    return verdicts


def confusion(verdicts: Sequence[Verdict], known: Sequence[str] | None = None) -> Markup | None:
    """Confusion matrix as HTML: right labels are rows, predicted ones columns; counts are shaded by share of their row.

    It has the `known` labels of a task; without them, the most frequent ones and "other". The counts add up to the
    samples of the split. None for samples without labels, as captions are.
    """
    frequent = by_frequency(verdicts)
    if not frequent:
        return None
    labels: list[str] = list(known or frequent[:CONFUSED])
    row = {label: number for number, label in enumerate(labels)}
    other = len(labels)
    counts = np.zeros((other + 1, other + 1), dtype=np.int64)
    for v in verdicts:
        counts[row.get(v.label, other), row.get(v.predicted, other)] += 1
    if counts[other].any() or counts[:, other].any():
        labels.append("other")
    counts = counts[: len(labels), : len(labels)].tolist()
    rows = [
        (label, [(count, round(60 * count / max(1, sum(line)))) for count in line])
        for label, line in zip(labels, counts, strict=True)
    ]
    return render("confusion.html", labels=labels, rows=rows)


def majority(
    task: type[Task], verdicts: Sequence[Verdict], records: Sequence[dict[str, Any]], dataset: Dataset
) -> float | None:
    """Main figure, in per cent, if every sample got the split's most frequent label; None for a task without labels."""
    frequent = by_frequency(verdicts)
    if not frequent:
        return None
    always = [{name: x if name == "sample" else frequent[0] for name, x in record.items()} for record in records]
    return fmean(v.score for v in task.judge(always, dataset) or ())


def by_frequency(verdicts: Sequence[Verdict]) -> list[str]:
    """Right labels of the samples, each once, most frequent first."""
    counts = Counter(v.label for v in verdicts if v.label)
    return sorted(counts, key=lambda label: (-counts[label], label))


def choose(verdicts: Sequence[Verdict], right: bool, dataset: Dataset) -> list[Verdict]:
    """The first `SHOWN` right (or wrong) samples in the order of the SHA-256 of their keys."""

    def place(verdict: Verdict) -> str:
        return hashlib.sha256(dataset.keys[verdict.sample].encode()).hexdigest()

    return sorted((v for v in verdicts if v.right is right), key=place)[:SHOWN]


def task_examples(task: Task, verdicts: Sequence[Verdict], right: bool, dataset: Dataset) -> list[TaskExample]:
    """Examples of right (or wrong) samples for a report, with maps of words unless the model is blind to a modality."""
    found = []
    for verdict in choose(verdicts, right, dataset):
        i = verdict.sample
        whole = decode_image(dataset.image_bytes(i), dataset.where(i))  # uint8 (H, n W, 3)
        squares = np.split(whole, int(dataset.metadata(i).get("images", 1)), axis=1)
        rows, maps = [[("", data_uri(load_image(square, SIDE)))] for square in squares], None
        if task.options.blind == "no":
            pixels = torch.cat([load_image(square, task.config.image_size) for square in squares], dim=2)  # (3, S, n S)
            maps = task_maps(task, pixels, verdict.text, verdict.predicted)
        if maps:
            for row, square, heats in zip(rows, squares, maps.maps, strict=True):
                for word, heat in list(zip(maps.words, heats, strict=True))[:MOST_WORDS]:
                    row.append((word, data_uri(draw_overlay(square, heat, side=SIDE))))
        found.append(TaskExample(dataset.keys[i], verdict, maps.probability if maps else None, rows))
    return found


class TaskMaps(NamedTuple):
    """Maps of the words of a text over each image of a sample."""

    words: list[str]
    """"[CLS]", which stands for the whole text, and the words; "[MASK]" in its place for a masked answer; of a caption,
    the words alone."""
    maps: Tensor
    """float32 (images, W, rows, columns), weight of each word on each patch, not negative."""
    probability: float | None
    """Probability of the prediction, by the task's head; None for a caption."""


@torch.enable_grad()
def task_maps(task: Task, images: Tensor, text: str, predicted: str) -> TaskMaps | None:
    """Maps of a sample: uint8 images (3, S, n S), n of them side by side, its text and the task's prediction.

    The task is on the CPU. A text with more tokens than the model takes is cut, as in the evaluation.

    None for a task of a kind that no maps are known for. RunError if the task can make no such prediction.
    """
    if isinstance(task, Captioning):
        return _of_caption(task, images, predicted)
    vqa = task if isinstance(task, VisualQuestionAnswering) else None
    before = vqa.masks if vqa else 0  # tokens of the text before the question
    tokens, bounds = packed_tokens([text], task.tokenizer, task.config.text_length - before)
    first, one = ("[CLS]", 0, 1), torch.zeros(1, dtype=torch.int64)
    batch = Batch(images[None], tokens, bounds, len(tokens), one, one, one)
    if vqa and vqa.masked:
        with recorded_attention(vqa.model.text_cross) as layers:
            x = mask_features(vqa.model, batch, before, plain)
            table = AnswerTable([predicted], vqa.tokenizer, before + 1)
            score = -answers_loss(vqa.model, x, table, one, one, x.new_ones(1), plain).total
        layers = layers[:-1] or layers  # the question's words have no effect in the last one
        first = "[MASK]", 1, max(2, int(table.lengths))  # of no answer, the [MASK] of its end
        probability = score.exp()
    elif isinstance(task, VisualQuestionAnswering | LabelTask):
        labels = task.state["answers" if vqa else "labels"]
        if predicted not in labels:
            raise RunError(f"records: wanted a prediction of the run's labels, found {predicted!r}; evaluate it again")
        with recorded_attention(task.model.text_cross) as layers:
            logits = task.head(task.fuse(batch, plain, task.images if isinstance(task, LabelTask) else 1))[0]
        place = labels.index(predicted)
        score = logits[place]
        if not vqa:  # one label of several: the others together are its opposite
            score = score - torch.cat([logits[:place], logits[place + 1 :]]).logsumexp(0)
        probability = score.sigmoid()
    else:
        return None
    whole = [layer for layer in layers if layer.output.shape[1] == before + len(tokens)]
    layer = (whole or layers)[-1]  # the last layer of a classifier computes [CLS] alone
    (cam,) = gradcam([layer], score)  # (n, L, M)
    words = [(word, a, b) for word, a, b in word_spans(task.tokenizer, text) if b < len(tokens) and whole]
    spans = [first, *((word, before + a, before + b) for word, a, b in words)]
    return TaskMaps([word for word, _, _ in spans], word_maps(cam, [(a, b) for _, a, b in spans]), probability.item())


def _of_caption(task: Captioning, image: Tensor, caption: str) -> TaskMaps:
    """Maps of a caption's words, each masked in a copy of the caption."""
    model, length = task.model, task.config.text_length
    tokens, _ = packed_tokens([caption], task.tokenizer, length)
    spans = [(word, a, b) for word, a, b in word_spans(task.tokenizer, caption) if b < len(tokens)]
    side = task.config.image_size // task.config.patch_size
    if not spans:
        return TaskMaps([], torch.zeros(1, 0, side, side), None)
    chosen = torch.zeros(len(spans), len(tokens), dtype=torch.bool)  # (W, L), True = a token of the copy's word
    for row, (_, start, stop) in enumerate(spans):
        chosen[row, start:stop] = True
    copies = tokens.expand(len(spans), -1).masked_fill(chosen, task.config.mask_token_id)
    bounds = (len(tokens) * torch.arange(len(spans) + 1)).int()
    with recorded_attention(model.text_cross) as layers:
        v = model.encode_image(image[None]).expand(len(spans), -1, -1)  # (W, M, C)
        w, mask = model.encode_text_packed(copies.flatten(), bounds, len(tokens)).padded()
        x = model.text_cross(w, v, mask, None)[chosen]
        log_p = at_least_float32(model.language_head(x)).log_softmax(-1)
        score = log_p.gather(1, tokens.expand_as(chosen)[chosen][:, None]).sum()
    (cam,) = gradcam(layers[-1:], score)  # (W, L, M)
    maps = torch.cat([word_maps(cam[row], [(a, b)]) for row, (_, a, b) in enumerate(spans)])
    return TaskMaps([word for word, _, _ in spans], maps[None], None)
