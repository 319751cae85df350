"""Views: data sets that refer to the tars of others, and hold nothing but indices of their own.

DALI's reader obeys the lines of an index in any order, in any subset and with repetitions. So a selection, a mixture or
a repetition of what is there costs some hundred bytes a sample, and no tar is written again.

    VIEW/dataset.json        as of any data set; a shard names its tar by a relative path, and its index beside it
    VIEW/train-000000.idx    the lines of the samples that were chosen
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.duplicates import Facts, any_size, collect, facts_of, find_duplicates, find_leaks
from mvlm_dataloading.build.shard_writer import index_text
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import (
    FORMAT_VERSION,
    read_description,
    refuse_occupied,
    shard_files,
    write_durably,
)
from mvlm_dataloading.dataset.open import open_dataset
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import Choice
from mvlm_dataloading.sources.record import EVALUATION_SPLITS

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Row:
    """A sample that is being judged."""

    source: int
    dataset: Dataset
    number: int
    facts: Facts


def make_view(
    out: Path, sources: Sequence[Path], choice: Choice | None = None, *, weights: Sequence[float] = ()
) -> dict[str, Any]:
    """Write a view of one or more data sets, which `open_dataset` opens like any other.

    Training pictures that are in an evaluation split of any of the sources are left out, also where the view takes
    nothing of that split.

    Args:
        weights: how often an epoch has each training sample of each source, 1 when not given. 0.5 takes half of them,
            2.5 has each twice and half of them once more. Evaluation samples come once.

    Returns:
        The description.

    Raises:
        DataError: a source is damaged or has none of the splits, `out` is in use, or nothing is left.
    """
    choice = choice or Choice()
    choice.check()
    out = Path(out).resolve()
    weights = [float(weight) for weight in weights or [1.0] * len(sources)]
    if not sources or len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights: wanted a number above 0 for each of {len(sources)} sources, got {weights}")
    refuse_occupied(out)
    rows, held, reasons = _judge(sources, choice)
    pictures = collect((str(r.dataset.keys[r.number]), r.dataset.split, r.facts) for r in rows)
    dropped: dict[int, str] = {}
    for _ in find_leaks(pictures, [collect(held)], dropped):
        pass
    near = choice.duplicates == "near"
    for _ in find_duplicates(pictures, dropped, drop=near or choice.duplicates == "exact", drop_near=near):
        pass
    reasons += Counter(dropped.values())
    kept = [row for i, row in enumerate(rows) if i not in dropped]
    partial = out.with_name(f".{out.name}.view")  # not `.partial`, which a build that was killed goes on from
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        splits = _write_indices(partial, out, kept, choice, weights)
        if not splits:
            raise DataError(f"{out}: wanted at least one sample in the view, found none; left out: {dict(reasons)}")
        description = _describe(partial, sources, weights, choice, splits, reasons)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return description


def _judge(sources: Sequence[Path], choice: Choice) -> tuple[list[_Row], list[tuple[str, str, Facts]], Counter[str]]:
    """What is chosen, the evaluation pictures that are not (key, split, facts), and why samples are left out."""
    decoder = any_size()
    rows: list[_Row] = []
    held: list[tuple[str, str, Facts]] = []
    reasons: Counter[str] = Counter()
    known = {split for source in sources for split in read_description(Path(source))["splits"]}
    if missing := sorted(set(choice.splits) - known):
        raise DataError(f"splits: wanted some of {', '.join(sorted(known))}, got {', '.join(missing)}")
    for number, source in enumerate(sources):
        for split in read_description(Path(source))["splits"]:
            chosen, evaluation = not choice.splits or split in choice.splits, split in EVALUATION_SPLITS
            if not chosen and not evaluation:
                continue
            dataset = open_dataset(source, split)
            for i in range(len(dataset)):
                facts = facts_of(dataset, i, decoder)
                reason = _reason_against(facts, dataset.captions(i), choice) if chosen else None
                if reason is None and not evaluation and _draw(choice, "", dataset, i) >= choice.fraction:
                    reason = "not in the fraction"
                if chosen and reason is None:
                    rows.append(_Row(number, dataset, i, facts))
                    continue
                if evaluation:  # others are evaluated on it all the same: it stays out of train
                    held.append((str(dataset.keys[i]), split, facts))
                if reason is not None:
                    reasons[reason] += 1
    return rows, held, reasons


def _reason_against(facts: Facts, captions: list[str], choice: Choice) -> str | None:
    short, long = sorted((facts.width, facts.height))
    words = [len(caption.split()) for caption in captions]
    if short < choice.min_side:
        return "image is too small"
    if long > choice.max_aspect * short:
        return "image is too long and thin"
    if min(words) < choice.min_words:
        return "caption is too short"
    if max(words) > choice.max_words:
        return "caption is too long"
    if choice.match is not None and not any(re.search(choice.match, caption) for caption in captions):
        return "no caption matches"
    if choice.without is not None and any(re.search(choice.without, caption) for caption in captions):
        return "a caption matches"
    return None


def _draw(choice: Choice, purpose: str, dataset: Dataset, i: int) -> float:
    """A number in [0, 1) that depends on the seed and the key, and on how many views the data have come through.

    Else all that a view has taken by a share would be within the same share again.
    """
    depth = _depth(dataset.description)
    told = f"{choice.seed} {purpose} {dataset.keys[i]}" + (f" {depth}" if depth else "")
    digest = hashlib.sha256(told.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _depth(description: dict[str, Any]) -> int:
    """How many views lie one on another; 0 for a data set that has tars of its own."""
    return description.get("recipe", {}).get("view", {}).get("depth", 0)


def _write_indices(
    folder: Path, out: Path, rows: list[_Row], choice: Choice, weights: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """An index for each tar that a chosen sample is in. Rows come by source, split, and tar."""
    splits: dict[str, dict[str, Any]] = {}
    at = 0
    while at < len(rows):
        source, dataset, shard = rows[at].source, rows[at].dataset, int(rows[at].dataset.shard[rows[at].number])
        begin, end = at, at
        while end < len(rows) and rows[end].dataset is dataset and dataset.shard[rows[end].number] == shard:
            end += 1
        known = dataset.description["splits"][dataset.split]["shards"][shard]
        tar, index = shard_files(dataset.folder, known)
        lines = index.read_text(encoding="utf-8", errors="surrogateescape").splitlines()[1:]
        first = int((dataset.shard < shard).sum())
        chosen, captions = [], 0
        for row in rows[begin:end]:
            copies = 1
            if dataset.split not in EVALUATION_SPLITS:
                whole, part = divmod(weights[source], 1.0)
                copies = int(whole) + (_draw(choice, "weight", dataset, row.number) < part)
            chosen += [lines[row.number - first]] * copies
            captions += len(dataset.captions(row.number)) * copies
        at = end
        if not chosen:
            continue
        entry = splits.setdefault(dataset.split, {"samples": 0, "captions": 0, "shards": []})
        name = f"{dataset.split}-{len(entry['shards']):06d}.idx"
        content = index_text(chosen).encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(content)
        entry["shards"].append(
            {
                "tar": os.path.relpath(tar.parent.resolve() / tar.name, out),
                "index": name,
                "samples": len(chosen),
                "bytes": known["bytes"],
                "sha256": known["sha256"],
                "index_sha256": hashlib.sha256(content).hexdigest(),
            }
        )
        entry["samples"] += len(chosen)
        entry["captions"] += captions
    return dict(sorted(splits.items()))


def _describe(
    folder: Path,
    sources: Sequence[Path],
    weights: Sequence[float],
    choice: Choice,
    splits: dict[str, dict[str, Any]],
    reasons: Counter[str],
) -> dict[str, Any]:
    known = [read_description(Path(source)) for source in sources]

    def joined(name: str) -> str:
        return "; ".join(dict.fromkeys(str(one.get(name) or "") for one in known))

    def common(name: str) -> Any:
        """What all sources say, or None where they disagree."""
        return known[0].get(name) if all(one.get(name) == known[0].get(name) for one in known) else None

    recipe = {**asdict(choice), "sources": [one.get("name") for one in known], "weights": list(weights)}
    recipe["depth"] = 1 + max(map(_depth, known))
    if recipe["max_aspect"] == float("inf"):
        recipe["max_aspect"] = None  # JSON has no infinity
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": "view of " + joined("name"),
        "source": joined("source"),
        "licence": joined("licence"),
        "attribution": joined("attribution"),
        "recipe": {"view": recipe},
        "splits": splits,
        "tokenizer": common("tokenizer"),
        "rejected": dict(sorted(reasons.items())),
    }
    if description["tokenizer"] is not None:
        shutil.copyfile(Path(sources[0]) / "tokenizer.json", folder / "tokenizer.json")
    if common("tokens") is not None:
        description["tokens"] = common("tokens")
    write_durably(folder / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    return description
