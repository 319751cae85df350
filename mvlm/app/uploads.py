"""Images that visitors send to the page: where they are, whose they are, and which go."""

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from mvlm.app.shares import Shares, Visitor
from mvlm.errors import RunError

MAX_BYTES = 20_000_000
"""Largest file."""
MAX_STORED = 800_000_000
"""Bytes of all uploads. Above that, and above half of it from one address, the oldest of the greediest visitor go."""
LEAST_COUNTED = 500_000
"""Bytes for which a smaller upload counts, so that there are never too many files."""
MAX_ANSWERS = 200_000_000
"""Bytes of the images that Gradio writes. The oldest go first; a browser has shown them by then."""
KEPT = 24 * 3600
"""Seconds that an image is kept on disk."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Ends of names under which uploads are stored. Others lose theirs: nothing but an image is served as what it says."""


class Uploads:
    """The page's own folder: the images that visitors send, and those that Gradio writes there.

    Methods may be called from any thread.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = Path(os.path.realpath(folder))
        self._owners: dict[str, str] = {}  # cookies, by the paths of uploads
        self._stored: Shares[str] = Shares(MAX_STORED)
        self._examples: set[str] = set()
        self._lock = threading.Lock()

    def add_examples(self, files: Iterable[str]) -> None:
        """Let every visitor ask about these files, which the page stored itself, and never delete them."""
        self._examples.update(os.path.realpath(file) for file in files)

    def add(self, visitor: Visitor, name: str, content: BinaryIO) -> Path:
        """Store an image of a visitor under a name that nobody can guess. `name` gives the end of its name alone."""
        suffix = Path(name[-20:]).suffix.lower()
        file = self.folder / f"upload-{secrets.token_hex(16)}" / f"image{suffix if suffix in SUFFIXES else ''}"
        file.parent.mkdir()
        try:
            with file.open("xb") as stored:
                shutil.copyfileobj(content, stored)
                size = stored.tell()
        except OSError:  # the disk is full
            shutil.rmtree(file.parent)
            raise
        with self._lock:
            self._owners[str(file)] = visitor.cookie
            for gone in self._stored.add(str(file), visitor, max(size, LEAST_COUNTED)):
                self._remove(Path(gone))
        return file

    def find(self, path: object, cookie: str) -> Path:
        """The file of an example, or of an upload of the visitor with this cookie.

        Raises:
            RunError: it is neither. Whether such a file exists elsewhere is not said, nor looked up.
        """
        if isinstance(path, str):
            with self._lock:
                owner = self._owners.get(path)
            if owner == cookie or path in self._examples:
                return Path(path)
        raise RunError("image: wanted an image that you uploaded here, found another; upload it")

    def holds(self, path: object) -> bool:
        """True for the path of an example or of an upload, whoever sent it."""
        with self._lock:
            return isinstance(path, str) and (path in self._owners or path in self._examples)

    def find_shown(self, path: str, cookie: str) -> Path:
        """The file of an image that the page shows to this visitor: one that `find` knows, or an answer.

        Answers are known to who got them: Gradio names each by a hash that needs a secret. RunError as for `find`.
        """
        try:
            return self.find(path, cookie)
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
        """Delete what is older than KEPT, and the oldest answers above MAX_ANSWERS. `now`: seconds since the epoch."""
        now = time.time() if now is None else now
        with self._lock:
            files = []
            for file in self.folder.glob("*/*"):
                with contextlib.suppress(OSError):  # it is gone
                    found = file.lstat()
                    if str(file) not in self._examples:
                        files.append((found.st_mtime, found.st_size, file))
            answers = 0
            for written, size, file in sorted(files, reverse=True):
                answers += 0 if str(file) in self._owners else size
                if now - written > KEPT or (answers > MAX_ANSWERS and str(file) not in self._owners):
                    self._remove(file)

    def _remove(self, file: Path) -> None:
        self._stored.remove(str(file))
        self._owners.pop(str(file), None)
        file.unlink(missing_ok=True)
        if file.parent != self.folder:
            with contextlib.suppress(OSError):  # it holds another answer
                file.parent.rmdir()
