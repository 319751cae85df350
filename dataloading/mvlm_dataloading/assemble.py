"""The last part of a build: what is left out for the sake of the other samples, and the folder of shards.

    OUT/rejected.jsonl     a line for each record that is not there: key, split, reason, where it came from
    OUT/duplicates.jsonl   a line for each picture that was there before: key, split, kind (exact or near), of which

Shape legend: n written samples, in the order of the source.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dataset import open_dataset
from .decode import perceptual_hash
from .duplicates import first_equal, near_known, near_pairs
from .errors import DataError, need
from .records import EVALUATION_SPLITS, Source
from .shards import FORMAT_VERSION, Shard, description_of, read_description, write_durably
from .writing import Settings

LEAKED = "picture is in an evaluation split"
LEAKED_NEARLY = "picture is nearly one of an evaluation split"
_ASPECT = 1.1  # near-duplicates have the same shape up to this factor


@dataclass(frozen=True, slots=True)
class Assembly:
    """What the pieces in `folder` are to become."""

    folder: Path
    source: Source
    settings: Settings
    recipe: dict[str, Any]
    against: tuple[Path, ...]


@dataclass(slots=True)
class _Samples:
    """What is known of the written samples: parallel lists and arrays (n,)."""

    keys: list[str]
    splits: list[str]
    where: list[str]
    captions: list[int]
    places: list[tuple[int, int]]
    """The piece and the tar in it that hold each."""
    digest: Any
    """bytes (n,), sha256 of the picture's file as published."""
    has_hash: Any
    """bool (n,), True where there is a perceptual hash."""
    phash: Any
    """uint64 (n,)."""
    aspect: Any
    """float64 (n,), width over height."""


def assemble(assembly: Assembly) -> Counter[str]:
    """Write `final/`. Can be done again wherever it was interrupted. Returns counts for the log."""
    final = assembly.folder / "final"
    final.mkdir(exist_ok=True)
    samples, rejected = _read_lines(assembly)
    dropped = _repeated_keys(samples)
    duplicates = list(_leaks(samples, assembly.against, dropped))
    duplicates += _duplicates(samples, assembly.settings, dropped)
    for i, reason in dropped.items():
        rejected.append(
            {"key": samples.keys[i], "split": samples.splits[i], "reason": reason, "where": samples.where[i]}
        )
    if len(dropped) == len(samples.keys):
        reasons = dict(Counter(line["reason"] for line in rejected).most_common(5))
        shutil.rmtree(assembly.folder)
        raise DataError(f"{assembly.source.name}: wanted at least one sample, found none; rejected: {reasons}")
    splits = _write_shards(assembly, samples, dropped)
    for name, lines in (("rejected", rejected), ("duplicates", duplicates)):
        write_durably(final / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    reasons = Counter(line["reason"] for line in rejected)
    _describe(assembly, splits, reasons)
    kinds = Counter(f"duplicates ({line['kind']})" for line in duplicates)
    return Counter({f"{split} samples": s["samples"] for split, s in splits.items()}) + kinds + reasons


def _read_lines(assembly: Assembly) -> tuple[_Samples, list[dict[str, Any]]]:
    keys, splits, where, captions, places, digest, hashes, aspect = [], [], [], [], [], [], [], []
    rejected = []
    for number, piece in enumerate(assembly.source.pieces):
        with (_piece_folder(assembly, number) / "samples.jsonl").open(encoding="utf-8") as file:
            for text in file:
                line = json.loads(text)
                if "reason" in line:
                    rejected.append({"key": line["key"], "split": piece.split, **line})
                    continue
                keys.append(line["key"])
                splits.append(piece.split)
                where.append(line["where"])
                captions.append(line["captions"])
                places.append((number, line["tar"]))
                digest.append(bytes.fromhex(line["sha256"]))
                hashes.append(line["phash"])
                aspect.append(line["width"] / line["height"])
    samples = _Samples(
        keys, splits, where, captions, places,
        digest=np.array(digest, "S32"),
        has_hash=np.array([text is not None for text in hashes], bool),
        phash=np.array([int(text or "0", 16) for text in hashes], np.uint64),
        aspect=np.array(aspect, np.float64),
    )  # fmt: skip
    return samples, rejected


def _repeated_keys(samples: _Samples) -> dict[int, str]:
    first: dict[str, int] = {}
    return {i: "key was used before" for i, key in enumerate(samples.keys) if first.setdefault(key, i) != i}


def _leaks(samples: _Samples, against: tuple[Path, ...], dropped: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Drop training samples whose picture is in an evaluation split, of this set or of another."""
    judged = np.array([split in EVALUATION_SPLITS for split in samples.splits], bool)
    judged[list(dropped)] = False
    held = np.flatnonzero(judged)
    names = [f"{samples.splits[i]}/{samples.keys[i]}" for i in held]
    digest, phash, aspect = [samples.digest[held]], [samples.phash[held]], [samples.aspect[held]]
    has_hash = [samples.has_hash[held]]
    for folder in against:
        facts = list(_facts_of(folder))
        names += [name for name, *_ in facts]
        digest.append(np.array([sha for _, sha, _, _ in facts], "S32"))
        phash.append(np.array([h or 0 for _, _, h, _ in facts], np.uint64))
        has_hash.append(np.array([h is not None for _, _, h, _ in facts], bool))
        aspect.append(np.array([a for *_, a in facts], np.float64))
    known = dict(zip(reversed(np.concatenate(digest).tolist()), reversed(range(len(names))), strict=True))
    usable = np.flatnonzero(np.concatenate(has_hash))
    known_hash, known_aspect = np.concatenate(phash)[usable], np.concatenate(aspect)[usable]
    train = np.flatnonzero([split == "train" for split in samples.splits])
    train = train[[int(i) not in dropped for i in train]] if len(train) else train
    near = near_known(samples.phash[train], known_hash)
    for i, j in zip(train.tolist(), near.tolist(), strict=True):
        exact = known.get(samples.digest[i].item())
        if exact is not None:
            dropped[i] = LEAKED
            yield _duplicate(samples, i, "exact", names[exact])
        elif j >= 0 and samples.has_hash[i] and _same_shape(samples.aspect[i], known_aspect.item(j)):
            dropped[i] = LEAKED_NEARLY
            yield _duplicate(samples, i, "near", names[usable[j]])


def _duplicates(samples: _Samples, settings: Settings, dropped: dict[int, str]) -> Iterator[dict[str, Any]]:
    """Report repeated pictures within a split, and drop the exact ones where that was asked for."""
    for split in sorted(set(samples.splits)):
        own = np.array([i for i, s in enumerate(samples.splits) if s == split and i not in dropped], np.int64)
        if not len(own):
            continue
        first = first_equal(samples.digest[own])
        for place in np.flatnonzero(first != np.arange(len(own))):
            i = int(own[place])
            yield _duplicate(samples, i, "exact", f"{split}/{samples.keys[own[first[place]]]}")
            if settings.drop_duplicates:
                dropped[i] = "picture was there before"
        rest = own[(first == np.arange(len(own))) & samples.has_hash[own]]
        nearest: dict[int, int] = {}
        for a, b in near_pairs(samples.phash[rest]):
            i, j = int(rest[a]), int(rest[b])
            if _same_shape(samples.aspect[i], samples.aspect[j]):
                nearest[j] = min(i, nearest.get(j, i))
        for j, i in sorted(nearest.items()):
            yield _duplicate(samples, j, "near", f"{split}/{samples.keys[i]}")


def _duplicate(samples: _Samples, i: int, kind: str, of: str) -> dict[str, Any]:
    return {"key": samples.keys[i], "split": samples.splits[i], "kind": kind, "of": of}


def _same_shape(one: float, other: float) -> bool:
    return max(one, other) <= _ASPECT * min(one, other)


def _facts_of(folder: Path) -> Iterator[tuple[str, bytes, int | None, float]]:
    """Name, sha256, perceptual hash and aspect of the evaluation pictures of another data set."""
    from .decode import Decoder

    decoder = Decoder(need("PIL.Image").MAX_IMAGE_PIXELS)
    for split in EVALUATION_SPLITS:
        if split not in read_description(folder)["splits"]:
            continue
        dataset = open_dataset(folder, split)
        for i in range(len(dataset)):
            facts = dataset.metadata(i)
            name = f"{folder.name}/{split}/{dataset.keys[i]}"
            try:
                known = facts["phash"]
                yield name, bytes.fromhex(facts["sha256"]), known and int(known, 16), facts["width"] / facts["height"]
            except (KeyError, TypeError, ValueError):  # written by another version, or by other tools
                image = dataset.image_bytes(i)
                (pixels,) = decoder([image])
                if not isinstance(pixels, str):
                    aspect = pixels.shape[1] / pixels.shape[0]
                    yield name, hashlib.sha256(image).digest(), perceptual_hash(pixels), aspect


def _write_shards(assembly: Assembly, samples: _Samples, dropped: dict[int, str]) -> dict[str, dict[str, Any]]:
    """Move tars from which nothing was dropped, write the others again without; number them by split."""
    kept: dict[tuple[int, int], list[int]] = {}
    for i, place in enumerate(samples.places):
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
        entry["captions"] += sum(samples.captions[i] for i in inside if i not in dropped)
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
        from .tokenizer import load_tokenizer

        tokenizer = settings.tokenizer.read_bytes()
        (final / "tokenizer.json").write_bytes(tokenizer)
        description["tokenizer"] = hashlib.sha256(tokenizer).hexdigest()
        fingerprint = load_tokenizer(settings.tokenizer).fingerprint
        description["tokens"] = {"fingerprint": fingerprint, "max_length": settings.text_length}
    write_durably(final / "dataset.json", json.dumps(description, indent=2, ensure_ascii=False) + "\n")


def _piece_folder(assembly: Assembly, number: int) -> Path:
    return assembly.folder / "pieces" / f"{number:06d}"
