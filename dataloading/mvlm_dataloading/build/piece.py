"""Writing one piece of a source as tars, in a worker process. `assemble` joins the pieces to a data set.

    PIECE/000.tar, 000.idx, ...   the samples, in tars of bounded size
    PIECE/samples.jsonl           a line per record, in order: tar, size and hashes, or the reason for its rejection
    PIECE/shards.json             samples, captions, bytes and sha256 of each tar

A piece is written to a temporary folder, which is renamed when it is complete and on the disk.
"""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mvlm_dataloading.captions import clean_captions
from mvlm_dataloading.errors import DataError
from mvlm_dataloading.files import place_folder, write_file
from mvlm_dataloading.images.dali_decoder import ImageDecoder
from mvlm_dataloading.images.limits import UNDECODABLE, limits_of_build
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.record import BAD_KEY, KEY_PATTERN, ImageStrip, Piece, Record
from mvlm_dataloading.tokenizer import Tokenizer, load_tokenizer

from .image_check import (
    StoredHeader,
    check_header,
    encode_jpeg,
    encode_png,
    exif_first,
    is_too_long_for_jpeg,
    on_white,
    perceptual_hash,
    read_header,
    read_image,
)
from .shard_writer import Shard, components_of_sample, pack_tokens

CRASHED = "the decoder dies on the image"
_GROUP, _GROUP_BYTES = 64, 32 << 20


@dataclass(slots=True)
class _Candidate:
    """A record that has passed all checks except decoding."""

    number: int
    record: Record
    image: bytes
    header: StoredHeader
    captions: list[str]


def write_piece(
    piece: Piece, target: Path, options: BuildOptions, crashes: dict[str, list[int]], report: Callable[[int], None]
) -> None:
    """Write a piece to the folder `target`. If another process has finished it first, its result is kept.

    Args:
        crashes: numbers, within the piece, of records that killed a decoder alone ("fatal") or as part of a batch
            ("suspect").
        report: called with numbers of records done.
    """
    # Another process may be writing the piece too, on another machine: one that has lost its build and does not know.
    aside = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    aside.mkdir(parents=True)
    writer = _PieceWriter(aside, options, crashes)
    try:
        for group in _groups(piece.records(options.max_image_bytes), options.max_image_bytes):
            writer.add_group(group)
            report(len(group))
        writer.close()
        try:
            place_folder(aside, target)
        except OSError:
            if not (target / "shards.json").is_file():  # else another process finished it first, with equal bytes
                raise
    finally:
        writer.abandon()
        shutil.rmtree(aside, ignore_errors=True)


class _PieceWriter:
    def __init__(self, folder: Path, options: BuildOptions, crashes: dict[str, list[int]]):
        self._folder, self._options = folder, options
        self._fatal, self._suspect = set(crashes.get("fatal", ())), set(crashes.get("suspect", ()))
        self._decoder = ImageDecoder(options.max_pixels)
        self._tokenizer: Tokenizer | None = load_tokenizer(options.tokenizer) if options.tokenizer else None
        self._lines = (folder / "samples.jsonl").open("w", encoding="utf-8")
        self._shard: Shard | None = None
        self._shards: list[dict[str, Any]] = []
        """Entries of `shards.json` for the tars that are finished."""
        self._seen = 0
        self._stored: tuple[bytes, tuple[bytes, str, dict[str, Any]] | str] | None = None
        """The image that was prepared last, as published, and the result of `_prepare` for it. Equal images in a row
        share it."""

    def add_group(self, group: list[Record]) -> None:
        """Check a group of records, decode those that pass, and write the usable ones."""
        checked = [self._check(self._seen + i, record) for i, record in enumerate(group)]
        self._seen += len(group)
        candidates = [one for one in checked if isinstance(one, _Candidate)]
        decoded = self._decode(candidates)
        for record, one in zip(group, checked, strict=True):
            if isinstance(one, _Candidate):
                pixels = next(decoded)
                reason = pixels if isinstance(pixels, str) else self._write(one, pixels)
            else:
                reason = one
            if reason is not None:
                self._write_line({"key": record.key, "reason": reason, "where": record.where})
        assert next(decoded, None) is None  # runs the generator to its end, which removes the note

    def close(self) -> None:
        self._close_shard()
        self._lines.flush()
        os.fsync(self._lines.fileno())
        self._lines.close()
        write_file(self._folder / "shards.json", json.dumps(self._shards))

    def abandon(self) -> None:
        """Close open files after an error. Has no effect after `close`."""
        for closing in (self._lines, *([self._shard.tar] if self._shard else [])):
            with contextlib.suppress(OSError):  # after a full disk, closing fails too
                closing.close()

    def _check(self, number: int, record: Record) -> _Candidate | str:
        """Check a record without decoding its image.

        Returns a candidate to be decoded, or the reason for its rejection.
        """
        options = self._options
        if record.fault is not None:
            return record.fault
        if not KEY_PATTERN.fullmatch(record.key):
            return BAD_KEY
        captions = clean_captions(record.captions, options.max_caption_bytes, options.max_captions)
        if isinstance(captions, str):
            return captions
        if record.image is None:
            return "no image"
        if isinstance(record.image, ImageStrip):
            image = _compose(record.image, options)
        else:
            image = read_image(record.image, options.max_image_bytes)
        if isinstance(image, str):
            return image
        header = check_header(image, options)
        if isinstance(header, str):
            return header
        if number in self._fatal:
            return CRASHED
        return _Candidate(number, record, image, header, captions)

    def _decode(self, candidates: list[_Candidate]) -> Iterator[Any]:
        """Yield the pixels of each candidate in order, uint8 (height, width, 3), or the reason for its rejection.

        The file `decoding` in the folder names the records that are being decoded, in case they kill the process.
        """
        note = self._folder / "decoding"
        unsuspected = [one for one in candidates if one.number not in self._suspect]
        together = json.dumps([one.number for one in unsuspected])
        note.write_text(together)
        decoded = self._decoder([exif_first(image) for image, _ in groupby(one.image for one in unsuspected)])
        last, pixels = None, None
        for one in candidates:
            suspect = one.number in self._suspect
            if (suspect, one.image) != last:  # questions about an image follow one another
                last = suspect, one.image
                if suspect:
                    note.write_text(json.dumps([other.number for other in candidates if other.image == one.image]))
                    pixels = next(self._decoder([exif_first(one.image)]))
                    note.write_text(together)
                else:
                    pixels = next(decoded)
            yield pixels
        note.unlink()

    def _write(self, one: _Candidate, pixels: Any) -> str | None:
        """Write a decoded sample to the current tar. Returns None, or the reason if it has to be rejected after all.

        pixels: uint8 (height, width, 3).
        """
        options, record = self._options, one.record
        if is_too_long_for_jpeg(pixels, options):
            return "image is too long for a JPEG"
        if self._stored is None or self._stored[0] != one.image:
            self._stored = one.image, self._prepare(one, pixels)
        prepared = self._stored[1]
        if isinstance(prepared, str):
            return prepared
        (image, extension, facts), captions, tokens = prepared, one.captions, None
        if self._tokenizer is not None:
            captions, tokens = pack_tokens(self._tokenizer, captions, options.text_length)
            if not captions:
                return "caption has no token"
        parts = components_of_sample(extension, image, captions, {**record.metadata, **facts})
        if tokens is not None:
            parts.append(("tok", tokens))
        if self._shard is not None and not self._shard.fits(parts, options.shard_bytes):
            self._close_shard()
        if self._shard is None:
            self._shard = Shard(self._folder / f"{len(self._shards):03d}.tar")
        self._shard.write(record.key, parts, num_captions=len(captions))
        tar = len(self._shards)
        self._write_line({"key": record.key, "tar": tar, "captions": len(captions), **facts, "where": record.where})
        return None

    def _prepare(self, one: _Candidate, pixels: Any) -> tuple[bytes, str, dict[str, Any]] | str:
        """Turn a decoded candidate into (image file, extension, its columns in the index), or the reason to reject it.

        pixels: uint8 (height, width, 3).
        """
        options, image, extension = self._options, exif_first(one.image), one.header.extension
        white = on_white(image) if one.header.has_alpha else None
        if isinstance(white, str):
            return white
        pixels = pixels if white is None else white
        height, width = pixels.shape[:2]
        small = options.short_side is None or min(height, width) <= options.short_side
        if options.quality is not None or not small:
            image, extension = encode_jpeg(pixels, options.short_side, options.quality or 90), "jpg"
            header = read_header(image)
            assert isinstance(header, StoredHeader), header
            height, width = header.height, header.width
        elif white is not None:
            image, extension = encode_png(white), "png"
        known = perceptual_hash(pixels)
        facts = {
            "width": width,
            "height": height,
            "sha256": hashlib.sha256(one.image).hexdigest(),
            "phash": None if known is None else f"{known:016x}",
        }
        return image, extension, facts

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._shards.append({"captions": self._shard.captions, **self._shard.close()})
            self._shard = None

    def _write_line(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")


def _groups(records: Iterator[Record], max_bytes: int) -> Iterator[list[Record]]:
    """Divide records, in order, into groups that are decoded together, of bounded number and total image size."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += _size(record.image, max_bytes)
        if len(group) == _GROUP or size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _size(image: Path | bytes | ImageStrip | None, max_bytes: int) -> int:
    """Bytes by which an image counts towards the size of its group.

    A file that cannot be read or is too large counts 0.
    """
    if isinstance(image, bytes):
        return len(image)
    if not isinstance(image, Path):
        return 1 << 18  # about that of a strip, which is small
    try:
        size = image.stat().st_size
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return 0
    return size if size <= max_bytes else 0


def _compose(strip: ImageStrip, options: BuildOptions) -> bytes | str:
    """The encoded strip, or the reason for which one of its images cannot be used."""
    contents = []
    for file in strip.files:
        content = read_image(file, options.max_image_bytes)
        header = content if isinstance(content, str) else check_header(content, options)
        if isinstance(header, str):
            return header
        contents.append(content)
    try:
        return strip.compose(contents, limits_of_build(options.max_pixels))
    except DataError:
        return UNDECODABLE
