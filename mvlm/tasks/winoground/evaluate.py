"""Text, image and group score of a model on Winoground, by ITC, by ITM, and by both together.

Shape legend: n examples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvlm.device import chosen_precision
from mvlm.inference.encode import image_features, match_log_odds, text_features
from mvlm.inference.texts import checked_texts
from mvlm.inference.trained_model import TrainedModel
from mvlm.tasks.metrics.pairs import winoground_figures
from mvlm.tasks.metrics.significance import grouped_bootstrap
from mvlm.tasks.winoground.read import Example

EXAMPLES_AT_A_TIME = 32
CHANCE = {"text_score": 25.0, "image_score": 25.0, "group_score": 100 / 6}
"""Scores of random numbers without ties, in per cent: of the 24 orders of four scores, 6, 6 and 4 are right."""


def pair_scores(model: TrainedModel, examples: Sequence[Example], truncate: bool = False) -> dict[str, Tensor]:
    """Scores of each caption with each image, float64 (n, 2 captions, 2 images) on the CPU, by three judges.

    `itc` is the contrastive logit, `itm` the log-odds of a match, `both` their sum, by which retrieval ranks. A model
    that was trained without ITM has no `itm`, and `both` is `itc`.

    Raises:
        RunError: an image cannot be used.
        ConfigError: a caption has more tokens than the model takes, and `truncate` is False.
    """
    network, parts = model.network, []
    length, scale = network.config.text_length, network.log_scale.exp().item()
    for start in range(0, len(examples), EXAMPLES_AT_A_TIME):
        some = examples[start : start + EXAMPLES_AT_A_TIME]
        texts = [caption for example in some for caption in example.captions]
        texts = checked_texts(texts, model.tokenizer, length, truncate, first=2 * start)
        pixels = torch.cat(list(model.pixel_batches([path for example in some for path in example.images], len(texts))))
        image = image_features(network, pixels, model.precision)
        text = text_features(network, texts, model.tokenizer, model.precision)
        own = 2 * torch.arange(len(some))[:, None, None]
        images = (own + torch.arange(2)[None, None, :]).expand(-1, 2, 2).flatten()  # caption by caption, image by image
        captions = (own + torch.arange(2)[None, :, None]).expand(-1, 2, 2).flatten()
        embeddings = image.embedding.double().cpu()[images] * text.embedding.double().cpu()[captions]
        found = {"itc": scale * embeddings.sum(-1)}
        if network.matching_is_trained:
            odds = match_log_odds(network, image.v, text.w, images, captions, model.precision)
            found["itm"] = odds.cpu().double()
        parts.append(found)
    scores = {name: torch.cat([part[name] for part in parts]).view(-1, 2, 2) for name in parts[0]}
    return {"both": torch.stack(list(scores.values())).sum(0), **scores}


def evaluate_winoground(
    model: TrainedModel, examples: Sequence[Example], truncate: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures in per cent, and a record {id, scores} for each example. Errors are those of `pair_scores`.

    Figures are those of ITC and ITM together, with 95 % intervals over examples; `itc` and `itm` have those of either
    alone, `by_tag` those of each kind of exchange. Without ITM all are those of ITC, and `itm` is None.
    """
    scores = {name: found.tolist() for name, found in pair_scores(model, examples, truncate).items()}
    figures: dict[str, Any] = {"examples": len(examples), **winoground_figures(scores["both"])}
    each = [winoground_figures([one]) for one in scores["both"]]
    for name in CHANCE:
        low, high = grouped_bootstrap([one[name] for one in each], range(len(each)))
        figures[f"{name}_95"] = [low, high]
    alone = {name: winoground_figures(scores[name]) if name in scores else None for name in ("itc", "itm")}
    figures |= {"chance": CHANCE, **alone}
    tags = sorted({example.tag for example in examples if example.tag})
    rows = {tag: [s for s, example in zip(scores["both"], examples, strict=True) if example.tag == tag] for tag in tags}
    figures["by_tag"] = {tag: {"examples": len(found), **winoground_figures(found)} for tag, found in rows.items()}
    figures |= {"model": model.sha256, "precision": chosen_precision(model.device, model.precision)}
    none = [None] * len(examples)
    judges = [scores.get(name, none) for name in ("both", "itc", "itm")]
    rows = zip(examples, *judges, strict=True)
    records = [{"id": e.id, "both": joined, "itc": itc, "itm": itm} for e, joined, itc, itm in rows]
    return figures, records
