"""Final step of a build, which joins the pieces of all parts.

Drops duplicates and training images that also occur in an evaluation split, and puts the pieces' tars into the data
folder. A data set at a URL gets its tars from parts in the same store by copies that the store makes. Besides the tars
it writes:

    OUT/rejected.jsonl     a line per rejected record: key, split, reason, origin
    OUT/duplicates.jsonl   a line per duplicate image: key, split, kind (exact or near), and the image that it repeats
    OUT/dataset.json       the description
    OUT/train.index        the index of each split

Shape legend: n written samples, in the order of the source.
"""

import hashlib
import itertools
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.dataset.dali_index import components_of, most_bytes
from mvlm_dataloading.dataset.description import add_shard, describe_shard, write_description
from mvlm_dataloading.dataset.folders import LocalFolder, RemoteFolder
from mvlm_dataloading.dataset.open import write_index
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import replaced, write_file
from mvlm_dataloading.sources.tar_samples import CUT
from mvlm_dataloading.tokenizer import load_tokenizer
from mvlm_dataloading.untrusted import LIMITS

from .duplicates import (
    LEAKED,
    LEAKED_NEARLY,
    ImageFacts,
    drop_leaks,
    drop_repeats,
    evaluation_images,
    parse_image_facts,
)
from .shard_writer import Shard

log = logging.getLogger(__name__)

SAMPLES_BYTES, SHARDS_BYTES = 1 << 30, 64 << 20
"""Bytes that a piece's samples.jsonl and shards.json may have."""
_REQUESTS = 16
"""Requests to object stores at once."""


@dataclass(frozen=True, slots=True)
class Assembly:
    """A build whose pieces are finished."""

    folder: Path
    """Working folder on this machine. `final/` in it becomes the data set."""
    spec: dict[str, Any]
    parts: Sequence[LocalFolder | RemoteFolder]
    owner: Sequence[int]
    """For each piece, the index in `parts` of the part that has it."""
    out: RemoteFolder | None = None
    """Remote folder of the data set; None for one on this machine. Tars that stay whole are copied there at once."""

    def part_of(self, piece: int) -> LocalFolder | RemoteFolder:
        return self.parts[self.owner[piece]]


REPEATED_KEY = "key was used before"
_REMEDIES = {
    "image file is missing": "; tables name files relative to the folder of images",
    "no caption": "; the captions of a.jpg are the lines of a.txt beside it, or rows of a table",
}
"""Advice for errors, keyed by the most frequent reasons for which all samples of a data set are rejected."""


def assemble(assembly: Assembly) -> Counter[str]:
    """Write `final/`. Can be repeated after an interruption at any point. Returns counts for the log."""
    final = assembly.folder / "final"
    final.mkdir(exist_ok=True)
    written, rejected = _read_pieces(assembly)
    images, spec = written.images, assembly.spec
    first: dict[str, int] = {}
    dropped = {i: REPEATED_KEY for i, image in enumerate(images) if first.setdefault(image.key, i) != i}
    questions = "questions" in spec["recipe"]
    evaluation = [image for folder in spec["evaluation_sets"] for image in evaluation_images(Path(folder))]
    duplicates = drop_leaks(images, evaluation, dropped, own_splits=not questions)
    if not questions:
        duplicates += drop_repeats(images, dropped, drop=spec["recipe"]["drop_duplicates"])
    for i, reason in dropped.items():
        where = written.where[i]
        rejected.append({"key": images[i].key, "split": images[i].split, "reason": reason, "where": where})
    if len(dropped) == len(images):
        shutil.rmtree(assembly.folder)
        raise DataError(f"{spec['name']}: wanted at least one sample, found none; {_why_none(assembly, rejected)}")
    train = [i for i, image in enumerate(images) if image.split == "train"]
    if all(i in dropped for i in train) and any(dropped[i] in (LEAKED, LEAKED_NEARLY) for i in train):
        shutil.rmtree(assembly.folder)
        raise DataError(
            f"{spec['name']}: wanted training samples that are in no evaluation split, found that all {len(train)} are "
            f"in one, the first {written.where[train[0]]}; name other files for train, or none"
        )
    splits = _write_shards(assembly, written, dropped)
    for name, lines in (("rejected", rejected), ("duplicates", duplicates)):
        write_file(final / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    reasons = Counter(line["reason"] for line in rejected)
    for line in rejected:
        if line["reason"] == CUT:
            log.warning("%s: wanted a whole tar, found a cut one; what it held behind the cut is lost", line["where"])
    write_description(final, assembly.spec, assembly.spec["recipe"], splits, reasons, **_tokenizer(assembly))
    for split in splits:
        write_index(final, split, with_tars=assembly.out is None)
    kinds = Counter(f"duplicates ({line['kind']})" for line in duplicates)
    return Counter({f"{split} samples": s["samples"] for split, s in splits.items()}) + kinds + reasons


def _why_none(assembly: Assembly, rejected: list[dict[str, Any]]) -> str:
    if not rejected:
        first, *others = assembly.spec["pieces"]
        more = f" and {len(others)} more" if others else ""
        return f"no image and no caption in {first}{more}; name the files that hold them"
    first, reasons = rejected[0], dict(Counter(line["reason"] for line in rejected).most_common(5))
    return f"rejected: {reasons}, the first {first['where']}: {first['reason']}{_REMEDIES.get(first['reason'], '')}"


@dataclass(slots=True)
class _Written:
    """Lists with an entry for each of the n samples that the pieces of a build hold."""

    images: list[ImageFacts]
    where: list[str]
    captions: list[int]
    """Number of captions of each sample."""
    tars: list[tuple[int, int]]
    """For each sample, the number of its piece and the number of its tar within the piece."""


def _read_pieces(assembly: Assembly) -> tuple[_Written, list[dict[str, Any]]]:
    """Read the samples of all pieces, and a line per rejected record."""
    written, rejected = _Written([], [], [], []), []
    splits = assembly.spec["splits"]

    def read(number: int) -> list[str]:
        content = assembly.part_of(number).read(f"{_piece(number)}/samples.jsonl", SAMPLES_BYTES, exact=True)
        return content.decode().splitlines()

    for number, lines in enumerate(_each(assembly, read, range(len(splits)))):
        split = splits[number]
        for line in map(json.loads, lines):
            if "reason" in line:
                rejected.append({"key": line["key"], "split": split, **line})
                continue
            written.images.append(parse_image_facts(line["key"], split, line))
            written.where.append(line["where"])
            written.captions.append(line["captions"])
            written.tars.append((number, line["tar"]))
    return written, rejected


def _write_shards(assembly: Assembly, written: _Written, dropped: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Put the tars that keep all their samples into place, and rewrite the others without the dropped samples.

    dropped: sample number -> reason. Returns the field `splits` of dataset.json.
    """
    samples_of: dict[tuple[int, int], list[int]] = {}
    for i, tar in enumerate(written.tars):
        samples_of.setdefault(tar, []).append(i)

    def read(number: int) -> list[dict[str, Any]]:
        return json.loads(assembly.part_of(number).read(f"{_piece(number)}/shards.json", SHARDS_BYTES, exact=True))

    numbers = sorted({number for number, _ in samples_of})
    known_of = dict(zip(numbers, _each(assembly, read, numbers), strict=True))
    splits: dict[str, dict[str, Any]] = {}
    whole: list[tuple[int, int, Path, dict[str, Any]]] = []
    for (number, tar), samples in samples_of.items():
        keep = [i not in dropped for i in samples]
        if not any(keep):
            continue
        split, known = assembly.spec["splits"][number], known_of[number][tar]
        earlier = len(splits[split]["shards"]) if split in splits else 0
        new = assembly.folder / "final" / f"{split}-{earlier:06d}.tar"
        if all(keep):
            whole.append((number, tar, new, known))
            shard = {"tar": new.name, **{name: known[name] for name in ("samples", "bytes", "sha256")}}
        else:
            _rewrite(assembly, number, tar, new, keep, known)
            shard = describe_shard(new, sum(keep))
        add_shard(splits, split, shard, sum(written.captions[i] for i in samples if i not in dropped))
    for _ in _each(assembly, lambda one: _place_whole(assembly, *one), whole):
        pass
    return splits


def _each(assembly: Assembly, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yield `function(item)` of each item, in order.

    Up to `_REQUESTS` calls run at once, in threads, if the parts or the data set are at a URL, so that calls wait for a
    network.
    """
    if assembly.out is None and all(isinstance(part, LocalFolder) for part in assembly.parts):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_REQUESTS) as pool:
        yield from pool.map(function, items)


def _place_whole(assembly: Assembly, number: int, tar: int, new: Path, known: dict[str, Any]) -> None:
    """Put one tar of a piece and its DALI index into the data set, unchanged.

    A file that is already there is left: it was put there before an interruption.

    Args:
        number, tar: number of the piece, and number of the tar in it.
        new: path of the tar in the data set.
        known: the tar's entry in the piece's shards.json.
    """
    part, old = assembly.part_of(number), f"{_piece(number)}/{tar:03d}"
    for suffix in (".tar", ".idx"):
        target = new.with_suffix(suffix)
        if target.exists():
            continue
        if isinstance(part, LocalFolder):
            part.get(old + suffix, target)
        elif suffix == ".tar" and assembly.out is not None and assembly.out.filesystem is part.filesystem:
            part.copy_to(old + suffix, assembly.out, target.name)
        else:
            with replaced(target) as aside:
                _get(part, old + suffix, aside, known)
    if assembly.out is not None and new.exists():
        assembly.out.put(new, new.name)
        new.unlink()


def _get(part: RemoteFolder, name: str, to: Path, known: dict[str, Any]) -> None:
    """Fetch a piece's tar or its index. `known` is the tar's entry in the piece's shards.json."""
    if name.endswith(".idx"):
        part.get(name, to, most_bytes(known["samples"]), exact=True)
    else:
        part.get(name, to, known["bytes"], known["sha256"])


def _rewrite(assembly: Assembly, number: int, tar: int, new: Path, keep: list[bool], known: dict[str, Any]) -> None:
    """Write the tar `new` of the data set: those samples of a piece's tar for which `keep`, a bool each, is True.

    number, tar: number of the piece, and number of the tar in it. known: the tar's entry in the piece's shards.json.
    """
    part, old = assembly.part_of(number), f"{_piece(number)}/{tar:03d}"
    if isinstance(part, LocalFolder):
        _copy_kept(part.folder / f"{old}.tar", new, keep)
        return
    with tempfile.TemporaryDirectory(dir=assembly.folder) as name:
        copy = Path(name) / "old.tar"
        _get(part, f"{old}.tar", copy, known)
        _get(part, f"{old}.idx", copy.with_suffix(".idx"), known)
        _copy_kept(copy, new, keep)


def _copy_kept(old: Path, new: Path, keep: list[bool]) -> None:
    """Copy those samples of the tar `old` to the tar `new` for which `keep`, one bool a sample, is True.

    `new` and its index appear complete, or not at all.
    """
    if new.exists() and new.with_suffix(".idx").exists():
        return
    shard = Shard(new.with_name(f"{new.stem}.new.tar"))
    lines = old.with_suffix(".idx").read_text(encoding="utf-8").splitlines()[1:]
    with old.open("rb") as file:
        for line in itertools.compress(lines, keep):
            parts = []
            key, components = components_of(line)
            for extension, offset, size in components:
                file.seek(offset)
                parts.append((extension, file.read(size)))
            shard.write(key, parts, num_captions=0)
    shard.close()
    # NOTE: rename the tar last. After a kill a tar that is there counts as done, with its index.
    shard.path.with_suffix(".idx").rename(new.with_suffix(".idx"))
    shard.path.rename(new)


def _tokenizer(assembly: Assembly) -> dict[str, Any]:
    """Put the tokenizer into the data set.

    Returns the fields of `dataset.json` that describe it; none without a tokenizer.
    """
    final, recipe = assembly.folder / "final", assembly.spec["recipe"]
    if "tokenizer" not in recipe:
        return {}
    content = assembly.parts[0].read("tokenizer.json", LIMITS["tokenizer"])
    write_file(final / "tokenizer.json", content)
    fingerprint = load_tokenizer(final / "tokenizer.json").fingerprint
    tokens = {"fingerprint": fingerprint, "max_length": recipe["text_length"]}
    return {"tokenizer": hashlib.sha256(content).hexdigest(), "tokens": tokens}


def _piece(number: int) -> str:
    return f"pieces/{number:06d}"
