"""Predictions of a fine-tuned model for images and texts that are in no data set.

Shape legend: B batch, n images of a sample, S image side.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mvlm.device import autocast
from mvlm.errors import ConfigError, RunError, shown
from mvlm.inference.encode import packed_tokens
from mvlm.inference.images import ImageLike, Images, each_image, is_single_image, load_image
from mvlm.inference.texts import Texts, checked_texts, each_text
from mvlm.model.maskvlm import IMPLEMENTATIONS
from mvlm_dataloading import Batch, Tokenizer

Strips = Images | Iterable[Sequence[ImageLike]]
"""Images; for a task with n images a sample, a list of n images, or an iterable of such lists."""
Sample = tuple[Sequence[ImageLike], str]
"""The n images of a sample, and its text."""


@torch.no_grad()
def predictions(
    task: Any,
    tokenizer: Tokenizer,
    images: Strips,
    texts: Texts | None,
    batch_size: int,
    precision: str,
) -> Iterator[dict[str, Any]]:
    """Yield the prediction of a fine-tuned model for each sample, in order; `TrainedModel.predict` calls it.

    Args:
        task: the model with its head, a `mvlm.tasks.task.Task`.
        images: images of the samples; one goes with each of several texts.
        texts: texts of the samples; one goes with each of several images. None if the task reads no texts.
        batch_size: samples of one forward pass.
        precision: auto, bf16 or fp32.
    """
    options = task.loader_options()
    length = options.get("text_length", task.config.text_length)
    device, first = task.log_scale.device, 0
    rows = _rows(task, images, texts, options.get("strip", 1))
    loaded: dict[int, tuple[Any, Tensor]] = {}  # the last batch's samples and pixels: one image may have many texts
    while chunk := list(itertools.islice(rows, batch_size)):
        lines = [line for _, line in chunk]
        if task.reads_texts:
            lines = checked_texts(lines, tokenizer, length, truncate=True, first=first)
        before, loaded = loaded, {}
        for number, (sample, _) in enumerate(chunk, first):
            if id(sample) not in loaded:
                loaded[id(sample)] = before.get(id(sample)) or (sample, _strip(sample, task.config.image_size, number))
        row = {key: i for i, key in enumerate(loaded)}
        pixels, of = torch.stack([x for _, x in loaded.values()]), [row[id(sample)] for sample, _ in chunk]
        batch = _batch(pixels, of, packed_tokens(lines, tokenizer, length), task.shares)
        with autocast(device, precision):
            yield from task.predict(batch.to(device), IMPLEMENTATIONS["fast"])
        first += len(chunk)


def _rows(task: Any, images: Strips, texts: Texts | None, together: int) -> Iterator[Sample]:
    """Pair images with texts to samples of n = `together` images and a text, which is empty if the task reads none.

    A single image goes with each of several texts, a single text with each of several images. ConfigError if texts are
    missing, or given to a task that reads none.
    """
    if task.reads_texts == (texts is None):
        wanted = "a text for each image" if task.reads_texts else "no text"
        raise ConfigError(f"texts: the task {task.name} wants {wanted}, got {'none' if texts is None else 'texts'}")
    samples, one_sample = _samples(images, together)
    if texts is None:
        return ((sample, "") for sample in samples)
    lines, one_text = each_text(texts), isinstance(texts, str)
    if one_sample and not one_text:
        sample = next(samples)
        return ((sample, line) for line in lines)
    if one_text and not one_sample:
        return ((sample, cast(str, texts)) for sample in samples)
    return _in_pairs(samples, lines)


def _in_pairs(
    samples: Iterator[Sequence[ImageLike]], lines: Iterator[str]
) -> Iterator[tuple[Sequence[ImageLike], str]]:
    for sample, line in itertools.zip_longest(samples, lines):
        if sample is None or line is None:
            raise ConfigError(
                "texts: wanted as many texts as images, or a single image or text that is not in a list, found "
                "different numbers; pair them"
            )
        yield sample, line


def _samples(images: Strips, together: int) -> tuple[Iterator[Sequence[ImageLike]], bool]:
    """Group images into samples of n = `together`: (iterator over samples, True if one sample was given by itself).

    RunError if they do not come in groups of n.
    """
    if together == 1:
        given = cast(Images, images)
        return ((image,) for image in each_image(given)), is_single_image(given)
    if is_single_image(cast(Images, images)) or isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise RunError(f"images: wanted a list of {together} images for each text, got {shown(images)}")
    found: list[Any] = list(images)
    if found and is_single_image(found[0]):
        return iter([_whole(found, together)]), True
    return (_whole(list(strip), together) for strip in found), False


def _whole(strip: list[Any], together: int) -> list[ImageLike]:
    if len(strip) != together:
        raise RunError(f"images: wanted {together} images for each text, got {len(strip)}")
    return strip


def _strip(sample: Sequence[ImageLike], side: int, number: int) -> Tensor:
    """The n images of a sample side by side: uint8 (3, S, n S)."""
    names = [None if isinstance(image, str) or hasattr(image, "__fspath__") else f"image {number}" for image in sample]
    return torch.cat([load_image(image, side, name) for image, name in zip(sample, names, strict=True)], dim=2)


def _batch(images: Tensor, of: list[int], text: tuple[Tensor, Tensor], shares: bool) -> Batch:
    """Make a batch of B samples from their images and packed texts.

    Args:
        images: uint8 (images, 3, S, n S), each once.
        of: row of each sample's image in `images`, B numbers.
        text: tokens int64 (T,) of the B texts, and their bounds int32 (B+1,).
        shares: keep an image that several samples share once in the batch, else repeat it.
    """
    (tokens, starts), rows, image_of = text, torch.arange(len(of)), torch.tensor(of)
    shared: dict[str, Any] = {}
    if shares:
        shared = {"image_of": image_of, "caption_of": rows, "sample_tokens": len(tokens)}
    else:
        images = images.index_select(0, image_of)
    longest = int(starts.diff().max())
    return Batch(images, tokens, starts, longest, image_id=image_of, text_id=rows, sample_id=rows, **shared)
