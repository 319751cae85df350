"""Limits of what a visitor may send: checked before anything is decoded or computed."""

import os
import stat
from pathlib import Path

from PIL import Image

from mvlm.errors import ConfigError, RunError
from mvlm.inference.images import decode_image

MAX_BYTES = 20_000_000
"""Largest file."""
MAX_PIXELS = 40_000_000
"""Largest image, width times height."""
MAX_CHARACTERS = 1_000
"""Longest text."""
MAX_LABELS = 100


def stored_file(path: object, folder: Path) -> Path:
    """The real path of a file that the page stored itself, below its own `folder`.

    Raises:
        RunError: `path` is no text, or leads out of the folder, by `..`, a link or otherwise. Whether anything is there
            is not said.
    """
    if isinstance(path, str) and "\0" not in path:
        real, inside = os.path.realpath(path), os.path.realpath(folder)
        if os.path.commonpath([real, inside]) == inside and os.path.isabs(path):
            return Path(real)
    raise RunError("image: wanted an image that was uploaded here, found another; upload it")


def check_image(file: Path) -> Image.Image:
    """The image of an uploaded file, turned as its EXIF data say, transparent areas white.

    Raises:
        ConfigError: the file or the image is too large.
        RunError: it is no regular file, or not an image that can be decoded. An SVG is none: it is a program, not
            pixels.
    """
    return Image.fromarray(decode_image(_read(file), "image", MAX_PIXELS))


def _read(file: Path) -> bytes:
    """The bytes of a regular file of at most MAX_BYTES. Nothing waits for a pipe, and no device is read."""
    missing = RunError("image: wanted an image, found none; upload it again")
    try:
        number = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        raise missing from None
    try:
        found = os.fstat(number)
        if not stat.S_ISREG(found.st_mode):
            raise missing
        with open(number, "rb", closefd=False) as opened:
            content = b"" if found.st_size > MAX_BYTES else opened.read(MAX_BYTES + 1)
    finally:
        os.close(number)
    size = max(found.st_size, len(content))
    if size > MAX_BYTES:
        raise ConfigError(
            f"image: wanted at most {MAX_BYTES // 10**6} MB, got {size / 1e6:.0f} MB; choose a smaller file"
        )
    return content


def check_text(text: str | None, name: str = "text") -> str:
    """A text without blanks around it. ConfigError if it is empty or too long."""
    text = (text or "").strip()
    if not text:
        raise ConfigError(f"{name}: wanted a text, found none; write one")
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{name}: wanted at most {MAX_CHARACTERS} characters, got {len(text):,}; shorten it")
    return text


def check_lines(text: str | None, name: str) -> list[str]:
    """The lines of a text that are not empty. ConfigError if there are too many."""
    if text and len(text) > MAX_LABELS * MAX_CHARACTERS:
        raise ConfigError(f"{name}: wanted at most {MAX_LABELS} lines, got {len(text):,} characters; shorten it")
    lines = [check_text(line, name) for line in (text or "").splitlines() if line.strip()]
    if len(lines) > MAX_LABELS:
        raise ConfigError(f"{name}: wanted at most {MAX_LABELS} lines, got {len(lines)}; leave some out")
    return lines
