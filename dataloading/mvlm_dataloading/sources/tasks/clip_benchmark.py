"""Data sets in the layout of CLIP_benchmark: WebDataset tars beside class names and templates.

https://github.com/LAION-AI/CLIP_benchmark
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import decode_text
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.sources.record import Piece, Record, Source, require_folder
from mvlm_dataloading.sources.tar_samples import read_samples
from mvlm_dataloading.sources.webdataset import TarPiece, tar_pieces

_SPLITS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
_TEMPLATE = "a photo of a {c}."


def clip_benchmark(root: Path, name: str = "", licence: str = "") -> Source:
    """A data set for classification or retrieval.

        ROOT/classnames.txt, ROOT/zeroshot_classification_templates.txt    one a line; a template has {c} for the class
        ROOT/dataset_type.txt                                              classification (also if absent) or retrieval
        ROOT/{train,test}/0.tar, 1.tar, ..., nshards.txt                   KEY.webp|png|jpg with KEY.cls or KEY.txt

    For classification, `label` is the class name, `class` its number, and the text is the class name in the first
    template. All names and templates are in the recipe of dataset.json, as `classes` and `templates`.

    Args:
        name: name of the data set. Default: that of the folder.

    Raises:
        DataError: a file or folder is missing, has another format, or the data set is of another type.
    """
    kind = _lines(root / "dataset_type.txt", ["classification"])[0]
    if kind not in ("classification", "retrieval"):
        raise DataError(f"{root}/dataset_type.txt: wanted classification or retrieval, found {kind}; not supported")
    folders: dict[str, Path] = {}
    for published, split in _SPLITS.items():
        if any((root / published).glob("*.tar")):
            if split in folders:
                raise DataError(f"{root}: wanted one folder of the split {split}, found two; remove {published}")
            folders[split] = root / published
    if not folders:
        require_folder(root / "test")
        raise DataError(f"{root / 'test'}: wanted tars, found none; give the folder that holds classnames.txt")
    pieces, recipe = tar_pieces({split: [folder] for split, folder in folders.items()})
    found: list[Piece] = list(pieces)
    if kind == "classification":
        classes = _lines(root / "classnames.txt", gaps=False)
        templates = _lines(root / "zeroshot_classification_templates.txt", [_TEMPLATE])
        wrong = [template for template in templates if "{c}" not in template]
        if wrong:
            raise DataError(f"{root}: wanted templates with {{c}} for the class, found {wrong[0]!r}; repair it")
        recipe |= {"classes": classes, "templates": templates}
        found = [LabelledPiece(piece, tuple(classes), templates[0]) for piece in pieces]
    return Source(
        name=name or root.resolve().name,
        origin="tars in the layout of CLIP_benchmark",
        licence=licence,
        recipe=recipe,
        pieces=found,
        questions=kind == "classification",
    )


def _lines(file: Path, default: list[str] | None = None, gaps: bool = True) -> list[str]:
    """The nonblank lines of a file, or the default if it is missing. DataError if there is no line.

    Without `gaps`, also for a blank line between others, which would change the numbers of the lines after it.
    """
    if not file.is_file() and default is not None:
        return default
    text = decode_text(file.read_bytes()) if file.is_file() else None
    lines = [line.strip() for line in (text or "").rstrip().splitlines()]
    if not gaps and "" in lines:
        raise DataError(f"{file}: wanted a name in every line, found line {lines.index('') + 1} blank; restore it")
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"{file}: wanted lines of text in UTF-8, found none; restore it")
    return lines


@dataclass(frozen=True, slots=True)
class LabelledPiece:
    """A tar of images with class numbers."""

    tar: TarPiece
    classes: tuple[str, ...]
    template: str

    @property
    def split(self) -> str:
        return self.tar.split

    @property
    def label(self) -> str:
        return self.tar.label

    def records(self, max_bytes: int) -> Iterator[Record]:
        """Yield the records with the class name in the template as the caption."""
        for sample in read_samples(self.tar.path, max_bytes):
            record = self.tar.record(sample, {})
            if record.fault is not None:
                yield record
                continue
            number = _number(sample.parts.get("cls"))
            if number is None or not 0 <= number < len(self.classes):
                yield replace(record, captions=(), fault="class is not a number of a line of classnames.txt")
                continue
            label = self.classes[number]
            metadata: dict[str, Any] = {**record.metadata, "label": label, "class": number}
            caption = self.template.replace("{c}", label)
            yield replace(record, captions=[caption], metadata=metadata)


def _number(text: bytes | None) -> int | None:
    try:
        return int((text or b"").decode())
    except (ValueError, UnicodeDecodeError):
        return None
