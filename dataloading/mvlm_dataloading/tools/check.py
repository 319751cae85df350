"""Check of a data set: reads every byte, decodes every image and parses every caption.

What it finds is a table; a contact sheet shows images with their captions.
"""

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from mvlm_dataloading.build.image_check import exif_first, on_white, read_header
from mvlm_dataloading.build.workers import run_tasks
from mvlm_dataloading.captions import is_visible, repeats, same_words, script_of
from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS, components_of, parse_index
from mvlm_dataloading.dataset.dataset import image_name, parse_captions, parse_metadata, split_stored_tokens
from mvlm_dataloading.dataset.description import index_command, read_description, shard_paths
from mvlm_dataloading.dataset.open import is_linked, open_dataset
from mvlm_dataloading.dataset.sample_index import fingerprint_of, index_path, map_index, pack_records
from mvlm_dataloading.errors import DataError, need
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.randomness import text_hash
from mvlm_dataloading.untrusted import opened_unchanged, read_regular

from .reindex import index_tar

_LINKED = 1000  # samples of a split of linked data that are decoded
_MAX_PROBLEMS = 100  # problems listed per shard; the rest is counted
_UNREAD_EXIF = "DALI cannot read a WebP with EXIF data behind a chunk of odd length; `mvlm data webdataset` moves them"


@dataclass(frozen=True, slots=True)
class _Task:
    folder: Path
    split: str
    number: int
    """Number of the shard in its split."""
    shard: dict[str, Any]
    vocab_size: int | None


@dataclass(slots=True)
class Findings:
    """Statistics and problems of a split or a shard."""

    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Width and height of each decodable image, with the EXIF orientation applied."""
    image_bytes: list[int] = field(default_factory=list)
    """Size of each decodable image's file."""
    captions: list[int] = field(default_factory=list)
    """Number of captions of each sample whose captions and metadata can be parsed."""
    words: list[int] = field(default_factory=list)
    """Number of words of each caption."""
    texts: list[tuple[int, int]] = field(default_factory=list)
    """Two hashes for each caption: of its words, and of its image's name."""
    scripts: Counter[str] = field(default_factory=Counter)
    """Number of captions by script."""
    formats: Counter[str] = field(default_factory=Counter)
    """Number of decodable images by file extension."""
    transparent: int = 0
    """Number of decodable images with a pixel that is not opaque. The loader ignores transparency, so it shows what
    lies below."""
    keys: list[str] = field(default_factory=list)
    """Keys of all samples of the split or shard."""
    problems: list[str] = field(default_factory=list)
    """Problems, one line each."""

    def add(self, other: "Findings") -> None:
        for one in fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


def check_shards(
    folder: Path, *, workers: int = 1, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Findings]:
    """Findings by split, of every shard.

    Args:
        workers: number of worker processes; 0 works in this process.
        progress: called with the number of samples done and the total.

    Raises:
        DataError: the folder is not a data set, or its stored tokenizer is missing.
    """
    folder = Path(folder)
    description = read_description(folder)
    if is_linked(description):
        return _check_links(folder, list(description["splits"]), workers, progress)
    vocab_size = None
    if description.get("tokens"):
        from mvlm_dataloading.tokenizer import load_tokenizer

        vocab_size = load_tokenizer(folder / "tokenizer.json").vocab_size
    tasks = [
        _Task(folder, split, number, shard, vocab_size)
        for split, part in description["splits"].items()
        for number, shard in enumerate(part["shards"])
    ]
    found = {split: Findings(problems=_opening_problems(folder, split)) for split in description["splits"]}
    results: dict[tuple[str, int], Findings] = {}
    done, total = 0, sum(task.shard["samples"] for task in tasks)
    for event in run_tasks(_check_shard, tasks, workers):
        if event.kind == "progress":
            done += event.value
            progress(done, total)
        elif event.kind == "done":
            results[event.task.split, event.task.number] = event.value
        else:
            problem = f"{event.task.shard['tar']}: wanted images that can be decoded, found one that kills the process"
            results[event.task.split, event.task.number] = Findings(problems=[problem])
    for task in tasks:
        found[task.split].add(results[task.split, task.number])
    for split, findings in found.items():
        # A view may repeat samples intentionally.
        if not any("index" in shard for shard in description["splits"][split]["shards"]):
            repeated = [key for key, count in Counter(findings.keys).items() if count > 1]
            findings.problems += [f"{split}: wanted unique keys, found {key} more than once" for key in repeated]
    return found


def _check_links(
    folder: Path, splits: list[str], workers: int, progress: Callable[[int, int], None]
) -> dict[str, Findings]:
    """Findings of linked data: all files are asked for, and `_LINKED` samples of each split are read and decoded."""
    found = {split: Findings(problems=_opening_problems(folder, split)) for split in splits}
    tasks, done = [split for split, findings in found.items() if not findings.problems], 0
    for event in run_tasks(partial(_check_linked_split, folder), tasks, min(workers, len(tasks))):
        if event.kind == "progress":
            done += event.value
            progress(done, _LINKED * len(tasks))
        elif event.kind == "done":
            found[event.task].add(event.value)
        else:
            problem = f"{event.task}: wanted images that can be decoded, found one that kills the process"
            found[event.task].problems.append(problem)
    return found


def _check_linked_split(folder: Path, split: str, report: Callable[[int], None]) -> Findings:
    dataset, found = open_dataset(folder, split), Findings()
    links = dataset.links
    assert links is not None
    faults = links.faults()
    found.problems += faults.values()
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(_LINKED, len(dataset))).astype(np.int64))
    decoder, shards = ImageDecoder(), dataset.shard_of(rows)
    for shard in sorted(set(shards.tolist()) - faults.keys()):
        chosen = rows[shards == shard] - dataset.index.first[shard]
        for begin in range(0, len(chosen), 32):
            try:
                samples = list(links.samples(shard, chosen[begin : begin + 32].tolist()))
            except DataError as error:
                found.problems.append(str(error))
                break
            keys = [dataset.keys[int(dataset.index.first[shard]) + sample.row] for sample in samples]
            parts = [{"jpg": one.image, "txt": one.text, "json": one.metadata} for one in samples]
            _check_samples(None, links.files[shard].url, list(zip(keys, parts, strict=True)), decoder, found)
            report(len(samples))
    return found


def _opening_problems(folder: Path, split: str) -> list[str]:
    """The problem for which `open_dataset` refuses the split, or a wrong fingerprint."""
    try:
        dataset = open_dataset(folder, split)
    except DataError as error:
        return [str(error)]
    index = dataset.index
    with contextlib.suppress(DataError):  # damaged records, of which the check of their shard tells
        if index.fingerprint != fingerprint_of(index, split, dataset.shards, dataset.description.get("captions")):
            hint = index_command(folder, "--without-tars")
            return [f"{split}.index: wanted the fingerprint of its samples, found another; {hint}"]
    return []


def _check_shard(task: _Task, report: Callable[[int], None]) -> Findings:
    found = Findings()
    tar, index = shard_paths(task.folder, task.shard)
    try:
        with opened_unchanged(tar) as file:
            _read_through(task, tar, index, file, found, report)
    except DataError as error:
        found.problems.append(str(error))
    except OSError as error:
        name, reason = Path(error.filename or tar).name, error.strerror or error
        found.problems.append(f"{tar.name}: wanted a shard and its index, found {reason} ({name}); restore it")
    if len(found.problems) > _MAX_PROBLEMS:
        more = len(found.problems) - _MAX_PROBLEMS
        found.problems[_MAX_PROBLEMS:] = [f"{tar.name}: and {more} more"]
    return found


def _read_through(
    task: _Task, tar: Path, index: Path, file: BufferedReader, found: Findings, report: Callable[[int], None]
) -> None:
    if (length := os.fstat(file.fileno()).st_size) > task.shard["bytes"]:  # reading it might take hours
        found.problems.append(f"{tar.name}: wanted {task.shard['bytes']} bytes as in dataset.json, found {length}")
        return
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    if task.shard["sha256"] and digest != task.shard["sha256"]:
        found.problems.append(f"{tar.name}: wanted sha256 {task.shard['sha256'][:16]}..., found {digest[:16]}...")
    text = read_regular(index, "index")
    try:
        parse_index(text)
    except ValueError as error:
        found.problems.append(
            f"{index.name}: wanted `extension offset size name` of each component, found {error}; `mvlm data index`"
        )
        return
    lines = text.decode(errors="surrogateescape").splitlines()[1:]
    try:
        own = index_tar(tar, file=file)
        strange = set(lines) - set(own.lines) - set(own.unreadable)  # unreadable texts are reported below
        if strange or ("index" not in task.shard and set(own.lines) - set(lines)):
            found.problems.append(f"{index.name}: wanted the samples of {tar.name}, found others; `mvlm data index`")
        elif problem := _index_problem(task, text):
            found.problems.append(problem)
    except DataError as error:
        found.problems.append(str(error))
    decoder = ImageDecoder()
    for begin in range(0, len(lines), 32):
        samples = [_read(file, length, line) for line in lines[begin : begin + 32]]
        _check_samples(task.vocab_size, tar.name, samples, decoder, found)
        report(len(lines[begin : begin + 32]))


def _index_problem(task: _Task, text: bytes) -> str | None:
    """Difference between the split's index and a shard's DALI index, whose content is `text`; None if they agree.

    A split without an index has none.
    """
    path = index_path(task.folder, task.split)
    if not path.is_file():
        return None
    hint = index_command(task.folder, "--without-tars")
    wanted = parse_index(text)
    try:
        index = map_index(path, hint)
        if task.number < len(index.first) - 1:
            records, keys = index.shard_content(task.number)
            if keys == wanted.keys and np.array_equal(records, pack_records(wanted)):
                return None
    except DataError as error:
        return str(error)
    return f"{path.name}: wanted the samples of {task.shard['tar']} as in its DALI index, found others; {hint}"


def _read(file: BufferedReader, length: int, line: str) -> tuple[str, dict[str, bytes]]:
    """Read the components of a sample from its tar. line: of the DALI index.

    Returns the key, and the content by extension. It is empty if a component lies beyond the tar's `length` in bytes.
    """
    parts = {}
    key, components = components_of(line)
    for extension, offset, size in components:
        file.seek(min(offset, length))
        parts[extension.lower()] = file.read(size) if offset + size <= length else b""
    return key, parts


def _check_samples(
    vocab_size: int | None,
    tar: str,
    samples: Sequence[tuple[str, dict[str, bytes]]],
    decoder: ImageDecoder,
    found: Findings,
) -> None:
    images = [next((p for e, p in parts.items() if e in IMAGE_EXTENSIONS), b"") for _, parts in samples]
    decoded = decoder([image for image, _ in groupby(images)])  # questions about an image follow one another
    pixels: Any = None
    for number, ((key, parts), image) in enumerate(zip(samples, images, strict=True)):
        if number == 0 or image != images[number - 1]:
            pixels = next(decoded)
        where = f"{tar} key {key}"
        found.keys.append(key)
        if isinstance(pixels, str):
            fault = pixels if exif_first(image) == image else _UNREAD_EXIF
            found.problems.append(f"{where}: wanted an image, found that {fault}")
        else:
            header = read_header(image)
            found.formats[header if isinstance(header, str) else header.extension] += 1
            if not isinstance(header, str) and header.has_alpha:
                found.transparent += isinstance(on_white(image), np.ndarray)
            found.sizes.append((pixels.shape[1], pixels.shape[0]))
            found.image_bytes.append(len(image))
        try:
            captions = parse_captions(parts.get("txt", b""), lambda where=where: where)
            metadata = parse_metadata(parts.get("json", b""), lambda where=where: where)
        except DataError as error:
            found.problems.append(str(error))
            continue
        if unseen := [caption for caption in captions if not is_visible(caption)]:
            found.problems.append(
                f"{where}: wanted captions in which something can be seen, found {unseen[0]!a}; remove the caption, or "
                f"build the data set again"
            )
        found.captions.append(len(captions))
        found.words += [len(caption.split()) for caption in captions]
        name = text_hash(image_name(metadata) or key)
        found.texts += [(text_hash(same_words(caption)), name) for caption in captions]
        found.scripts.update(map(script_of, captions))
        if vocab_size is not None:
            try:
                tokens = split_stored_tokens(parts.get("tok", b""), len(captions), where)
            except DataError as error:
                found.problems.append(str(error))
                continue
            if any(len(ids) < 3 or ids.min() < 0 or ids.max() >= vocab_size for ids in tokens):
                found.problems.append(
                    f"{where}: wanted captions of 3 token ids or more, from 0 to {vocab_size - 1}, found others"
                )


_SHEET = (8, 6)  # images across and down
_CELL, _TEXT = 160, 36


def findings_table(folder: Path, found: dict[str, Findings]) -> str:
    """Format findings as text: a column per split, then the records that the build rejected."""
    rows: list[list[str]] = [["", *found]]

    def row(name: str, cell: Callable[[Findings], str]) -> None:
        rows.append([name, *(cell(one) for one in found.values())])

    row("images", lambda f: f"{len(f.sizes):,}")
    row("captions", lambda f: f"{sum(f.captions):,}")
    row("captions per image", lambda f: _range(f.captions))
    row("repeated captions", _repeated)
    row("words per caption", lambda f: _range(f.words))
    row("short side, pixels", lambda f: _range([min(size) for size in f.sizes]))
    row("long side, pixels", lambda f: _range([max(size) for size in f.sizes]))
    row("width over height", lambda f: _range([w / h for w, h in f.sizes], 2))
    row("file, kB", lambda f: _range([size / 1000 for size in f.image_bytes], 1))
    row("formats", lambda f: _shares(f.formats))
    if any(one.transparent for one in found.values()):
        row("transparent images", lambda f: f"{f.transparent:,}")
    row("scripts", lambda f: _shares(f.scripts))
    row("problems", lambda f: str(len(f.problems)))
    widths = [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows]
    description = read_description(folder)
    if is_linked(description):
        samples = sum(part["samples"] for part in description["splits"].values())
        text.append(f"linked: of {samples:,} samples {sum(len(f.sizes) for f in found.values()):,} were decoded")
    rejected = description.get("rejected", {})
    text += [f"rejected: {count:,} {reason}" for reason, count in sorted(rejected.items(), key=lambda item: -item[1])]
    return "\n".join(text)


def _repeated(found: Findings) -> str:
    count, *most = repeats(*np.reshape(found.texts, (-1, 2)).T)
    return f"{count:,}" + (" (R@1 of exact pairs at most {:.1f} / {:.1f} %)".format(*most) if count else "")


def _range(values: Sequence[float], digits: int = 0) -> str:
    if not values:
        return "-"
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return f"{low:.{digits}f} / {middle:.{digits}f} / {high:.{digits}f}"


def _shares(counts: Counter[str]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {100 * count / total:.0f}%" for name, count in counts.most_common(4)) or "-"


def contact_sheet(folder: Path, path: Path) -> Path:
    """Write a PNG of up to 48 images with their first captions below, spread evenly over all splits."""
    pil, draw = need("PIL.Image"), need("PIL.ImageDraw")
    splits = [open_dataset(folder, split) for split in read_description(folder)["splits"]]
    ends = np.cumsum([len(dataset) for dataset in splits])
    across, down = _SHEET
    count = min(int(ends[-1]), across * down)
    rows = np.arange(count) * int(ends[-1]) // count
    of = np.searchsorted(ends, rows, side="right")
    chosen = [(splits[k], int(row - (ends[k] - len(splits[k])))) for k, row in zip(of.tolist(), rows, strict=True)]
    rows = -(-count // across)
    sheet = pil.new("RGB", (across * (_CELL + 8) + 8, rows * (_CELL + _TEXT + 8) + 8), "white")
    pen, decoder = draw.Draw(sheet), ImageDecoder()
    for place, (dataset, i) in enumerate(chosen):
        x, y = 8 + place % across * (_CELL + 8), 8 + place // across * (_CELL + _TEXT + 8)
        (pixels,) = decoder([dataset.image_bytes(i)])
        if isinstance(pixels, str):
            pen.rectangle((x, y, x + _CELL, y + _CELL), outline="red")
            pen.text((x + 4, y + 4), pixels, fill="red")
        else:
            image = pil.fromarray(pixels)
            image.thumbnail((_CELL, _CELL))
            sheet.paste(image, (x + (_CELL - image.width) // 2, y + (_CELL - image.height) // 2))
        for line, words in enumerate(_lines(pen, dataset.captions(i)[0])):
            pen.text((x, y + _CELL + 2 + 12 * line), words, fill="black")
    sheet.save(path)
    return path


def _lines(pen: Any, caption: str) -> list[str]:
    """Break a caption into at most three lines that fit below an image."""
    lines = [""]
    for word in caption[:200].split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) <= _CELL or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > 3:
        lines[2:] = [lines[2] + " ..."]
    return [line if pen.textlength(line) <= _CELL else line[:20] + " ..." for line in lines]
