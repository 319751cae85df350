"""Cloze test for the objects of scenes: `python studies/name_probe.py SCENES RUN`.

All tokens of an object's name are masked in the caption that lists a scene's objects. The model names the object if it
predicts each of them, given the image and the rest of the caption. Objects that are there once are asked for.

Shape legend: B images, R captions with a masked name, T packed tokens, M masked tokens.
"""

import argparse
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mvlm.device import autocast
from mvlm.inference.encode import eval_loader, image_features
from mvlm.inference.trained_model import TrainedModel
from mvlm.model.packing import mask_tokens
from mvlm.runs.load import load_without_head
from mvlm_dataloading import Dataset, Tokenizer, open_dataset

NOUN, SHAPE = "nouns", "coloured shapes"


class Cloze(NamedTuple):
    """A caption whose tokens `name` are to be masked."""

    kind: str
    tokens: list[int]
    """The caption's tokens, [CLS] and [SEP] included."""
    name: range
    """Positions of the name's tokens."""


def clozes(scene: dict[str, Any], caption: str, tokenizer: Tokenizer, length: int) -> list[Cloze]:
    """A cloze for each object that is in the scene once, and its name in the caption.

    Names that truncation cuts are left out.
    """
    tokens = tokenizer.encode([caption], length)[0].tolist()
    words = tokenizer.words(caption)
    spelt = [word.removesuffix(",") for word, _, _ in words]
    kinds = Counter((one["colour"], one["name"]) for one in scene["objects"])
    found = []
    for one in scene["objects"]:
        parts = f"{one['colour'] or ''} {one['name']}".split()
        places = [i for i in range(len(words)) if spelt[i : i + len(parts)] == parts]
        if one.get("hidden") or kinds[one["colour"], one["name"]] > 1 or len(places) != 1:  # "two squid" are two
            continue
        last = words[places[0] + len(parts) - 1]
        name = range(1 + words[places[0]][1], 1 + last[2] - last[0].endswith(","))
        if name.stop < len(tokens):
            found.append(Cloze(SHAPE if one["colour"] else NOUN, tokens, name))
    return found


class Answer(NamedTuple):
    """A model's prediction of a masked name."""

    tokens: int
    """Number of the name's tokens."""
    right: bool
    """True if all of them are predicted."""


@torch.no_grad()
def answers(model: TrainedModel, scenes: Dataset) -> dict[str, list[Answer]]:
    """The model's answers for all objects of a split, by their kind."""
    network, tokenizer = model.network, model.tokenizer
    found: dict[str, list[Answer]] = defaultdict(list)
    start = 0
    for batch, _ in eval_loader(scenes, network, tokenizer):
        samples = range(start, start := start + len(batch.images))
        asked = [
            (image, cloze)
            for image, i in enumerate(samples)
            for cloze in clozes(
                scenes.metadata(i)["scene"], scenes.captions(i)[0], tokenizer, network.config.text_length
            )
        ]
        if not asked:
            continue
        of = torch.tensor([image for image, _ in asked])  # (R,)
        tokens = torch.tensor([token for _, cloze in asked for token in cloze.tokens])  # (T,)
        bounds = np.cumsum([0, *(len(cloze.tokens) for _, cloze in asked)])
        pairs = list(zip(bounds.tolist(), (cloze for _, cloze in asked), strict=False))
        masked = torch.tensor([begin + i for begin, cloze in pairs for i in cloze.name])  # (M,)
        hidden = mask_tokens(tokens, masked, network.config.mask_token_id)
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        v = image_features(network, batch.images, model.precision).v[of]
        with autocast(model.device, model.precision):
            text = network.encode_text_packed(hidden, cu_seqlens, int(np.diff(bounds).max()))
            logits = network.fill_mask(v, *text.padded(), cu_seqlens, masked)
        right, at = (logits.argmax(1) == tokens[masked]).tolist(), 0
        for _, cloze in asked:
            found[cloze.kind].append(Answer(len(cloze.name), all(right[at : at + len(cloze.name)])))
            at += len(cloze.name)
    return found


def main() -> None:
    """Print the share of objects that each model names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenes", type=Path, help="data set of scenes with captions, such as data/scenes/caption")
    parser.add_argument("runs", type=Path, nargs="+", help="trained models")
    parser.add_argument("--split", default="test")
    options = parser.parse_args()
    scenes = open_dataset(options.scenes, options.split)
    for run in options.runs:
        for kind, given in sorted(answers(load_without_head(run, "cpu"), scenes).items()):
            share = 100 * sum(one.right for one in given) / len(given)
            tokens = sum(one.tokens for one in given) / len(given)
            print(f"{run}: names {share:.1f} % of {len(given)} {kind}, of {tokens:.1f} tokens each")


if __name__ == "__main__":
    main()
