"""Writing a data set sample by sample: WebDataset tars, their DALI indices, and `dataset.json`.

    OUT/train-000000.tar   <key>.png|jpg|webp, <key>.txt (one caption per line), <key>.json (metadata)
    OUT/train-000000.idx   offset and size of each component in the tar
    OUT/train.index        the same of all tars of the split, to open it at once (see `sample_index`)
    OUT/dataset.json       counts, sha256 of each shard, source, licence, rejections by reason

Samples of a tar that have the same image, such as the questions about one, share its bytes: the first has the file, and
the others have hard links to it, as tar knows them. The index gives the place of the file for all of them.

The data set is written to `.OUT.partial`, which is renamed when it is complete. OUT, if it exists, is therefore
complete. Equal input gives equal bytes.
"""

import contextlib
import hashlib
import io
import json
import logging
import shutil
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mvlm_dataloading.captions import is_visible
from mvlm_dataloading.dataset.dali_index import IMAGE_EXTENSIONS, format_index
from mvlm_dataloading.dataset.description import (
    add_shard,
    describe_shard,
    require_free_folder,
    require_split_name,
    write_description,
)
from mvlm_dataloading.dataset.folders import LOCK, empty_folder, lock_folder
from mvlm_dataloading.dataset.open import write_index
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import place_folder, sync, write_file
from mvlm_dataloading.sources.record import BAD_KEY, KEY_PATTERN

from .image_check import prepare_image

if TYPE_CHECKING:
    from mvlm_dataloading.tokenizer import Tokenizer

log = logging.getLogger(__name__)


class ShardWriter:
    """Context manager that writes one data set. An exception inside removes everything that was written.

    Args:
        out: folder to create; an empty folder may exist. DataError if it is in use, or if another build has begun it.
        name, source, licence, attribution: copied to `dataset.json`.
        recipe: all values that determine the content (sizes, versions, limits). `already_written` compares them.

    Attributes:
        rejected: number of rejected samples by reason.
    """

    def __init__(
        self,
        out: Path,
        *,
        name: str,
        source: str,
        licence: str,
        attribution: str,
        recipe: Mapping[str, Any],
        max_shard_bytes: int = 256 << 20,
    ):
        out = Path(out).resolve()  # "." gets a name; a link is kept, and its target becomes the data set
        require_free_folder(out)
        self.out = out
        self._header = {"name": name, "source": source, "licence": licence, "attribution": attribution}
        self._recipe = dict(recipe)
        self._max_shard_bytes = max_shard_bytes
        self._partial = out.with_name(f".{out.name}.partial")
        self._lock = lock_folder(self._partial).__enter__()
        if (self._partial / "plan.json").exists():
            self._lock.release()
            raise DataError(
                f"{self._partial}: wanted nothing, or what a killed run of this command left, found the unfinished "
                "build of another one; finish it with its own command, or remove the folder"
            )
        empty_folder(self._partial)
        self._keys: set[str] = set()
        self._open: dict[str, Shard] = {}
        self._splits: dict[str, dict[str, Any]] = {}
        self.rejected: Counter[str] = Counter()

    def add(
        self,
        key: str,
        image: bytes,
        captions: Sequence[str],
        metadata: Mapping[str, Any] | None = None,
        *,
        split: str = "train",
    ) -> str | None:
        """Append one sample to a split, or reject it.

        The image file is stored unchanged, but a transparent image is stored on white, as a PNG. Captions that are
        invisible, repeated or no Unicode are dropped. White space in a caption becomes single blanks. A lone surrogate
        in the metadata becomes "?".

        Returns:
            None if the sample was written, else the reason for its rejection, which is counted in `rejected`.

        Raises:
            DataError: the split cannot be part of the name of a file.
        """
        require_split_name(split)
        lines = (" ".join(caption.split()) for caption in captions)
        captions = list(dict.fromkeys(line for line in lines if is_visible(line) and _encodes(line)))
        if not KEY_PATTERN.fullmatch(key):
            return self._reject(key, BAD_KEY)
        if key in self._keys:
            return self._reject(key, "key was used before")
        if not captions:
            return self._reject(key, "no caption")
        prepared = prepare_image(image)
        if isinstance(prepared, str):
            return self._reject(key, prepared)

        self._keys.add(key)
        stored, extension = prepared
        parts = components_of_sample(extension, stored, captions, metadata or {})
        if split in self._open and not self._open[split].fits(parts, self._max_shard_bytes):
            self._close(split)
        if split not in self._open:
            number = len(self._splits[split]["shards"]) if split in self._splits else 0
            self._open[split] = Shard(self._partial / f"{split}-{number:06d}.tar")
        self._open[split].write(key, parts, num_captions=len(captions))
        return None

    def _reject(self, key: str, reason: str) -> str:
        self.rejected[reason] += 1
        log.warning("rejected sample %r of %s: %s", key, self._header["name"], reason)
        return reason

    def finish(self) -> Path:
        """Close all shards, write `dataset.json` and all indices, and rename the folder. Returns its path."""
        for split in list(self._open):
            self._close(split)
        if not self._splits:
            raise DataError(
                f"{self._header['name']}: wanted at least one sample, found none; rejected: {dict(self.rejected)}"
            )
        write_description(self._partial, self._header, self._recipe, self._splits, self.rejected)
        for split in self._splits:
            write_index(self._partial, split)
        place_folder(self._partial, self.out)
        # NOTE: unlock after the rename. A writer that finds the folder unlocked removes what is in it.
        (self.out / LOCK).unlink()
        self._lock.release()
        return self.out

    def abandon(self) -> None:
        """Remove everything that was written."""
        for shard in self._open.values():
            with contextlib.suppress(OSError):  # after a full disk, closing fails too
                shard.tar.close()
        if self._lock.is_locked:  # after `finish` the folder may be another writer's
            shutil.rmtree(self._partial, ignore_errors=True)
            self._lock.release()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.abandon()  # after `finish` there is nothing left

    def _close(self, split: str) -> None:
        shard = self._open.pop(split)
        add_shard(self._splits, split, shard.close(), shard.captions)


def _encodes(text: str) -> bool:
    """False for a text with a lone surrogate, such as the name of a file that is not in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass
class Shard:
    """A tar that is being written, and the lines of its index."""

    path: Path
    samples: int = 0
    captions: int = 0
    index: list[str] = field(default_factory=list)
    images: dict[bytes, tuple[str, int]] = field(default_factory=dict)
    """Member name and byte offset of each image in the tar, keyed by the SHA-256 of its content."""

    def __post_init__(self) -> None:
        self.tar = tarfile.open(self.path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed in `close`)

    def fits(self, parts: Sequence[tuple[str, bytes]], max_bytes: int) -> bool:
        """True if the tar has at most `max_bytes` with a further sample. The first sample of a tar always fits.

        parts: extension and content of each file of the sample.
        """
        stored = [content for extension, content in parts if not self._stored(extension, content)]
        blocks = len(parts) + sum(-(-len(content) // tarfile.BLOCKSIZE) for content in stored)
        return not self.samples or self.tar.offset + blocks * tarfile.BLOCKSIZE <= max_bytes

    def write(self, key: str, parts: Sequence[tuple[str, bytes]], num_captions: int) -> None:
        components = []
        for extension, content in parts:
            # Time, user and group stay 0, so that equal input gives equal bytes.
            member = tarfile.TarInfo(f"{key}.{extension}")
            if stored := self._stored(extension, content):
                member.type = tarfile.LNKTYPE
                member.linkname, offset = stored
                self.tar.addfile(member)
            else:
                member.size = len(content)
                offset = self.tar.offset + tarfile.BLOCKSIZE  # names are short, so a header is one block
                self.tar.addfile(member, io.BytesIO(content))
                if extension in IMAGE_EXTENSIONS:
                    self.images[hashlib.sha256(content).digest()] = member.name, offset
            components.append(f"{extension} {offset} {len(content)} {member.name}")
        self.index.append(" ".join(components))
        self.samples += 1
        self.captions += num_captions

    def _stored(self, extension: str, content: bytes) -> tuple[str, int] | None:
        """Member name and byte offset of an equal image that the tar already has, or None."""
        return self.images.get(hashlib.sha256(content).digest()) if extension in IMAGE_EXTENSIONS else None

    def close(self) -> dict[str, Any]:
        """Force the tar and its index to the disk. Returns the shard's entry of `dataset.json`."""
        self.tar.close()
        sync(self.path)
        # Write the index last, because an index older than its tar is refused.
        write_file(self.path.with_suffix(".idx"), format_index(self.index))
        return describe_shard(self.path, self.samples)


def components_of_sample(
    extension: str, image: bytes, captions: Sequence[str], metadata: Mapping[str, Any]
) -> list[tuple[str, bytes]]:
    """Extension and content of each file of a sample."""
    described = json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return [(extension, image), ("txt", "".join(caption + "\n" for caption in captions).encode()), ("json", described)]


def pack_tokens(tokenizer: "Tokenizer", captions: Sequence[str], max_length: int) -> tuple[list[str], bytes]:
    """Tokenize the captions of a sample. Returns those that have an ordinary token, and the content of the `.tok` file.

    The file holds for each of them a count n and n ids, [CLS] ... [SEP], as little-endian int32.
    """
    tokens, lengths = tokenizer.encode(captions, max_length)
    ends = np.cumsum(lengths)
    rows = [(c, n, tokens[end - n : end]) for c, n, end in zip(captions, lengths, ends, strict=True) if n > 2]
    numbers = [number for _, n, ids in rows for number in (n, *ids)]
    return [caption for caption, _, _ in rows], np.array(numbers, "<i4").tobytes()
