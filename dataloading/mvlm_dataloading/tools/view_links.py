"""Views of linked data: the records of the chosen samples, and what all views choose by."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.dataset.dataset import Dataset
from mvlm_dataloading.dataset.description import add_shard, read_description, write_description
from mvlm_dataloading.dataset.open import is_linked, open_dataset
from mvlm_dataloading.dataset.sample_index import IndexWriter, index_path
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import new_folder
from mvlm_dataloading.options import ViewOptions
from mvlm_dataloading.sources.record import is_evaluation


def view_links(out: Path, sources: Sequence[Path], options: ViewOptions, weights: Sequence[float]) -> dict[str, Any]:
    """Write a view of linked data, which is linked data itself. The arguments are checked ones of `make_view`.

    No image is decoded. Files are read if an option asks for captions. Returns the description.

    Raises:
        DataError: a source is not linked, or by other captions; an option needs the images; no sample is left.
    """
    known = [read_description(source) for source in sources]
    for source, one in zip(sources, known, strict=True):
        if not is_linked(one) or one["captions"] != known[0].get("captions"):
            raise DataError(f"{source}: wanted sources that are linked with the same --caption, found another")
    _require_no_images(options, {split for one in known for split in one["splits"]})
    splits: dict[str, dict[str, Any]] = {}
    chosen: dict[str, list[tuple[Dataset, int, list[int]]]] = {}
    reasons: Counter[str] = Counter()
    for source, one, weight in zip(sources, known, weights, strict=True):
        for split in one["splits"]:
            if options.splits and split not in options.splits:
                continue
            dataset = open_dataset(source, split)
            for shard, described in enumerate(dataset.shards):
                rows, captions = _choose(dataset, shard, options, weight, reasons)
                if rows:
                    add_shard(splits, split, {**described, "samples": len(rows)}, captions)
                    chosen.setdefault(split, []).append((dataset, shard, rows))
    if not splits:
        raise DataError(f"{out}: wanted at least one sample in the view, found none; left out: {dict(reasons)}")
    names = [str(one.get("name") or "") for one in known]
    about = {"name": f"view of {'; '.join(dict.fromkeys(names))}", "source": "files of others, linked where they are"}
    recipe = {**asdict(options), "sources": names, "weights": list(weights), "depth": 1 + max(map(depth_of, known))}
    recipe["max_aspect"] = None  # JSON has no infinity
    captions = known[0]["captions"]
    with new_folder(out, out.with_name(f".{out.name}.view")) as folder:
        about |= {"licence": "", "attribution": ""}
        description = write_description(folder, about, {"view": recipe}, splits, reasons, captions=captions)
        for split, parts in chosen.items():
            with index_path(folder, split).open("w+b") as file:
                columns = parts[0][0].index.shard_content(0)[0].shape[1]
                writer = IndexWriter(file, split, splits[split]["shards"], columns=columns, captions=captions)
                for dataset, shard, rows in parts:
                    writer.add(*_content(dataset, shard, rows))
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
    """Rows of a shard that are in the view, repeated by the weight, and the number of their captions."""
    first, end = dataset.index.first[shard : shard + 2].tolist()
    asks = options.match or options.without or options.min_words > 1 or options.max_words < ViewOptions().max_words
    train, rows, found = not is_evaluation(dataset.split), list[int](), 0
    mean = dataset.description["splits"][dataset.split]["captions"] / len(dataset)
    for row, captions in _captions(dataset, shard) if asks else ((row, None) for row in range(end - first)):
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


def _captions(dataset: Dataset, shard: int) -> Iterator[tuple[int, list[str]]]:
    assert dataset.links is not None
    count = int(dataset.index.first[shard + 1] - dataset.index.first[shard])
    for sample in dataset.links.samples(shard, range(count), images=False):
        yield sample.row, sample.text.decode().split("\n")


def _content(dataset: Dataset, shard: int, rows: list[int]) -> tuple[Any, bytes]:
    """Records and keys of some rows of a shard, as `IndexWriter.add` takes them."""
    records, keys = dataset.index.shard_content(shard)
    ends = records[:, -1].astype(np.int64)
    begins = np.append(0, ends)[:-1]
    chosen = records[rows].copy()
    own = [keys[begins[row] : ends[row]] for row in rows]
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
    """Hash of seed, purpose, key and depth of views, as a number in [0, 1).

    Without the depth, taking a fraction of a view that is itself a fraction would select all of its samples.
    """
    depth, key = depth_of(dataset.description), dataset.keys[i]
    if dataset.links is not None:  # tables have no keys but numbers of rows
        key = f"{dataset.links.files[int(dataset.shard_of(i))].url.rpartition('/')[2]} {key}"
    text = f"{options.seed} {purpose} {key}" + (f" {depth}" if depth else "")
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def depth_of(description: dict[str, Any]) -> int:
    """Number of nested views; 0 for a data set with its own tars."""
    view = description.get("recipe", {}).get("view")
    return view.get("depth", 0) if isinstance(view, dict) else 0
