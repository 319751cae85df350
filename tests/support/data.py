"""Small data sets of smooth images in several formats, their odd and damaged samples, and what is found in them.

Start with one of these:

- `write_dataset`: images and captions by number, through `ShardWriter`; `damaged_dataset`: some of them undecodable;
- `build_records`: records of your own, through a build;
- `write_tar`: a tar as another tool writes it, for `rebuild_indices` and sources of tars; `write_shard_by_hand`: a data
  folder of any members.

`keys_of`, `problems_of`, `captions_by_key` and `file_contents` tell what a folder holds, `refuse_to_open` that it does
not open. `tests/conftest.py` has the fixtures `waves`, `train_split`, `tokenizer`, and `served` at the URL `web`.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    BuildOptions,
    DataError,
    Dataset,
    ShardWriter,
    Tokenizer,
    build_shards,
    check_shards,
    open_dataset,
    train_tokenizer,
)
from mvlm_dataloading.dataset.sample_index import index_path
from mvlm_dataloading.sources.record import ListedPiece, Record, Source

from . import published


def make_image(i: int, *, kind: str = "PNG", size: tuple[int, int] | None = None) -> bytes:
    """Image number i as a file: waves of colour, of (height, width) `size`."""
    height, width = size or (40 + 13 * (i % 7), 90 - 11 * (i % 5))
    y, x = np.mgrid[0:height, 0:width]
    waves = [127.5 + 110 * np.sin(x / (6 + i % 3) + y / (9 + c) + 0.7 * i + c) for c in range(3)]
    file = io.BytesIO()
    Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)).save(file, kind, quality=95)
    return file.getvalue()


def make_captions(i: int) -> list[str]:
    """One to three captions, none equal to another image's."""
    return [f"picture number {i} of some waves", f"the {i}th wave", f"waves, {i} in all, seen from above at noon"][
        : 1 + i % 3
    ]


def shard_writer(folder: Path, name: str = "set", recipe: dict[str, Any] | None = None, **settings) -> ShardWriter:
    """A writer of a data set whose origin does not matter."""
    about = {"source": "tests", "licence": "CC0", "attribution": "nobody"}
    return ShardWriter(folder, name=name, recipe=recipe or {}, **about, **settings)


def write_dataset(
    folder: Path, count: int, *, max_shard_bytes: int = 1 << 30, splits=("train",), kinds=("PNG",), size=None
) -> Path:
    """A data set of `count` images in each split, of (height, width) `size` or of several sizes."""
    with shard_writer(folder, "waves", {"count": count}, max_shard_bytes=max_shard_bytes) as writer:
        for split in splits:
            for i in range(count):
                reason = writer.add(
                    f"{split}{i:04d}",
                    make_image(i, kind=kinds[i % len(kinds)], size=size),
                    make_captions(i),
                    {"number": i},
                    split=split,
                )
                assert reason is None
    return folder


def damage_images(dataset: Dataset, ids) -> None:
    """Make images undecodable in place: zero all but their first 20 bytes."""
    for i in ids:
        offset, size = dataset.locate("image", i)
        with dataset.tars[int(dataset.shard_of(i))].open("r+b") as tar:
            tar.seek(int(offset) + 20)
            tar.write(bytes(int(size) - 20))
    touch_indices(dataset)


def damaged_dataset(folder: Path, count: int, bad: Iterable[int], **settings) -> Dataset:
    """The train split of a data set of `count` images, of which those with ids `bad` are undecodable."""
    damage_images(open_dataset(write_dataset(folder, count, **settings), "train"), bad)
    return open_dataset(folder, "train")


def write_tar(path: Path, members: Sequence[tuple[str, bytes]] | Sequence[str | bytes], **settings) -> Path:
    """A tar as another tool writes it: members by name, or sample after sample 0.jpg, 0.txt, 1.jpg ... of captions."""
    named: list[tuple[str, bytes]] = []
    for i, one in enumerate(members):
        if isinstance(one, tuple):
            named.append(one)
        else:
            text = one.encode() if isinstance(one, str) else one
            named += [(f"{i}.jpg", published.encoded(published.make_image(i))), (f"{i}.txt", text)]
    with tarfile.open(path, "w", **settings) as tar:
        published.add_members(tar, named)
    return path


def write_shard_by_hand(folder: Path, members: list[tuple[str, bytes]]) -> None:
    """A data folder of one shard, which `ShardWriter` may reject, with its DALI index."""
    samples: dict[str, list[str]] = {}
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            key, extension = name.split(".", 1)
            samples.setdefault(key, []).append(f"{extension} {tar.offset + 512} {len(content)} {name}")
            published.add_members(tar, [(name, content)])
    lines = [f"v1.2 {len(samples)}", *map(" ".join, samples.values()), ""]
    path.with_suffix(".idx").write_text("\n".join(lines))
    shard = {"tar": path.name, "samples": len(samples), "bytes": path.stat().st_size, "sha256": ""}
    splits = {"train": {"samples": len(samples), "captions": 0, "shards": [shard]}}
    (folder / "dataset.json").write_text(json.dumps({"format_version": 1, "splits": splits}))


def touch_indices(dataset: Dataset) -> None:
    """Make the indices of a data set as new as its tars."""
    for path in (*(tar.with_suffix(".idx") for tar in dataset.tars), index_path(dataset.folder, dataset.split)):
        if path.exists():  # a folder has indices of its splits, of its tars, or both
            os.utime(path)


def write_waves(folder: Path) -> Path:
    """60 training and 60 test images in several shards, in three formats."""
    return write_dataset(folder, 60, max_shard_bytes=150_000, splits=("train", "test"), kinds=("PNG", "JPEG", "WEBP"))


def wave_tokenizer() -> Tokenizer:
    """A tokenizer trained on the captions of 100 images."""
    return train_tokenizer([caption for i in range(100) for caption in make_captions(i)], 400)


def make_record(
    key: str, image: Image.Image | bytes, captions: Sequence[str] = ("words",), kind: str = "PNG"
) -> Record:
    """A record of an image, encoded as `kind` unless it is bytes."""
    content = image if isinstance(image, bytes) else published.encoded(image, kind)
    return Record(key, content, list(captions), key)


def build_records(
    out: Path, splits: dict[str, list[Record]], each: int = 100, evaluation_sets: Sequence[Path] = (), **settings
) -> Path:
    """Build the records of each split as a data set, in this process, in pieces of `each`."""
    pieces = [
        ListedPiece(split, known[i : i + each]) for split, known in splits.items() for i in range(0, len(known), each)
    ]
    source = Source("set", "tests", "CC0", {}, pieces)
    return build_shards(source, out, BuildOptions(**settings), evaluation_sets=evaluation_sets, workers=0)


def build_scripts(out: Path, count: int = 10, **settings) -> Path:
    """A build of JPEGs k0, k1 ... with captions in several scripts in tars of 4, and of a test image; one is rejected.

    Image i is 60 + 10 i pixels wide and 50 high.
    """
    captions = {0: ["red and green"], 1: ["красный круг", "ein roter Kreis"], 2: ["赤い丸"], 3: ["7"]}
    records = [
        make_record(f"k{i}", published.make_image(i, (60 + 10 * i, 50)), captions.get(i, [f"number {i}"]), "JPEG")
        for i in range(count)
    ]
    test = [make_record("t", published.make_image(90), ["a", "b", "c"]), make_record("bad", b"", ["x"])]
    return build_records(out, {"train": records, "test": test}, each=4, **settings)


def build_source(source: Source, out: Path, **settings) -> dict[str, dict[str, list[str]]]:
    """Build a source in this process. Returns what `captions_by_key` gives of it."""
    return captions_by_key(build_shards(source, out, BuildOptions(**settings), workers=0))


def captions_by_key(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Captions by split and key."""
    found = {}
    for split in json.loads((folder / "dataset.json").read_text())["splits"]:
        dataset = open_dataset(folder, split)
        found[split] = {dataset.keys[i]: dataset.captions(i) for i in range(len(dataset))}
    return found


def keys_of(folder: Path, split: str = "train") -> list[str]:
    return open_dataset(folder, split).keys.tolist()


def problems_of(folder: Path) -> list[str]:
    """Problems that `check_shards` finds in all splits."""
    return [problem for findings in check_shards(folder, workers=0).values() for problem in findings.problems]


def refuse_to_open(folder: Path, *words: str, split: str = "train") -> None:
    """Check that opening fails with a message of one line that contains all `words`."""
    with pytest.raises(DataError) as caught:
        open_dataset(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def limit_cache(monkeypatch: pytest.MonkeyPatch, folder: Path, shards: float) -> int:
    """Set the size of the cache of remote data to that of `shards` of the folder's largest shards, in bytes."""
    size = int(shards * max(tar.stat().st_size for tar in folder.glob("*.tar")))
    monkeypatch.setenv("MVLM_CACHE_GB", repr(size / 1e9))
    return size


def tree_bytes(folder: Path) -> int:
    """Bytes of all files under a folder. Files may vanish meanwhile."""
    sizes = []
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            sizes.append(path.stat().st_size if path.is_file() else 0)
    return sum(sizes)


@contextmanager
def killed_before_assembly() -> Iterator[None]:
    """A context in which a build must end as if it were killed when all pieces are written."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mvlm_dataloading.build.build.assemble", stop)
        with suppress(KeyboardInterrupt):
            yield
            raise AssertionError("the build came to its end")


def read_json_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def file_contents(folder: Path) -> dict[str, bytes]:
    """The bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def state_fingerprint(index: Path, fingerprint: str) -> None:
    """Write a fingerprint into the head of a `<split>.index`, and its checksum, as docs/reference/files.md has them."""
    content = bytearray(index.read_bytes())
    content[40:72] = fingerprint.encode()
    content[104:108] = bytes(4)
    head = 112 + 24 * int.from_bytes(content[24:32], "little")
    content[104:108] = zlib.crc32(content[:head]).to_bytes(4, "little")
    index.write_bytes(content)


def exchange_texts(index: Path) -> None:
    """Give the second and third sample of a `<split>.index` of one shard each other's captions; checksums fit."""
    content = bytearray(index.read_bytes())
    records = 112 + 24
    one, two = (slice(records + 36 * i + 8, records + 36 * i + 16) for i in (1, 2))
    content[one], content[two] = content[two], content[one]
    end = records + 36 * int.from_bytes(content[16:24], "little")
    content[128:132] = zlib.crc32(content[records:end]).to_bytes(4, "little")
    content[104:108] = bytes(4)
    content[104:108] = zlib.crc32(content[:records]).to_bytes(4, "little")
    index.write_bytes(content)
