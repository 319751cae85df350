"""Images of classes on a disk, for zero-shot classification: a folder or a tar with a folder for each class.

    imagenet/val/n01440764/ILSVRC2012_val_00000293.JPEG
    imagenet/LOC_synset_mapping.txt                          n01440764 tench, Tinca tinca

The names of the classes are those of a file that lies beside the folders or above them, or else of the folders.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from mvlm.errors import RunError
from mvlm.inference.images import LIMITS as IMAGE_LIMITS
from mvlm.untrusted import run_errors
from mvlm_dataloading.tar_walk import DamagedTar, TarWalk
from mvlm_dataloading.untrusted import open_regular, parse_json, read_regular, resolve_inside

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
NAME_FILES = (
    "classnames.txt", "class_names.txt", "classes.txt", "classnames.json", "LOC_synset_mapping.txt",
    "imagenet_class_index.json", "synset_words.txt", "words.txt",
)  # fmt: skip
"""Usual names of files that list the classes' names, in the order in which they are looked for."""
LEVELS = 4
"""Folders above the classes in which such a file is looked for; ImageNet's is four above `val`."""
_MOST_NAMES = 16 << 20
"""Largest size in bytes that is read of a file of class names or of templates: 16 MiB."""
_SYNSET = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"(n\d{8}[-_]|\d{1,4}[.])(?=.)")
"""Number in front of a class's name in that of its folder: n02085620-Chihuahua, 001.Black_footed_Albatross."""


@dataclass(frozen=True)
class ClassImages:
    """Images of classes, sorted by their paths, and the texts that stand for the classes."""

    place: Path
    """Folder or tar."""
    names: list[str]
    """Names of the classes, each once. Folders whose classes have the same name are one class."""
    templates: list[str]
    """Texts with {} for the name."""
    files: Sequence[str]
    """Path of each image in the folder or tar."""
    labels: Tensor
    """int64 (images,), number of each image's class in `names`."""
    spans: Sequence[tuple[int, int]] = ()
    """(offset, length) in bytes of each image in the tar; empty for a folder."""

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, templates, labels, paths and offsets in a tar; the images' contents are not hashed."""
        described = [self.names, self.templates, list(self.files), self.labels.tolist(), list(self.spans)]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def spread(self, number: int) -> "ClassImages":
        """A subset of `number` images at equal distances in the sorted list; all images for 0."""
        if not 0 < number < len(self):
            return self
        rows = [i * len(self) // number for i in range(number)]
        spans = [self.spans[i] for i in rows] if self.spans else ()
        return ClassImages(
            self.place, self.names, self.templates, [self.files[i] for i in rows], self.labels[rows], spans
        )

    def read(self, i: int) -> Path | bytes:
        """An image as its path, or as its bytes in a tar."""
        if not self.spans:
            with run_errors():
                return resolve_inside(self.place / self.files[i], self.place)
        start, size = self.spans[i]
        with run_errors(), open_regular(self.place) as tar:
            return os.pread(tar.fileno(), size, start)

    def name(self, i: int) -> str:
        """An image's path, for messages."""
        return f"{self.place}/{self.files[i]}"


def open_classes(place: Path, templates: Path | None = None) -> ClassImages:
    """Open images of classes, and the texts that stand for the classes.

    RunError unless `place` is a folder or an uncompressed tar in which each image lies in the folder of its class, of
    at least two; or if the names or templates cannot be read, or fit others.

    Args:
        templates: file with a text a line, with {} or {c} for a class's name. Default: the name alone.
    """
    texts = ["{}"] if templates is None else read_templates(templates)
    with run_errors():
        found = dict(sorted(_members(place) if place.is_file() else _files(place)))
    images = [file for file in found if PurePosixPath(file).suffix.lower() in ENDINGS]
    folders = {file: PurePosixPath(file).parent.name for file in images}
    classes = _sorted_folders(set(folders.values()) - {""})
    if len(classes) < 2 or "" in folders.values():
        raise RunError(
            f"{place}: wanted a folder for each of at least two classes, with its images, found "
            f"{'images outside of such folders' if '' in folders.values() else f'{len(classes)}'}; sort them"
        )
    names = _names_of(place, classes, found)
    different = list(dict.fromkeys(names.values()))
    if len(different) < 2:
        raise RunError(f"{place}: wanted at least two classes, found all of them named {different[0]!r}; name them")
    number = {name: i for i, name in enumerate(different)}
    labels = torch.tensor([number[names[folder]] for folder in folders.values()])
    spans = [span for file in images if (span := found[file]) is not None]
    return ClassImages(place, different, texts, images, labels, spans)


def read_templates(file: Path) -> list[str]:
    """Templates of a file, each with {} for the name. RunError if there are none, or if one has no place for it."""
    lines = [line.strip().replace("{c}", "{}") for line in _text(file, "a file of templates").splitlines()]
    found = [line for line in lines if line]
    wrong = next((line for line in found if "{}" not in line), None)
    if wrong is not None or not found:
        raise RunError(
            f"{file}: wanted a template a line, with {{}} for the name of a class, as in `a photo of a {{}}.`, found "
            f"{'none' if wrong is None else repr(wrong)}; correct the file"
        )
    return found


def _text(file: Path, wanted: str) -> str:
    try:
        with run_errors():
            return read_regular(file, _MOST_NAMES).decode()
    except OSError as error:
        raise RunError(f"{file}: wanted {wanted}, could not read it ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise RunError(f"{file}: wanted {wanted} in UTF-8, found other bytes; convert it") from None


Found = Iterator[tuple[str, tuple[int, int] | None]]
"""Path of each file in a folder or tar, and its place and length in a tar."""


def _files(folder: Path) -> Found:
    if not folder.is_dir():
        raise RunError(f"{folder}: wanted a folder or a tar of images of classes, found none; check --classes")
    for place, within, names in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder)
        within[:] = sorted(name for name in within if not name.startswith((".", "__"))) if len(inside.parts) < 4 else []
        for name in within:
            resolve_inside(Path(place, name), folder)
        for name in names:
            if not name.startswith("."):
                yield (inside / name).as_posix(), None


def _members(tar: Path) -> Found:
    with open_regular(tar) as file:
        walk = TarWalk(file, IMAGE_LIMITS.max_bytes)
        try:
            for member in walk:
                path = PurePosixPath(member.name)
                if member.isfile() and not any(part.startswith((".", "__")) and part != "." for part in path.parts):
                    if member.size > IMAGE_LIMITS.max_bytes or member.issparse():
                        raise RunError(f"{tar}: wanted images of at most 100 MB, found {member.name}; leave it out")
                    yield path.as_posix(), (member.offset_data, member.size)
        except DamagedTar as damage:
            raise RunError(f"{tar}: wanted an uncompressed tar, found {damage}; unpack or restore it") from None


def _sorted_folders(folders: Iterable[str]) -> list[str]:
    """Sort the folders of classes into the order that a file with a name a line has.

    It is numerical if all are numbers, else that of torchvision's ImageFolder.
    """
    folders = list(folders)
    return sorted(folders, key=int) if all(f.isascii() and f.isdecimal() for f in folders) else sorted(folders)


def _names_of(place: Path, folders: list[str], found: dict[str, tuple[int, int] | None]) -> dict[str, str]:
    """Name of each class, by its folder: from the nearest file that names all of them, else from the folder's name.

    Args:
        place: folder or tar of the images.
        folders: folders of the classes, in order.
        found: (offset, length) in a tar, None in a folder, by the path of each file.
    """
    for file in NAME_FILES:
        inside = next((path for path in found if PurePosixPath(path).name == file), None)
        if inside is not None and (span := found[inside]) is not None:
            with open_regular(place) as tar:
                content = os.pread(tar.fileno(), min(span[1], _MOST_NAMES), span[0])
            if names := parse_names(content.decode(errors="replace"), folders):
                return names
    start = place.absolute() if place.is_dir() else place.absolute().parent
    for level, above in enumerate((start, *start.parents[:LEVELS])):
        for file in NAME_FILES:
            if not (above / file).is_file():
                continue
            names = parse_names(_text(above / file, "names of classes"), folders)
            if names:
                return names
            if level == 0:
                raise RunError(
                    f"{above / file}: wanted a name for each of the {len(folders)} folders, found others; give a line "
                    f"FOLDER NAME for each, or as many names in the order of the folders"
                )
    if bare := [folder for folder in folders if _SYNSET.fullmatch(folder)]:
        raise RunError(
            f"{place}: wanted the names of its classes, found folders such as {bare[0]}; put ImageNet's "
            f"LOC_synset_mapping.txt, or a classnames.txt with a line for each folder, beside them"
        )
    return {folder: _NUMBER.sub("", folder).replace("_", " ").strip() or folder for folder in folders}


def parse_names(text: str, folders: list[str]) -> dict[str, str] | None:
    """Names of classes, by their folders, from the content of a file; None if it does not name all of them.

    It is JSON, a list of names in the order of the folders, {"0": [folder, name], ...} or {folder: name, ...}; or text,
    with a line `folder name, synonym, ...` for each, or with one name a line in the order of the folders.
    """
    try:
        value = parse_json(text)
    except ValueError:
        value = None
    keyed: dict[str, str] = {}
    ordered: list[str] = []
    if isinstance(value, list):
        ordered = [str(name) for name in value]
    elif isinstance(value, dict):
        for key, one in value.items():
            pair = one if isinstance(one, list) and len(one) == 2 else (key, one)
            keyed[str(pair[0])] = str(pair[1])
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        ordered = lines
        keyed = {key: name for key, _, name in (re.sub(r"\s", " ", line, count=1).partition(" ") for line in lines)}
        keyed = {key: name.split(",")[0] for key, name in keyed.items()}
    if set(folders) <= set(keyed) and all(keyed[folder].strip() for folder in folders):
        return {folder: keyed[folder].replace("_", " ").strip() for folder in folders}
    if len(ordered) == len(folders) and all(name.strip() for name in ordered):
        return {folder: name.replace("_", " ").strip() for folder, name in zip(folders, ordered, strict=True)}
    return None
