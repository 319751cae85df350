"""Views: data sets that store only indices, and refer to the tars of other data sets.

DALI's reader accepts the lines of an index in any order, in any subset and repeated. A selection, mixture or repetition
therefore takes some hundred bytes per sample, and no tar is rewritten.

    VIEW/dataset.json        as in any data set; a shard has the relative path of its tar, and the name of its index
    VIEW/train-000000.idx    the lines of the chosen samples
    VIEW/train.index         the index of the view
"""

import hashlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mvlm_dataloading.build.duplicates import ImageFacts, drop_leaks, drop_repeats, image_facts
from mvlm_dataloading.build.image_check import size_fault
from mvlm_dataloading.dataset.dali_index import format_index
from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import (
    add_shard,
    read_description,
    require_free_folder,
    shard_paths,
    write_description,
)
from mvlm_dataloading.dataset.open import is_linked, open_dataset, write_index
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import new_folder
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.options import ViewOptions
from mvlm_dataloading.sources.record import is_evaluation
from mvlm_dataloading.untrusted import read_regular

from .view_links import caption_fault, depth_of, hash_share, view_links

log = logging.getLogger(__name__)

_QUESTIONS = {"question_id", "pairID", "identifier"}
"""Names of metadata fields by which a sample of a task is recognised: of VQA v2, of SNLI-VE and of NLVR2."""


@dataclass(slots=True)
class _Row:
    """A sample that a view has chosen: number of its source, data set and id there, size and hashes of its image."""

    source: int
    dataset: Dataset
    number: int
    facts: ImageFacts


def make_view(
    out: Path, sources: Sequence[Path], options: ViewOptions | None = None, *, weights: Sequence[float] = ()
) -> dict[str, Any]:
    """Write a view of one or more data sets. `open_dataset` opens it like any other data set.

    Training images that are in an evaluation split of any source are dropped, even if the view leaves that split out,
    unless the options keep them.

    Args:
        weights: number of copies per epoch of each source's training samples, 1 by default. 0.5 takes half of them;
            2.5 takes each twice, and half of them once more. Evaluation samples are always taken once.

    Returns:
        The description.

    Raises:
        DataError: a source is damaged or lacks a split, `out` is in use, no sample is left, or duplicates of questions
            are to be left out.
    """
    options = options or ViewOptions()
    options.check()
    out = Path(out).resolve()
    weights = [float(weight) for weight in weights or [1.0] * len(sources)]
    if not sources or len(weights) != len(sources) or not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights: wanted a number above 0 for each of {len(sources)} sources, got {weights}")
    if len({Path(source).resolve() for source in sources}) < len(sources):
        raise DataError("sources: wanted each data set once, got one twice; --weights makes copies of training samples")
    require_free_folder(out)
    if any(is_linked(read_description(Path(source))) for source in sources):
        return view_links(out, [Path(source) for source in sources], options, weights)
    if options.duplicates != "keep" and (asking := [source for source in sources if _asks(source)]):
        raise DataError(
            f"duplicates: wanted data sets with a sample per image, got one of questions, {asking[0]}; leave the "
            "option out"
        )
    rows, evaluation, reasons = _select(sources, options)
    images = [row.facts for row in rows]
    dropped: dict[int, str] = {}
    if options.leaks == "drop":
        drop_leaks(images, evaluation, dropped)
    if options.duplicates != "keep":
        drop_repeats(images, dropped, drop=True, drop_near=options.duplicates == "near")
    for i, row in enumerate(rows):  # last: a share of what is left, of which a smaller one is a part
        train = i not in dropped and not is_evaluation(row.dataset.split)
        if train and hash_share(options, "", row.dataset, row.number) >= options.fraction:
            dropped[i] = "not in the fraction"
    reasons += Counter(dropped.values())
    kept = [row for i, row in enumerate(rows) if i not in dropped]
    # Not aside as `.partial`, which may be an unfinished build.
    with new_folder(out, out.with_name(f".{out.name}.view")) as partial:
        splits = _write_indices(partial, out, kept, options, weights)
        if not splits:
            raise DataError(f"{out}: wanted at least one sample in the view, found none; left out: {dict(reasons)}")
        known = [read_description(Path(source)) for source in sources]
        about = {
            name: "; ".join(dict.fromkeys(str(one.get(name) or "") for one in known))
            for name in ("name", "source", "licence", "attribution")
        }
        about["name"] = f"view of {about['name']}"
        recipe = {**asdict(options), "sources": [one.get("name") for one in known], "weights": weights}
        recipe["depth"] = 1 + max(map(depth_of, known))
        if recipe["max_aspect"] == float("inf"):
            recipe["max_aspect"] = None  # JSON has no infinity
        stored = {
            name: known[0].get(name) if all(one.get(name) == known[0].get(name) for one in known) else None
            for name in ("tokenizer", "tokens")
        }
        if stored["tokenizer"] is not None:
            shutil.copyfile(Path(sources[0]) / "tokenizer.json", partial / "tokenizer.json")
        description = write_description(partial, about, {"view": recipe}, splits, reasons, **stored)
        for split in splits:
            write_index(partial, split)
    return description


def _asks(source: Path) -> bool:
    """True for a data set of a task's questions, hypotheses or statements, where several samples may have one image."""
    for split in read_description(Path(source))["splits"]:
        dataset = open_dataset(source, split)
        if len(dataset) and not _QUESTIONS.isdisjoint(dataset.metadata(0)):
            return True
    return False


def _select(sources: Sequence[Path], options: ViewOptions) -> tuple[list[_Row], list[ImageFacts], Counter[str]]:
    """Select samples by all options but `leaks`, `duplicates` and `fraction`.

    Returns the samples; the images of evaluation splits that are not among them, which still exclude training images;
    and the number of rejected samples by reason.
    """
    decoder = ImageDecoder()
    rows: list[_Row] = []
    evaluation: list[ImageFacts] = []
    reasons: Counter[str] = Counter()
    known = {split for source in sources for split in read_description(Path(source))["splits"]}
    if missing := sorted(set(options.splits) - known):
        raise DataError(f"splits: wanted some of {', '.join(sorted(known))}, got {', '.join(missing)}")
    for number, source in enumerate(sources):
        for split in read_description(Path(source))["splits"]:
            wanted, evaluates = not options.splits or split in options.splits, is_evaluation(split)
            if not wanted and not evaluates:
                continue
            dataset = open_dataset(source, split)
            for i in range(len(dataset)):
                facts = image_facts(dataset, i, decoder)
                reason = _rejection(facts, dataset.captions(i), options) if wanted else None
                if wanted and reason is None:
                    rows.append(_Row(number, dataset, i, facts))
                    continue
                if evaluates:  # not in this view, but still an evaluation image, so it must stay out of train
                    evaluation.append(facts)
                if reason is not None:
                    reasons[reason] += 1
    return rows, evaluation, reasons


def _rejection(facts: ImageFacts, captions: list[str], options: ViewOptions) -> str | None:
    return size_fault(facts.width, facts.height, options) or caption_fault(captions, options)


def _write_indices(
    folder: Path, out: Path, rows: list[_Row], options: ViewOptions, weights: Sequence[float]
) -> dict[str, dict[str, Any]]:
    """Write an index for each tar with a chosen sample. `rows` are ordered by source, split and tar."""
    splits: dict[str, dict[str, Any]] = {}
    tar_of = groupby(rows, lambda row: (row.source, row.dataset, int(row.dataset.shard_of(row.number))))
    for (source, dataset, shard), group in tar_of:
        known = dataset.shards[shard]
        tar, index = shard_paths(dataset.folder, known)
        lines = read_regular(index, "index").decode(errors="surrogateescape").splitlines()[1:]
        first = int(dataset.index.first[shard])
        chosen, captions = [], 0
        for row in group:
            whole, part = (1.0, 0.0) if is_evaluation(dataset.split) else divmod(weights[source], 1.0)
            copies = int(whole) + (hash_share(options, "weight", dataset, row.number) < part)
            chosen += [lines[row.number - first]] * copies
            captions += len(dataset.captions(row.number)) * copies
        if not chosen:
            continue
        earlier = len(splits[dataset.split]["shards"]) if dataset.split in splits else 0
        name = f"{dataset.split}-{earlier:06d}.idx"
        content = format_index(chosen).encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(content)
        described = {
            "tar": os.path.relpath(tar.parent.resolve() / tar.name, out),
            "index": name,
            "samples": len(chosen),
            "bytes": known["bytes"],
            "sha256": known["sha256"],
            "index_sha256": hashlib.sha256(content).hexdigest(),
        }
        add_shard(splits, dataset.split, described, captions)
    return splits
