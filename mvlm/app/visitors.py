"""Visitors of the page: which sessions and images are whose, and who still waits for an answer."""

import contextlib
import os
import secrets
import shutil
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mvlm.errors import RunError

MAX_BYTES = 20_000_000
"""Largest file."""
MAX_STORED = 1_000_000_000
"""Bytes of all images in the page's folder. The oldest go first."""
MAX_STORED_OF_ONE = 200_000_000
"""The same, of the uploads of one visitor."""
KEPT = 24 * 3600
"""Seconds that an image is kept on disk."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Ends of names under which uploads are stored. Others lose theirs: nothing but an image is served as what it says."""
MAX_SESSIONS = 2000
"""Sessions that are remembered, the newest. A page in a browser is one."""
MAX_WAIT = 60.0
"""Seconds after which a question is too old to be answered."""
GRACE = 3.0
"""Seconds that a browser has to open its stream of answers after it has asked."""


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
            self._keep_to(MAX_STORED_OF_ONE, [each for each in self._uploads.values() if each.visitor == visitor])
            self._keep_to(MAX_STORED, list(self._uploads.values()))
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
                with contextlib.suppress(OSError):  # it is gone
                    found = file.lstat()
                    if str(file) not in self._examples:
                        files.append((found.st_mtime, found.st_size, file))
            total = 0
            for written, size, file in sorted(files, reverse=True):
                total += size
                if total > MAX_STORED or now - written > KEPT:
                    self._remove(self._uploads.get(str(file), Upload(file, "", size)))

    def _keep_to(self, limit: int, uploads: list[Upload]) -> None:
        """Remove uploads, from the first on, until the others have at most `limit` bytes or one is left."""
        total = sum(upload.size for upload in uploads)
        for upload in uploads[:-1]:
            if total <= limit:
                return
            self._remove(upload)
            total -= upload.size

    def _remove(self, upload: Upload) -> None:
        self._uploads.pop(str(upload.file), None)
        upload.file.unlink(missing_ok=True)
        if upload.file.parent != self.folder:
            with contextlib.suppress(OSError):  # it holds another answer
                upload.file.parent.rmdir()


class Visitors:
    """Sessions by their visitors, and how many streams of answers each has open. May be used from any thread."""

    def __init__(self) -> None:
        self._visitors: OrderedDict[str, str] = OrderedDict()
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()

    def join(self, session: str, visitor: str) -> None:
        """Note whose the session is. RunError if it is another visitor's."""
        with self._lock:
            if self._visitors.setdefault(session, visitor) != visitor:
                raise RunError("session: wanted your own, found another's; load the page again")
            self._visitors.move_to_end(session)
            while len(self._visitors) > MAX_SESSIONS:
                self._visitors.popitem(last=False)

    def owns(self, session: str, visitor: str) -> bool:
        """True if the visitor has asked something in this session."""
        with self._lock:
            return self._visitors.get(session) == visitor

    def knows(self, session: str) -> bool:
        """True if somebody has asked something in this session, lately."""
        with self._lock:
            return session in self._visitors

    @contextmanager
    def listening(self, session: str) -> Iterator[None]:
        """Inside the block, the session has a stream of answers open."""
        with self._lock:
            self._streams[session] += 1
        try:
            yield
        finally:
            with self._lock:
                self._streams[session] -= 1
                if not self._streams[session]:
                    del self._streams[session]

    def check_waiting(self, session: str, asked: float) -> None:
        """RunError if nobody waits any more for the answer to a question, or has waited for too long.

        Args:
            asked: when it was asked, by `time.monotonic`.
        """
        waited = time.monotonic() - asked
        with self._lock:
            here = session in self._streams
        if not here and waited > GRACE:
            raise RunError("question: wanted a visitor who waits for the answer, found none; ask again")
        if waited > MAX_WAIT:
            raise RunError(f"question: wanted an answer within {MAX_WAIT:.0f} s, the page is busy; ask again later")
