"""Evaluation without training: retrieval, cross-modal gain, and the trivial predictors to compare with."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mvlm.errors import RunError
from mvlm.evaluation.cross_modal_gain import cross_modal_gain, trivial_losses
from mvlm.evaluation.retrieval import (
    DIRECTIONS,
    Ranks,
    encode_split,
    find_candidates,
    rank_all,
    recall,
    recall_intervals,
)
from mvlm.evaluation.two_way import two_way_choices
from mvlm.evaluation.workspace import Workspace
from mvlm.model.maskvlm import MaskVLM
from mvlm.untrusted import read_json
from mvlm_dataloading import Dataset, Tokenizer
from mvlm_dataloading.captions import repeats

RERANK = 32
"""Candidates of each query that ITM re-ranks by default."""


TWO_WAY = {"words": "right image of a word", "cells": "right look of a cell"}
"""Labels, for printing, of the two-way choices of `mvlm.evaluation.two_way`, by their keys in the figures."""


def unseen_images(split: Dataset, train: Dataset | None) -> torch.Tensor | None:
    """True for each image of a split whose concept no training image has: bool (images of `split`,).

    The concept of an image is `base` in its metadata; an image without `base` is a concept by itself. None
    without a training split, and for data that name no concepts: no `base` in `split` or none in `train`.
    """
    if train is None:
        return None
    known = {train.metadata(i).get("base") for i in range(len(train))} - {None}
    bases = [split.metadata(i).get("base") for i in range(len(split))]
    if not known or all(base is None for base in bases):
        return None
    return torch.tensor([base not in known for base in bases])


def default_rerank(model: MaskVLM) -> int:
    """Candidates of each query for ITM to re-rank by default: none for a model that was trained without ITM."""
    return RERANK if model.matching_is_trained else 0


class Evaluation(NamedTuple):
    """Result of `TrainedModel.evaluate`."""

    figures: dict[str, Any]
    """Figures as `mvlm eval retrieval` writes them (docs/reference/files.md). Recall is in per cent, re-ranked by ITC
    and ITM together unless under `itc` or `itm`; re-ranked recall has 95 % intervals."""
    ranks: dict[str, Any]
    """Rank of each query's best right answer as lists, from which all recalls follow.

    `tr` (image to text) and `ir` (text to image) each have the fields `itc`, `itm` and `itm_alone` of `Ranks`. `owner`
    is the image of each caption. `unseen` is true for each image of an unseen concept, or None where none is known.
    """


def evaluate(
    model: MaskVLM,
    split: Dataset,
    train: Dataset | None,
    tokenizer: Tokenizer,
    k: int,
    precision: str,
    workspace: Workspace,
    edits: Dataset | None = None,
) -> Evaluation:
    """Evaluate a network in evaluation mode. `TrainedModel.evaluate` explains the arguments; all ranks get the same.

    With `k` = 0 all recalls are by ITC, and `itm` is None. Without `edits` there are no `two_way` choices.
    """
    started = time.perf_counter()
    features = encode_split(model, split, tokenizer, precision, workspace)
    tr, ir = rank_all(model, features, k, precision, workspace=workspace, answers=False).values()
    unseen, images = unseen_images(split, train), features.different
    unseen = None if unseen is None else unseen[images]
    owner = torch.searchsorted(images, features.owner)  # among the different images
    figures = {
        **_recall_of_images(torch.ones(len(images), dtype=torch.bool), tr, ir, owner, k),
        "unseen": None if unseen is None or not unseen.any() else _recall_of_images(unseen, tr, ir, owner, k),
        "reranked": min(k, len(images)),
        "repeats": repeats(features.words, features.owner)._asdict(),
        **cross_modal_gain(model, split, features, tokenizer, precision=precision, workspace=workspace),
        **trivial_losses(model, train, split, tokenizer, workspace=workspace),
        **({} if edits is None else {"two_way": two_way_choices(model, edits, tokenizer, precision, workspace)}),
        "seconds": round(time.perf_counter() - started, 1),
    }
    kinds = "itc", "itm", "itm_alone"
    ranks: dict[str, Any] = {
        name: {kind: getattr(r, kind).tolist() for kind in kinds} for name, r in (("tr", tr), ("ir", ir))
    }
    ranks |= {"owner": owner.tolist(), "unseen": None if unseen is None else unseen.tolist()}
    return Evaluation(figures, ranks)


def _recall_of_images(chosen: torch.Tensor, tr: Ranks, ir: Ranks, owner: torch.Tensor, k: int) -> dict[str, Any]:
    """Recall of the queries that are among some images and their captions; all images and captions are the gallery.

    Args:
        chosen: bool (images,), True = the image and its captions are queries.
        tr, ir: ranks from image to text and from text to image.
        owner: int64 (captions,), image of each caption.
        k: candidates that ITM has re-ranked; 0: none.
    """
    texts = chosen[owner]
    return {
        "tr": recall(tr.itm[chosen]),
        "ir": recall(ir.itm[texts]),
        "tr_95": recall_intervals(tr.itm[chosen], chosen.nonzero()[:, 0]),
        "ir_95": recall_intervals(ir.itm[texts], owner[texts]),
        "n_images": int(chosen.sum()),
        "n_texts": int(texts.sum()),
        "itc": {"tr": recall(tr.itc[chosen]), "ir": recall(ir.itc[texts])},
        "itm": {"tr": recall(tr.itm_alone[chosen]), "ir": recall(ir.itm_alone[texts])} if k else None,
    }


def evaluate_briefly(
    model: MaskVLM,
    split: Dataset,
    tokenizer: Tokenizer,
    precision: str = "auto",
    workspace: Workspace | None = None,
    gains: bool = True,
) -> dict[str, float]:
    """Figures during training: recall by only ITC (tr_r1 to ir_r10), and cross-modal gain from one draw of masks.

    Without `gains` there is recall alone. The model's mode (training or evaluation) is restored. EvaluationStopped if
    the workspace asks for an early end.
    """
    workspace = workspace or Workspace()
    was_training = model.training
    model.eval()
    try:
        features = encode_split(model, split, tokenizer, precision, workspace)
        found = {}
        for direction in DIRECTIONS:
            ranks = find_candidates(features, direction, 1, workspace, torch.device("cpu")).ranks.tensor
            found |= {f"{direction}_{name}": value for name, value in recall(ranks).items()}
        if gains:
            gain = cross_modal_gain(model, split, features, tokenizer, 1, precision, workspace)
            found |= {name: gain[name] for name in ("gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1")}
    finally:
        model.train(was_training)
    return found


@contextmanager
def figures_of(file: Path, command: str = "mvlm eval retrieval") -> Iterator[dict[str, Any]]:
    """Context with the figures of an evaluation, read from the JSON file that `command` wrote.

    Raises:
        RunError: there is no such file, it is something else, or it lacks a figure that is read inside the `with`
            block.
    """
    if not file.exists():
        raise RunError(f"{file}: wanted the run's evaluation, found none; first run `{command}`")
    found = read_json(file, "figures", f"the figures that `{command}` writes")
    try:
        yield found
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, ZeroDivisionError, RecursionError) as error:
        raise RunError(
            f"{file}: wanted the figures that `{command}` writes, got {error!r}; evaluate the run again"
        ) from None


def recall_rows(figures: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], str, list[str]]]:
    """Yield the rows of the table of recall: name of the queries, their figures, method of ranking, and six cells.

    The cells are R@1, R@5 and R@10 from image to text, then from text to image, in per cent.
    """
    for queries, part in (("all", figures), ("unseen concepts", figures["unseen"])):
        if part is not None:
            ways = [("re-ranked by ITC + ITM", part), ("by ITM alone", part.get("itm")), ("ITC alone", part["itc"])]
            for how, found in ways if figures.get("reranked") != 0 else ways[2:]:  # without ITM all ranks are ITC's
                if found is not None:  # a file of an earlier version has no ranks by ITM alone
                    cells = [f"{found[way][r]:.1f}" for way in DIRECTIONS for r in ("r1", "r5", "r10")]
                    yield queries, part, how, cells


def format_table(figures: dict[str, Any]) -> str:
    """Recall, cross-modal gain and masked losses, as `mvlm eval retrieval` prints them."""
    lines = [f"{'':<38}  image to text          text to image", f"{'':<38}" + "    R@1    R@5   R@10 " * 2]
    intervals = {}
    for queries, part, how, cells in recall_rows(figures):
        images = part["n_images"]
        name = (
            f"all {images} images, {part['n_texts']} captions" if part is figures else f"{images} images of {queries}"
        )
        row = "".join(f"{cell:>7}" for cell in cells)
        lines.append(f"{name + ', ' + how:<38}{row}" if len(name + how) < 36 else f"{name}, {how}\n{'':<38}{row}")
        ends = {way: "{:.1f} to {:.1f}".format(*part[f"{way}_95"]["r1"]) for way in DIRECTIONS}
        intervals[name] = f"R@1 of {name}, 95 %: {ends['tr']} image to text, {ends['ir']} text to image"
    lines += [*intervals.values(), *describe_repeats(figures)]
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    lines += [
        f"cross-modal gain, text     {figures['gain_text_nats']:.2f} nats per token "
        f"(95 %: {text[0]:.2f} to {text[1]:.2f})",
        f"cross-modal gain, pixels   {figures['gain_pixels_pct']:.2f} % (95 %: {pixels[0]:.2f} to {pixels[1]:.2f})",
        *(f"{what:<27}{found}; {baseline}" for what, found, baseline in describe_reading(figures)),
        f"masked L1                  {figures['masked_l1']:.4f}; {describe_trivial_losses(figures)}",
        f"masked tokens              {figures['masked_nats']:.3f} nats per token",
    ]
    return "\n".join(lines)


def describe_repeats(figures: dict[str, Any]) -> list[str]:
    """A list with one sentence on captions that several images have; empty if there are none, or none are counted."""
    found = figures.get("repeats")
    if not found or not found["captions"]:
        return []
    return [
        f"{found['captions']} of {figures['n_texts']} captions have the words of another image's caption. Equal words "
        f"are one answer; if only exact pairs were right, R@1 could be at most {found['image_to_text']:.1f} % image to "
        f"text and {found['text_to_image']:.1f} % text to image."
    ]


def describe_reading(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Figures that show whether a model uses one modality to predict the other: (name, figure, baseline), as texts.

    They are the cross-modal gain of MIM's loss, which files of earlier versions lack, and two-way choices if the data
    have edited images.
    """
    found = []
    if "gain_mim_pct" in figures:
        own, untrained = (
            "{:.2f} % (95 %: {:.2f} to {:.2f})".format(figures[name], *figures[f"{name}_95"])
            for name in ("gain_mim_pct", "gain_untrained_pct")
        )
        found.append(("cross-modal gain, MIM", own, f"untrained pixel head {untrained}"))
    choices = figures.get("two_way") or {}
    for name, question in TWO_WAY.items():
        if choices.get(f"{name}_pct") is not None:
            ends = "{:.1f} to {:.1f}".format(*choices[f"{name}_pct_95"])
            found.append((question, f"{choices[f'{name}_pct']:.1f} % (95 %: {ends})", "chance 50 %"))
    return found


def describe_trivial_losses(figures: dict[str, Any]) -> str:
    """Masked L1 of the image-blind predictors, in words; the median is missing where the data have no train split."""
    median = figures["masked_l1_train_median"]
    white = f"constant white {figures['masked_l1_white']:.4f}"
    return white if median is None else f"{white}, training median {median:.4f}"
