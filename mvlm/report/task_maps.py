"""Maps of the patches that each word of a text attends to, by their effect on what a fine-tuned task predicts.

GradCAM as in `mvlm.inference.attention_maps`, with the task's prediction in place of ITM's log-odds: the log-odds of
the predicted label, the log-likelihood of the masked answer, or the log-probability of a caption's word when
that word is masked. The weights are those of the last cross-attention to the image that words have an effect in.

Shape legend: B rows (images of a strip, or copies of a caption), L tokens, M keys (1 + patches), C width, H heads,
D head width, W words, S image side.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mvlm.errors import RunError
from mvlm.inference.attention_maps import gradcam, recorded_attention, word_maps, word_spans
from mvlm.inference.encode import packed_tokens
from mvlm.objectives.losses import at_least_float32
from mvlm.tasks.caption import Captioning
from mvlm.tasks.entailment import Entailment
from mvlm.tasks.masked_answers import AnswerTable, answers_loss, mask_features
from mvlm.tasks.pairs import Pairs
from mvlm.tasks.task import Task
from mvlm.tasks.vqa import VisualQuestionAnswering
from mvlm_dataloading import Batch


class TaskMaps(NamedTuple):
    """Maps of the words of a text over each image of a sample."""

    words: list[str]
    """"[CLS]", which stands for the whole text, and the words; "[MASK]" in its place for a masked answer; of a caption,
    the words alone."""
    maps: Tensor
    """float32 (images, W, rows, columns), not negative."""
    probability: float | None
    """Of the prediction, by the task's head; None for a caption."""


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
    first = "[CLS]", 0, 1
    batch, number = _batch(images, tokens, bounds), task.images if isinstance(task, Pairs) else 1
    one = torch.zeros(1, dtype=torch.int64)
    if vqa and vqa.masked:
        with recorded_attention(vqa.model.text_cross) as layers:
            x = mask_features(vqa.model, batch, before, "plain")
            table = AnswerTable([predicted], vqa.tokenizer, before + 1)
            score = -answers_loss(vqa.model, x, table.select(one), one, x.new_ones(1), "plain")[0]
        layers = layers[:-1] or layers  # the question's words have no effect in the last one
        first = "[MASK]", 1, max(2, int(table.lengths))  # of no answer, the [MASK] of its end
        probability = score.exp()
    elif isinstance(task, VisualQuestionAnswering | Entailment | Pairs):
        labels = task.state["answers" if isinstance(task, VisualQuestionAnswering) else "labels"]
        if predicted not in labels:
            raise RunError(f"records: wanted a prediction of the run's labels, found {predicted!r}; evaluate it again")
        with recorded_attention(task.model.text_cross) as layers:
            logits = task.head(task.fuse(batch, "plain", number))[0]
        place = labels.index(predicted)
        score = logits[place]
        if not isinstance(task, VisualQuestionAnswering):  # one label of several: the others together are its opposite
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


def _batch(images: Tensor, tokens: Tensor, bounds: Tensor) -> Batch:
    """A batch of one sample."""
    one = torch.zeros(1, dtype=torch.int64)
    return Batch(images[None], tokens, bounds, len(tokens), one, one, one)
