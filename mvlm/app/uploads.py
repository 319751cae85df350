"""Limits of what a visitor may send: checked before anything is decoded or computed."""

from pathlib import Path

from PIL import Image

from mvlm.errors import ConfigError
from mvlm.inference.images import decode_image

MAX_BYTES = 20_000_000
"""Largest file."""
MAX_PIXELS = 40_000_000
"""Largest image, width times height."""
MAX_CHARACTERS = 1_000
"""Longest text."""
MAX_LABELS = 100


def check_image(file: Path) -> Image.Image:
    """The image of an uploaded file, turned as its EXIF data say, transparent areas white.

    Raises:
        ConfigError: the file or the image is too large.
        RunError: it is not an image that can be decoded. An SVG is none: it is a program, not pixels.
    """
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ConfigError(
            f"image: wanted at most {MAX_BYTES // 10**6} MB, got {size / 1e6:.0f} MB; choose a smaller file"
        )
    return Image.fromarray(decode_image(file.read_bytes(), "image", MAX_PIXELS))


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
