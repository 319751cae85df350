"""Views of linked data: they hold the index records of the chosen samples. And rules of choice that all views share."""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import add_shard, read_description, write_description
from mvlm_dataloading.dataset.open import is_linked, open_dataset
from mvlm_dataloading.dataset.sample_index import Field as SampleField
from mvlm_dataloading.dataset.sample_index import IndexWriter, index_path
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import new_folder
from mvlm_dataloading.links.captions import CaptionSpec, Field, read_spec
from mvlm_dataloading.links.scan import NO_TEXT, columns_of
from mvlm_dataloading.links.store import RangeStore
from mvlm_dataloading.options import ViewOptions
from mvlm_dataloading.sources.record import is_evaluation

BUILT = {**CaptionSpec((Field("txt", (), 1.0),), lines=True).to_json(), "image": ""}
"""Specification of captions, as linked data have one, for data sets with tars of their own: the lines of each `.txt`.
"""


def view_links(out: Path, sources: Sequence[Path], options: ViewOptions, weights: Sequence[float]) -> dict[str, Any]:
    """Write a view of linked data, which is linked data itself. The arguments are checked ones of `make_view`.

    Sources may also be data sets with tars of their own. Of these the captions are taken, and no other metadata. No
    image is decoded. Files are read if an option asks for captions. Returns the description.

    Raises:
        DataError: an option needs the images; no sample is left.
    """
    known = [read_description(source) for source in sources]
    _require_no_images(options, {split for one in known for split in one["splits"]})
    splits: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[tuple[Dataset, int, list[int]]]] = {}
    captions: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for source, one, weight in zip(sources, known, weights, strict=True):
        for split in one["splits"]:
            if options.splits and split not in options.splits:
                continue
            dataset = open_dataset(source, split)
            given = one["captions"] if is_linked(one) else [BUILT]
            for shard, described in enumerate(dataset.shards):
                rows, count = _choose(dataset, shard, options, weight, reasons)
                if not rows:
                    continue
                own = given[described.get("captions", 0)]
                captions += [] if own in captions else [own]
                number = captions.index(own)
                linked = described if is_linked(one) else _as_linked(dataset, shard)
                linked = {**linked, "samples": len(rows), **({"captions": number} if number else {})}
                if "groups" in linked:
                    of_row = np.searchsorted(np.cumsum(linked["groups"]), rows, side="right")
                    linked["groups"] = [count for count in np.bincount(of_row).tolist() if count]
                add_shard(splits, split, linked, count)
                chosen.setdefault(split, []).append((dataset, shard, rows))
    if not splits:
        raise DataError(f"{out}: wanted at least one sample in the view, found none; left out: {dict(reasons)}")
    names = [str(one.get("name") or "") for one in known]
    about = {"name": f"view of {'; '.join(dict.fromkeys(names))}", "source": "files of others, linked where they are"}
    recipe = {**asdict(options), "sources": names, "weights": list(weights), "depth": 1 + max(map(depth_of, known))}
    recipe["max_aspect"] = None  # JSON has no infinity
    columns = max(columns_of(read_spec(one, str(out))) for one in captions)
    with new_folder(out, out.with_name(f".{out.name}.view")) as folder:
        about |= {"licence": "", "attribution": ""}
        description = write_description(folder, about, {"view": recipe}, splits, reasons, captions=captions)
        for split, parts in chosen.items():
            with index_path(folder, split).open("w+b") as file:
                writer = IndexWriter(file, split, splits[split]["shards"], columns=columns, captions=captions)
                for dataset, shard, rows in parts:
                    writer.add(*_content(dataset, shard, rows, columns))
                writer.finish()
    return description


def _require_no_images(options: ViewOptions, splits: set[str]) -> None:
    """Raise DataError for an option for which all images would have to be decoded."""
    images = {"min-side": options.min_side > 1, "max-aspect": options.max_aspect != float("inf")}
    images |= {"duplicates": options.duplicates != "keep"}
    images |= {"leaks": options.leaks == "drop" and any(map(is_evaluation, splits)) and "train" in splits}
    if needed := [name for name, given in images.items() if given]:
        advice = "give --leaks keep" if needed == ["leaks"] else "leave the option out"
        raise DataError(f"{needed[0]}: wanted options that need no image of linked data, found one that does; {advice}")
    if missing := sorted(set(options.splits) - splits):
        raise DataError(f"splits: wanted some of {', '.join(sorted(splits))}, got {', '.join(missing)}")


def _choose(
    dataset: Dataset, shard: int, options: ViewOptions, weight: float, reasons: Counter[str]
) -> tuple[list[int], int]:
    """Choose samples of a shard. Returns their row numbers in the shard, copies included, and their number of captions.

    Args:
        weight: number of copies of a training sample. A fraction gives that share of the samples one copy more.
        reasons: number of rejected samples by reason, which is added to.
    """
    first, end = dataset.index.first[shard : shard + 2].tolist()
    asks = options.match or options.without or options.min_words > 1 or options.max_words < ViewOptions().max_words
    train, rows, found = not is_evaluation(dataset.split), list[int](), 0
    mean = dataset.description["splits"][dataset.split]["captions"] / len(dataset)
    found_captions = dataset.captions_of(range(first, end)) if asks else repeat(None, end - first)
    for row, captions in enumerate(found_captions):
        if captions is not None and (fault := caption_fault(captions, options)):
            reasons[fault] += 1
        elif train and hash_share(options, "", dataset, first + row) >= options.fraction:
            reasons["not in the fraction"] += 1
        else:
            whole, part = divmod(weight, 1.0) if train else (1.0, 0.0)
            copies = int(whole) + (hash_share(options, "weight", dataset, first + row) < part)
            rows += [row] * copies
            found += copies * len(captions) if captions is not None else 0
    return rows, found if asks else round(mean * len(rows))


def _as_linked(dataset: Dataset, shard: int) -> dict[str, Any]:
    """A shard of a built data set, as `dataset.json` describes a linked one."""
    found, known = RangeStore(1).stat(dataset.tars[shard]), dataset.shards[shard]
    return {"tar": found.url, "samples": 0, "bytes": found.size, "sha256": known["sha256"], "etag": found.etag}


def _content(dataset: Dataset, shard: int, rows: list[int], columns: int) -> tuple[Any, bytes]:
    """Index records and keys of some samples of a shard, as `IndexWriter.add` takes them.

    Args:
        rows: row numbers in the shard, possibly repeated.
        columns: how many numbers a record gets.
    """
    records, keys = dataset.index.shard_content(shard)
    ends = records[:, -1].astype(np.int64)
    begins = np.append(0, ends)[:-1]
    own = [keys[begins[row] : ends[row]] for row in rows]
    places = records[rows, : -1 if dataset.links is not None else SampleField.META_BLOCK]  # of a built set, its .txt
    chosen = np.tile(np.array(NO_TEXT, "<u4"), (len(rows), (columns + 1) // 2))[:, :columns]
    chosen[:, : places.shape[1]] = places
    chosen[:, -1] = np.cumsum([len(key) for key in own])
    return chosen, b"".join(own)


def caption_fault(captions: list[str], options: ViewOptions) -> str | None:
    """The reason for which a sample with these captions is not wanted, or None."""
    words = [len(caption.split()) for caption in captions]
    if min(words) < options.min_words:
        return "caption is too short"
    if max(words) > options.max_words:
        return "caption is too long"
    if options.match is not None and not any(re.search(options.match, caption) for caption in captions):
        return "no caption matches --match"
    if options.without is not None and any(re.search(options.without, caption) for caption in captions):
        return "a caption matches --without"
    return None


def hash_share(options: ViewOptions, purpose: str, dataset: Dataset, i: int) -> float:
    """Pseudorandom number in [0, 1) for sample i: a hash of seed, purpose, the sample's key and `depth_of` the data.

    Without the depth, taking a fraction of a view that is itself a fraction would select all of its samples.
    """
    depth, key = depth_of(dataset.description), dataset.keys[i]
    if dataset.links is not None:  # tables have no keys but numbers of rows
        key = f"{dataset.links.files[int(dataset.shard_of(i))].url.rpartition('/')[2]} {key}"
    text = f"{options.seed} {purpose} {key}" + (f" {depth}" if depth else "")
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def depth_of(description: dict[str, Any]) -> int:
    """Number of views that lie between a data set and the tars that it reads; 0 for a data set with its own tars."""
    view = description.get("recipe", {}).get("view")
    return view.get("depth", 0) if isinstance(view, dict) else 0
