"""Icons of a collection in Iconify's JSON format, the common form of some 200 open icon sets.

https://iconify.design/docs/types/iconify-json.html describes it: `icons` maps names to SVG bodies, and `aliases` names
to icons. npm's packages `@iconify-json/*` have `info.json` (author, licence) and `chars.json` (code points) beside it.

A caption is the name of an icon in words, and the names of its aliases are further captions. A mirrored or turned alias
is left out. Icons that are drawn in one colour are black on white.

Names of styles, such as "outline" and "bold", do not change the concept of an icon, and an icon is in the split of its
concept. Emoji have their names, concepts and splits of the emoji data set, so that a model may be trained on both.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import DataError

from .emoji import named_emoji, plain, split_of
from .files import read_as, read_json
from .record import Record, Source, check_shares, file_sha256, require_file, safe_key, source, split_by_hash
from .svg import RenderedPiece

HELD_OUT = ("twemoji", "noto", "noto-v1")
"""Collections for evaluation alone: transfer to artists that no model was trained on is measured with them."""
STYLES = frozenset((
    "alt", "bold", "duotone", "fill", "filled", "light", "line", "linear", "outline", "outlined", "regular", "rounded",
    "sharp", "solid", "thin", "twotone",
))  # fmt: skip
_REVISION = 2  # increment when captions, images or splits change
_PIECE = 256  # drawings
_SIDE = 16  # of an icon without sizes, as Iconify has it


@source
def iconify(
    collection: Path, /, *, size: int = 144, validation: float = 0.1, test: float = 0.1, evaluation_only: bool = False
) -> Source:
    """The icons of a collection in Iconify's JSON format: 200 open icon sets have it.

    Emoji collections get the names and splits of the emoji data set. Twemoji and Noto are for evaluation only.

    Args:
        collection: JSON file, such as icons.json of npm's package @iconify-json/mdi; info.json and chars.json beside
            it are read too.
        size: Side of the square images in pixels.
        validation: Share of the concepts for validation, chosen by a hash; "outline" and "bold" are no concepts.
        test: Share of the concepts for test.
        evaluation_only: Name the training split `seen`, so that no run can be trained on it.

    Raises:
        DataError: the collection is held out and evaluation_only is False.
    """
    require_file(collection)
    check_shares(validation, test)
    if size < 16:
        raise DataError(f"iconify: wanted size >= 16, got {size}")
    content = _read(collection)
    prefix = content["prefix"]
    if prefix in HELD_OUT and not evaluation_only:
        raise DataError(
            f"{collection}: {prefix} is held out to measure transfer, and never trained on; give --evaluation-only"
        )
    info = content.get("info") or _beside(collection, "info.json")
    licence = _text(info, "license", "title") or "unknown"
    author = ", ".join(filter(None, (_text(info, "name"), _text(info, "author", "name")))) or prefix
    emoji = _emoji_names(content.get("chars") or _beside(collection, "chars.json"), content)
    train = "seen" if evaluation_only else "train"
    records: dict[str, list[Record]] = {"test": [], train: [], "validation": []}
    for icon, svg, aliases in _icons(content):
        if icon in emoji:
            codepoints, captions, base = emoji[icon]
            split = split_of(codepoints)
        else:
            words = dict.fromkeys(words_of(name) for name in (icon, *aliases))  # its own name first
            captions = [caption for caption in words if re.search(r"[^\W\d_]{3}", caption)]  # with three letters
            base = concept(icon)
            split = split_by_hash(base, validation, test)
        if captions:
            metadata = {"name": icon, "base": base, "collection": prefix, "licence": licence, "attribution": author}
            record = Record(safe_key(f"{prefix}-{icon}"), svg.encode(), captions, icon, metadata)
            records[train if split == "train" else split].append(record)
    if not any(records.values()):
        raise DataError(f"{collection}: wanted icons with names of words, found none; give a collection of Iconify")
    return Source(
        name=f"iconify-{prefix}",
        origin=f"Iconify collection {prefix}, {collection.name}",
        licence=licence,
        attribution=author,
        recipe={
            "revision": _REVISION,
            "collection": file_sha256(collection),
            "size": size,
            "validation": validation,
            "test": test,
            "evaluation_only": evaluation_only,
            "emoji": hashlib.sha256(json.dumps(emoji, sort_keys=True).encode()).hexdigest(),
            "licence": licence,
            "attribution": author,
        },
        pieces=[
            RenderedPiece(split, listed[begin : begin + _PIECE], size)
            for split, listed in records.items()
            for begin in range(0, len(listed), _PIECE)
        ],
    )


def _icons(content: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (name, SVG, aliases) of each icon of a collection that is not hidden, sorted by name.

    An alias that turns, mirrors or crops its icon is left out.
    """
    synonyms: dict[str, list[str]] = {}
    aliases = content.get("aliases") or {}
    for alias in sorted(aliases):
        if (icon := _icon_of(alias, aliases)) is not None:
            synonyms.setdefault(icon, []).append(alias)
    for name, icon in sorted(content["icons"].items()):
        if icon.get("hidden"):
            continue
        left, top, width, height = (
            icon.get(key, content.get(key, fallback))
            for key, fallback in (("left", 0), ("top", 0), ("width", _SIDE), ("height", _SIDE))
        )
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
        yield name, svg, synonyms.get(name, [])


def _icon_of(name: str, aliases: dict[str, dict[str, Any]]) -> str | None:
    """Name of the icon that a name or an alias stands for.

    None if an alias mirrors, turns or crops its icon, or if aliases run in a circle.
    """
    seen = set()
    while name in aliases:
        if name in seen or not set(aliases[name]) <= {"parent", "hidden"}:
            return None
        seen.add(name)
        name = aliases[name]["parent"]
    return name


def words_of(name: str) -> str:
    """The name of an icon in words, without sizes: "arrow left" of `arrow-left-24`."""
    return " ".join(word for word in re.split(r"[-_\s]+", name) if not re.fullmatch(r"\d+(px)?", word))


def concept(name: str) -> str:
    """The name of an icon in words, without those of its style: "home" of `home-outline`."""
    words = words_of(name).split()
    return " ".join(word for word in words if word not in STYLES) or " ".join(words)


def _emoji_names(chars: dict[str, str], content: dict[str, Any]) -> dict[str, tuple[str, list[str], str]]:
    """Code points, captions and concept in the emoji data set, for each icon of a collection that is an emoji.

    Args:
        chars: content of chars.json: code points -> name of an icon or alias. Icon fonts have code points in areas for
            private use too, which are of no emoji.
        content: the collection.
    """
    aliases = content.get("aliases") or {}
    known: dict[str, tuple[str, list[str], str]] = {}
    if chars:
        known = {plain(stem): (stem, captions, meta["base"]) for stem, _, captions, meta in named_emoji()}
    found: dict[str, tuple[str, list[str], str]] = {}
    for points, name in sorted(chars.items()):
        entry, icon = known.get(plain(points)), _icon_of(name, aliases)
        if entry is not None and icon is not None:
            found.setdefault(icon, entry)
    return found


def _read(collection: Path) -> dict[str, Any]:
    with read_as(collection, "a collection of Iconify (prefix, icons with bodies)"):
        content = read_json(collection)
        bodies = [icon["body"] for icon in content["icons"].values()]
        parents = [entry["parent"] for entry in (content.get("aliases") or {}).values()]
        if not all(isinstance(value, str) for value in (content["prefix"], *bodies, *parents)):
            raise TypeError("prefix, a body or a parent is no text")
    return content


def _beside(collection: Path, name: str) -> dict[str, Any]:
    """A JSON object in a file beside the collection; empty without the file."""
    file = collection.with_name(name)
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise DataError(f"{file}: wanted a JSON object, got {type(found).__name__}")
    return found


def _text(info: Any, *path: str) -> str:
    """String at a path of keys in nested objects; "" where it is missing or no string."""
    for key in path:
        info = info.get(key) if isinstance(info, dict) else None
    return info if isinstance(info, str) else ""
