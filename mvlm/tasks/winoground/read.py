"""Winoground's examples as they are published: JSON lines, and a folder of images."""

from dataclasses import dataclass
from pathlib import Path

from mvlm.errors import RunError
from mvlm.tasks.records import read_json_lines

_FIELDS = ("id", "image_0", "image_1", "caption_0", "caption_1")
_ENDINGS = ("", ".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Example:
    """Two images and two captions; caption i belongs to image i."""

    id: str
    images: tuple[Path, Path]
    captions: tuple[str, str]
    tag: str
    """Kind of the exchange (`collapsed_tag`: Object, Relation or Both); empty if the file has none."""


def read_examples(file: Path, images: Path) -> list[Example]:
    """The examples of a file, in order.

    Args:
        file: JSON lines {id, image_0, image_1, caption_0, caption_1} with, if there is one, `collapsed_tag`.
        images: folder of the images, by their names in the file, with or without the ending.

    Raises:
        RunError: the file cannot be read, is empty, lacks a field, has an id twice, or an image that is not there.
    """
    found, seen = [], set()
    for number, record in enumerate(read_json_lines(file, "Winoground's JSON lines"), 1):
        missing = [name for name in _FIELDS if not str(record.get(name, "")).strip()]
        if missing:
            raise RunError(f"{file}, example {number}: wanted {', '.join(_FIELDS)}, found no {missing[0]}")
        if str(record["id"]) in seen:
            raise RunError(f"{file}: wanted each id once, found {record['id']} twice; download the file again")
        seen.add(str(record["id"]))
        found.append(
            Example(
                str(record["id"]),
                (_find(images, record["image_0"]), _find(images, record["image_1"])),
                (str(record["caption_0"]), str(record["caption_1"])),
                str(record.get("collapsed_tag") or ""),
            )
        )
    if not found:
        raise RunError(f"{file}: wanted Winoground's JSON lines, found none; download the file again")
    return found


def _find(folder: Path, name: object) -> Path:
    """The image of this name. RunError if it is not in the folder."""
    base = Path(str(name)).name  # never outside the folder
    for ending in _ENDINGS:
        if (path := folder / f"{base}{ending}").is_file():
            return path
    raise RunError(f"{folder}: wanted the image {base}, found none of that name; unpack all images there")
