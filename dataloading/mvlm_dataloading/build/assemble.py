"""The last part of a build: what is left out for the sake of the other samples, and the folder of shards.

    OUT/rejected.jsonl     a line for each record that is not there: key, split, reason, where it came from
    OUT/duplicates.jsonl   a line for each picture that was there before: key, split, kind (exact or near), of which

Shape legend: n written samples, in the order of the source.
"""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvlm_dataloading.dataset.description import FORMAT_VERSION, description_of, write_durably
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.options import Settings
from mvlm_dataloading.sources.record import Source

from .duplicates import Pictures, collect, evaluation_splits, find_duplicates, find_leaks, parse_facts, pictures_of
from .shard_writer import Shard


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the pieces in `folder` are to become."""

    folder: Path
    source: Source
    settings: Settings
    recipe: dict[str, Any]
    against: tuple[Path, ...]


def assemble(assembly: Assembly) -> Counter[str]:
    """Write `final/`. Can be done again wherever it was interrupted. Returns counts for the log."""
    final = assembly.folder / "final"
    final.mkdir(exist_ok=True)
    written, rejected = _read_lines(assembly)
    pictures = written.pictures
    dropped = _repeated_keys(pictures.keys)
    evaluation = [pictures_of(folder, split) for folder in assembly.against for split in evaluation_splits(folder)]
    duplicates = list(find_leaks(pictures, evaluation, dropped))
    duplicates += find_duplicates(pictures, dropped, drop=assembly.settings.drop_duplicates)
    for i, reason in dropped.items():
        where = written.where[i]
        rejected.append({"key": pictures.keys[i], "split": pictures.splits[i], "reason": reason, "where": where})
    if len(dropped) == len(pictures.keys):
        reasons = dict(Counter(line["reason"] for line in rejected).most_common(5))
        shutil.rmtree(assembly.folder)
        raise DataError(f"{assembly.source.name}: wanted at least one sample, found none; rejected: {reasons}")
    splits = _write_shards(assembly, written, dropped)
    for name, lines in (("rejected", rejected), ("duplicates", duplicates)):
        write_durably(final / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    reasons = Counter(line["reason"] for line in rejected)
    _describe(assembly, splits, reasons)
    kinds = Counter(f"duplicates ({line['kind']})" for line in duplicates)
    return Counter({f"{split} samples": s["samples"] for split, s in splits.items()}) + kinds + reasons


@dataclass(slots=True)
class _Written:
    """What the pieces hold: lists of n."""

    pictures: Pictures
    where: list[str]
    captions: list[int]
    places: list[tuple[int, int]]
    """The piece and the tar in it that hold each."""


def _read_lines(assembly: Assembly) -> tuple[_Written, list[dict[str, Any]]]:
    """What was written, and what was refused."""
    facts, where, captions, places, rejected = [], [], [], [], []
    for number, piece in enumerate(assembly.source.pieces):
        with (_piece_folder(assembly, number) / "samples.jsonl").open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                if "reason" in line:
                    rejected.append({"key": line["key"], "split": piece.split, **line})
                    continue
                facts.append((line["key"], piece.split, parse_facts(line)))
                where.append(line["where"])
                captions.append(line["captions"])
                places.append((number, line["tar"]))
    return _Written(collect(facts), where, captions, places), rejected


def _repeated_keys(keys: list[str]) -> dict[int, str]:
    first: dict[str, int] = {}
    return {i: "key was used before" for i, key in enumerate(keys) if first.setdefault(key, i) != i}


def _write_shards(assembly: Assembly, written: _Written, dropped: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Move tars from which nothing was dropped, write the others again without; number them by split."""
    kept: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(written.places):
        kept.setdefault(place, []).append(i)
    splits: dict[str, dict[str, Any]] = {}
    for (number, tar), inside in kept.items():
        wanted = [i not in dropped for i in inside]
        if not any(wanted):
            continue
        split = assembly.source.pieces[number].split
        entry = splits.setdefault(split, {"samples": 0, "captions": 0, "shards": []})
        old = _piece_folder(assembly, number) / f"{tar:03d}.tar"
        new = assembly.folder / "final" / f"{split}-{len(entry['shards']):06d}.tar"
        if all(wanted):
            for suffix in (".tar", ".idx"):
                if not new.with_suffix(suffix).exists():  # else moved before an interruption
                    old.with_suffix(suffix).rename(new.with_suffix(suffix))
            known = json.loads((old.parent / "shards.json").read_text())[tar]
            shard = {"tar": new.name, "samples": known["samples"], "bytes": known["bytes"], "sha256": known["sha256"]}
        else:
            _copy_wanted(old, new, wanted)
            shard = description_of(new, sum(wanted))
        entry["samples"] += sum(wanted)
        entry["captions"] += sum(written.captions[i] for i in inside if i not in dropped)
        entry["shards"].append(shard)
    return dict(sorted(splits.items()))


def _copy_wanted(old: Path, new: Path, wanted: list[bool]) -> None:
    """Write a tar again with some of its samples. `new` and its index are whole or not there."""
    if new.exists() and new.with_suffix(".idx").exists():
        return
    shard = Shard(new.with_name(f"{new.stem}.new.tar"))
    lines = old.with_suffix(".idx").read_text(encoding="utf-8").splitlines()[1:]
    with old.open("rb") as file:
        for line, take in zip(lines, wanted, strict=True):
            if take:
                parts, key = [], ""
                words = line.split(" ")
                for extension, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                    file.seek(int(offset))
                    parts.append((extension, file.read(int(size))))
                    key = name[: -len(extension) - 1]
                shard.write(key, parts, num_captions=0)
    shard.close()
    # The tar last: its name says that both are there.
    shard.path.with_suffix(".idx").rename(new.with_suffix(".idx"))
    shard.path.rename(new)


def _describe(assembly: Assembly, splits: dict[str, dict[str, Any]], reasons: Counter[str]) -> None:
    source, settings, final = assembly.source, assembly.settings, assembly.folder / "final"
    description: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "name": source.name,
        "source": source.origin,
        "licence": source.licence,
        "attribution": source.attribution,
        "recipe": assembly.recipe,
        "splits": splits,
        "tokenizer": None,
        "rejected": dict(sorted(reasons.items())),
    }
    if settings.tokenizer is not None:
        from mvlm_dataloading.tokenizer import load_tokenizer

        tokenizer = settings.tokenizer.read_bytes()
        (final / "tokenizer.json").write_bytes(tokenizer)
        description["tokenizer"] = hashlib.sha256(tokenizer).hexdigest()
        fingerprint = load_tokenizer(settings.tokenizer).fingerprint
        description["tokens"] = {"fingerprint": fingerprint, "max_length": settings.text_length}
    write_durably(final / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def _piece_folder(assembly: Assembly, number: int) -> Path:
    return assembly.folder / "pieces" / f"{number:06d}"
