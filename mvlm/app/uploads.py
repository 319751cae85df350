"""Limits of what a visitor may send, checked before anything is decoded or computed, and the images that were sent."""

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image

from mvlm.errors import ConfigError, RunError
from mvlm.inference.images import rgb_image
from mvlm_dataloading.images.limits import ImageLimits

MAX_BYTES = 20_000_000
"""Largest file."""
LIMITS = ImageLimits(max_bytes=MAX_BYTES, max_pixels=40_000_000, max_memory=150_000_000)
"""Limits of one image. SECURITY.md lists the others."""
MAX_CHARACTERS = 1_000
"""Longest text."""
MAX_LABELS = 100
MAX_TEXTS = 1_000
"""Most texts of one question: labels times templates."""
MAX_STORED = 1_000_000_000
"""Bytes of all images in the page's folder. The oldest go first."""
MAX_STORED_OF_ONE = 200_000_000
"""The same, of the uploads of one visitor."""
KEPT = 24 * 3600
"""Seconds that an image is kept on disk."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Ends of names under which uploads are stored. Others lose theirs: nothing but an image is served as what it says."""


class Upload(NamedTuple):
    """An image that a visitor sent."""

    file: Path
    visitor: str
    size: int
    """Bytes."""


class Uploads:
    """The page's own folder: the images that visitors send, and those that Gradio writes there.

    Methods may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(os.path.realpath(folder))
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._examples: set[str] = set()
        self._lock = threading.Lock()

    def add_examples(self, files: Iterable[str]) -> None:
        """Let every visitor ask about these files, which the page stored itself, and never delete them."""
        self._examples.update(os.path.realpath(file) for file in files)

    def add(self, visitor: str, name: str, content: BinaryIO) -> Path:
        """Store an image of a visitor under a name that nobody can guess. `name` gives the end of its name alone."""
        suffix = Path(name[-20:]).suffix.lower()
        file = self.folder / f"upload-{secrets.token_hex(16)}" / f"image{suffix if suffix in SUFFIXES else ''}"
        file.parent.mkdir()
        with file.open("xb") as stored:
            shutil.copyfileobj(content, stored)
            size = stored.tell()
        with self._lock:
            self._uploads[str(file)] = Upload(file, visitor, size)
            for old in _over([each for each in self._uploads.values() if each.visitor == visitor], MAX_STORED_OF_ONE):
                self._remove(old)
            for old in _over(list(self._uploads.values()), MAX_STORED):
                self._remove(old)
        return file

    def find(self, path: object, visitor: str) -> Path:
        """The file of an example, or of an upload of this visitor.

        Raises:
            RunError: it is neither. Whether such a file exists elsewhere is not said, nor looked up.
        """
        if isinstance(path, str):
            with self._lock:
                upload = self._uploads.get(path)
            if upload is not None and upload.visitor == visitor:
                return upload.file
            if path in self._examples:
                return Path(path)
        raise RunError("image: wanted an image that you uploaded here, found another; upload it")

    def holds(self, path: object) -> bool:
        """True for the path of an example or of an upload, whoever sent it."""
        with self._lock:
            return isinstance(path, str) and (path in self._uploads or path in self._examples)

    def find_shown(self, path: str, visitor: str) -> Path:
        """The file of an image that the page shows to this visitor: one that `find` knows, or an answer.

        Answers are known to who got them: Gradio names each by a hash that needs a secret. RunError as for `find`.
        """
        try:
            return self.find(path, visitor)
        except RunError:
            parts = path.removeprefix(f"{self.folder}/").split("/")
            hashed = len(parts) == 2 and len(parts[0]) == 64 and set(parts[0]) <= set("0123456789abcdef")
            if not hashed or "\0" in path or parts[1] in ("", ".", "..") or not path.startswith(f"{self.folder}/"):
                raise
            try:
                found = os.lstat(path)
            except (OSError, ValueError):
                found = None
            if found is None or not stat.S_ISREG(found.st_mode):
                raise
            return Path(path)

    def sweep(self, now: float | None = None) -> None:
        """Delete what is older than KEPT, and the oldest files above MAX_STORED. Seconds since the epoch: `now`."""
        now = time.time() if now is None else now
        with self._lock:
            files = []
            for file in self.folder.glob("*/*"):
                if str(file) not in self._examples and (found := _status(file)) is not None:
                    files.append((found.st_mtime, found.st_size, file))
            files.sort(reverse=True)
            total = 0
            for written, size, file in files:
                total += size
                if total > MAX_STORED or now - written > KEPT:
                    self._remove(self._uploads.get(str(file), Upload(file, "", size)))

    def _remove(self, upload: Upload) -> None:
        self._uploads.pop(str(upload.file), None)
        upload.file.unlink(missing_ok=True)
        if upload.file.parent != self.folder:
            with contextlib.suppress(OSError):  # it holds another answer
                upload.file.parent.rmdir()


def _over(uploads: list[Upload], limit: int) -> list[Upload]:
    """The oldest of the uploads, oldest first, without which the others keep to the limit, in bytes."""
    total = sum(upload.size for upload in uploads)
    gone = []
    for upload in uploads[:-1]:
        if total <= limit:
            break
        gone.append(upload)
        total -= upload.size
    return gone


def _status(file: Path) -> os.stat_result | None:
    try:
        return file.lstat()
    except OSError:
        return None


def check_image(file: Path) -> Image.Image:
    """The image of an uploaded file, turned as its EXIF data say, transparent areas white.

    Raises:
        RunError: it is no regular file, or not an image within the limits. An SVG is none: it is a program, not pixels.
    """
    return rgb_image(file, "image", LIMITS)


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
