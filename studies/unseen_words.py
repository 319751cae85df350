"""Recall of unseen concepts by what their captions say: `python studies/unseen_words.py RUN DATA`.

A model that learns from captions alone can find a new concept by words that it knows from others, as "brown circle".
It cannot know what "lobster" means if no training caption says it. So unseen concepts are counted by the words of their
captions: all are in training captions, some, or none. Flags are counted apart: their captions share "flag of", and the
rest is the name of a country.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvlm.runs.load import load_without_head
from mvlm_dataloading import Dataset, open_dataset

KINDS = ("all words known", "some words known", "no word known", "flags")
_WORD = re.compile(r"\w+")


def words_of(caption: str) -> set[str]:
    """Words of a caption in lower case, without punctuation."""
    return set(_WORD.findall(caption.lower()))


def kind_of(captions: Sequence[str], known: set[str], flag: bool = False) -> str:
    """The kind of a query with these captions: an image has all of its own, a caption is alone. The best one counts."""
    if flag:
        return KINDS[3]
    shares = [len(words & known) / max(1, len(words)) for words in map(words_of, captions)]
    return KINDS[0] if max(shares) == 1 else KINDS[1] if max(shares) > 0 else KINDS[2]


def recall_by_kind(split: Dataset, train: Dataset, ranks: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Queries of unseen concepts and their R@10 in per cent, by kind.

    Args:
        split: the images that were evaluated.
        train: the training split, whose words are known.
        ranks: those of `evaluate`.
    """
    known = {word for i in range(len(train)) for caption in train.captions(i) for word in words_of(caption)}
    captions = [split.captions(i) for i in range(len(split))]
    flat = [caption for of_image in captions for caption in of_image]
    flags = [any("flag of" in caption.lower() for caption in of_image) for of_image in captions]
    unseen, owner = ranks["unseen"] or [False] * len(split), ranks["owner"]
    queries = {
        "tr": [(i, kind_of(captions[i], known, flags[i])) for i in range(len(split)) if unseen[i]],
        "ir": [(j, kind_of([text], known, flags[owner[j]])) for j, text in enumerate(flat) if unseen[owner[j]]],
    }
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        row: dict[str, float] = {}
        for way, of_way in queries.items():
            right = [ranks[way]["itm"][i] < 10 for i, its_kind in of_way if its_kind == kind]
            row[f"{way}_queries"] = len(right)
            row[f"{way}_r10"] = round(100 * sum(right) / len(right), 1) if right else 0.0
        found[kind] = row
    return found


def main() -> None:
    """Print recall by kind, and write it as JSON where a file is named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="trained model")
    parser.add_argument("data", type=Path, help="data set with a training split")
    parser.add_argument("--split", default="test")
    parser.add_argument("--json", type=Path, help="file to write")
    options = parser.parse_args()
    split, train = open_dataset(options.data, options.split), open_dataset(options.data, "train")
    ranks = load_without_head(options.run, "cpu").evaluate(split, train).ranks
    found = recall_by_kind(split, train, ranks)
    for kind, row in found.items():
        print(
            f"{kind}: R@10 {row['tr_r10']:.1f} % of {row['tr_queries']} images, "
            f"{row['ir_r10']:.1f} % of {row['ir_queries']} captions"
        )
    if options.json:
        options.json.write_text(json.dumps({"split": options.split, "kinds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
