"""Evaluation without training: retrieval, cross-modal gain, and the trivial predictors to compare with."""

import time
from typing import Any, NamedTuple

import torch

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
from mvlm.evaluation.workspace import Workspace
from mvlm.model.maskvlm import MaskVLM
from mvlm_dataloading import Dataset, Tokenizer

RERANK = 32
"""Candidates of each query that ITM re-ranks by default."""


def unseen_images(split: Dataset, train: Dataset | None) -> torch.Tensor | None:
    """Images of unseen concepts, bool (images of `split`,), True = no training image has the same concept.

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
    """The rank of each query as lists, of which all recalls are made: `tr` and `ir`, each with the fields `itc`, `itm`
    and `itm_alone` of `Ranks`; `owner`, the image of each caption; and `unseen`, for each image, None where nothing is
    known."""


def evaluate(
    model: MaskVLM,
    split: Dataset,
    train: Dataset | None,
    tokenizer: Tokenizer,
    k: int,
    precision: str,
    workspace: Workspace,
) -> Evaluation:
    """Evaluate a network in evaluation mode. `TrainedModel.evaluate` explains the arguments; all ranks get the same.

    With `k` = 0 all recalls are by ITC, and `itm` is None.
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
        **cross_modal_gain(model, split, features, tokenizer, precision=precision, workspace=workspace),
        **trivial_losses(model, train, split, tokenizer, workspace=workspace),
        "seconds": round(time.perf_counter() - started, 1),
    }
    kinds = "itc", "itm", "itm_alone"
    ranks: dict[str, Any] = {
        name: {kind: getattr(r, kind).tolist() for kind in kinds} for name, r in (("tr", tr), ("ir", ir))
    }
    ranks |= {"owner": owner.tolist(), "unseen": None if unseen is None else unseen.tolist()}
    return Evaluation(figures, ranks)


def _recall_of_images(chosen: torch.Tensor, tr: Ranks, ir: Ranks, owner: torch.Tensor, k: int) -> dict[str, Any]:
    """Recall for the queries among the images `chosen`, bool (images,), and their captions, in the full gallery."""
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
) -> dict[str, float]:
    """Figures during training: recall by only ITC (tr_r1 to ir_r10), and cross-modal gain from one draw of masks.

    The model's mode (training or evaluation) is restored. EvaluationStopped if the workspace asks for an early end.
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
        gain = cross_modal_gain(model, split, features, tokenizer, 1, precision, workspace)
    finally:
        model.train(was_training)
    found |= {name: gain[name] for name in ("gain_text_nats", "gain_pixels_pct", "masked_nats", "masked_l1")}
    return found


def format_table(figures: dict[str, Any]) -> str:
    """Recall, cross-modal gain and masked losses, as `mvlm eval retrieval` prints them."""
    parts = [(f"all {figures['n_images']} images, {figures['n_texts']} captions", figures)]
    if figures["unseen"]:
        parts.append((f"{figures['unseen']['n_images']} images of unseen concepts", figures["unseen"]))
    lines = [f"{'':<38}  image to text          text to image", f"{'':<38}" + "    R@1    R@5   R@10 " * 2]
    for name, part in parts:
        ways = [("re-ranked by ITC + ITM", part), ("by ITM alone", part["itm"]), ("ITC alone", part["itc"])]
        for how, found in ways if part["itm"] else ways[2:]:  # without ITM all ranks are ITC's
            cells = "".join(
                "".join(f"{found[direction][r]:7.1f}" for r in ("r1", "r5", "r10")) for direction in ("tr", "ir")
            )
            lines.append(
                f"{name + ', ' + how:<38}{cells}" if len(name + how) < 36 else f"{name}, {how}\n{'':<38}{cells}"
            )
    lines += [_describe_intervals(name, part) for name, part in parts]
    text, pixels = figures["gain_text_nats_95"], figures["gain_pixels_pct_95"]
    lines += [
        f"cross-modal gain, text     {figures['gain_text_nats']:.2f} nats per token "
        f"(95 %: {text[0]:.2f} to {text[1]:.2f})",
        f"cross-modal gain, pixels   {figures['gain_pixels_pct']:.2f} % (95 %: {pixels[0]:.2f} to {pixels[1]:.2f})",
        f"masked L1                  {figures['masked_l1']:.4f}; {describe_trivial_losses(figures)}",
        f"masked tokens              {figures['masked_nats']:.3f} nats per token",
    ]
    return "\n".join(lines)


def _describe_intervals(name: str, part: dict[str, Any]) -> str:
    """95 % intervals of the R@1 of one group of images, in words."""
    ends = {way: "{:.1f} to {:.1f}".format(*part[f"{way}_95"]["r1"]) for way in ("tr", "ir")}
    return f"R@1 of {name}, 95 %: {ends['tr']} image to text, {ends['ir']} text to image"


def describe_trivial_losses(figures: dict[str, Any]) -> str:
    """Masked L1 of the image-blind predictors, in words; the median is missing where the data have no train split."""
    median = figures["masked_l1_train_median"]
    white = f"constant white {figures['masked_l1_white']:.4f}"
    return white if median is None else f"{white}, training median {median:.4f}"
