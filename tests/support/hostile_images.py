"""Images made to cost much, by name, and a program that measures what asking about each costs.

python -m support.hostile_images FOLDER [CHECKPOINT]    prints a line of JSON for each door and image
"""

import io
import json
import os
import resource
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

MOST_SECONDS, MOST_BYTES = 1.0, 100_000_000
"""Most that a refused image may cost: seconds of the processor, and bytes of memory."""
MOST_WAITED = 20.0
"""Seconds on the clock of a busy machine. Opening a pipe would take all of them."""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(
    width: int, height: int, rows: int, depth: int = 8, colour: int = 2, value: bytes = b"\0", more: bytes = b""
) -> bytes:
    """A PNG of a size that its header states, which holds so many rows of one value."""
    row = b"\0" + value * ((width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour] + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(row) for _ in range(rows)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def peak_memory() -> int:
    """Peak memory of this process in bytes, since `reset_peak` or from its start."""
    return _status("VmHWM")


def _status(name: str) -> int:
    """A number of bytes that the system states of this process."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) << 10


def reset_peak() -> int:
    """Let the peak be what the process has now. Returns that, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(width: int, height: int, middle: bytes = b"", scans: int = 1) -> bytes:
    """A progressive JPEG whose header states this size, with segments before it, and one scan many times."""
    whole = encoded(Image.new("RGB", (16, 16), "red"), "JPEG", progressive=True)
    size = whole.index(b"\xff\xc2") + 5
    whole = whole[:2] + middle + whole[2:size] + struct.pack(">HH", height, width) + whole[size + 4 :]
    start = whole.index(b"\xff\xda")
    end = whole.index(b"\xff", start + 4 + whole[start + 3])
    return whole[:start] + whole[start:end] * scans + whole[start:]


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, 2 + len(content)) + content


def directory(entries: int, size: int) -> bytes:
    """A TIFF directory of tags that all name the same `size` bytes behind it."""
    behind = 8 + 2 + 12 * entries + 4
    tags = b"".join(struct.pack("<HHII", 0x8000 + i, 7, size, behind) for i in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + tags + bytes(4) + bytes(size)


def animated_gif(frames: int) -> bytes:
    """A GIF of a huge screen with many frames of one pixel."""
    frame = b"\x21\xf9\x04\0\0\0\0\0\x2c\0\0\0\0\1\0\1\0\0\2\2\x44\1\0"
    return b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + frame * frames + b";"


def contents() -> dict[str, bytes]:
    """Name -> content of a file that has to be refused within MOST_SECONDS and MOST_BYTES."""
    lying = encoded(Image.new("RGB", (64, 64)), "WEBP")
    bitmap = encoded(Image.new("RGB", (8, 8)), "BMP")
    noise = encoded(Image.effect_noise((300, 300), 90).convert("RGB"), "PNG")
    return {
        "1 x 40,000,000": png(1, 40_000_000, 10, 1, 0),
        "40,000,000 x 1": png(40_000_000, 1, 0, 1, 0),
        "40,000,000 x 1, whole": png(40_000_000, 1, 1, 1, 0),
        "1 x 40,000,000, whole": png(1, 40_000_000, 0, 1, 0)[:33]
        + chunk(b"IDAT", zlib.compress(bytes(80_000_000), 1))
        + chunk(b"IEND", b""),
        "6300 x 6300": png(6300, 6300, 0),
        "6300 x 6300, whole": png(6300, 6300, 6300),
        "60000 x 60000": png(60_000, 60_000, 1),
        "ten rows of a thousand": png(100, 1000, 10, value=b"\x40"),
        "half of the rows": png(100, 100, 50, value=b"\x40"),
        "truncated": noise[: len(noise) // 2],
        "jpeg of 65500 x 65500": jpeg(65_500, 65_500),
        "jpeg of many scans": jpeg(5000, 5000, scans=50_000),
        "jpeg of many segments": jpeg(16, 16, middle=segment(0xFE, b"") * 1_000_000),
        "jpeg whose tags share their bytes": jpeg(
            16, 16, middle=segment(0xE1, b"Exif\0\0" + directory(2000, 40_000)) * 1
        ),
        "png whose tags share their bytes": png(
            16, 16, 16, more=chunk(b"eXIf", directory(5_000, 5_000_000))
        ),
        "tiff whose tags share their bytes": directory(5_000, 5_000_000),
        "png of many chunks": png(16, 16, 16, more=chunk(b"prVt", b"") * 500_000),
        "webp of 16383 x 16383": lying[:12] + b"VP8X\x0a\0\0\0" + bytes(4) + b"\xfe\x3f\0" * 2 + lying[12:],
        "gif of thousands of frames": animated_gif(5_000),
        "gif of many comments": b"GIF89a\1\0\1\0\0\0\0" + b"\x21\xfe\1a\0" * 1_000_000 + b";",
        "bmp of 60000 x 60000": bitmap[:18] + struct.pack("<ii", 60_000, 60_000) + bitmap[26:],
        "tiff of 60000 x 60000": encoded(Image.new("L", (8, 8)), "TIFF").replace(
            struct.pack("<HHII", 256, 4, 1, 8), struct.pack("<HHII", 256, 4, 1, 60_000)
        ).replace(struct.pack("<HHII", 257, 4, 1, 8), struct.pack("<HHII", 257, 4, 1, 60_000)),
        "text": b"hello",
        "nothing": b"",
    }  # fmt: skip


def places(folder: Path) -> Iterator[tuple[str, str]]:
    """Name and path of everything that is no regular file, made in the folder."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "socket"))
    (folder / "link").symlink_to("/dev/zero")
    yield from (("a pipe", str(folder / "pipe")), ("a socket", str(folder / "socket")), ("a folder", str(folder)))
    yield from (("an endless device", "/dev/zero"), ("a link to a device", str(folder / "link")))
    yield "a file of no stated size", "/proc/self/maps"
    with (folder / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    yield "a sparse file", str(folder / "sparse")


def measured(ask: Callable[[], object]) -> dict[str, Any]:
    """Seconds on the clock and of the processor, bytes of memory above those before, and the error of a call."""
    before, told = reset_peak(), None
    begin, worked = time.perf_counter(), time.process_time()
    try:
        ask()
    except Exception as error:
        told = [type(error).__name__, str(error)]
    waited, worked = time.perf_counter() - begin, time.process_time() - worked
    return {"waited": waited, "seconds": worked, "bytes": peak_memory() - before, "error": told}


def main(folder: Path, checkpoint: Path) -> None:
    """Ask about each image through each door, with at most 4 GB of addresses beyond those in use."""
    from mvlm.inference.images import decode_image, load_image
    from mvlm.tasks.load import load_model
    from mvlm_dataloading.build.image_check import check_header, on_white
    from mvlm_dataloading.images.dali_decoder import ImageDecoder
    from mvlm_dataloading.options import BuildOptions

    files = dict(places(folder))
    for number, (name, content) in enumerate(contents().items()):
        files[name] = str(folder / f"{number}.png")
        Path(files[name]).write_bytes(content)
    good = folder / "good.png"
    good.write_bytes(png(64, 64, 64))
    decoder, model = ImageDecoder(50_000_000), load_model(checkpoint, "cpu")

    def build(path: str) -> None:
        """Checks of a build before and after DALI decodes an image. ValueError with the reason."""
        content = Path(path).read_bytes()
        for found in (check_header(content, BuildOptions(max_aspect=65500)), on_white(content), *decoder([content])):
            if isinstance(found, str):
                raise ValueError(found)

    doors: dict[str, Callable[[str], object]] = {
        "load_image": lambda path: load_image(path, 64),
        "decode_image": decode_image,
        "fill": lambda path: model.fill("a [MASK]", path),
    }
    for ask in (*doors.values(), build):
        ask(str(good))  # imports, pools and models
    limit = _status("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for door, ask in doors.items():
        for name, path in files.items():
            print(
                json.dumps({"door": door, "name": name, **measured(lambda ask=ask, path=path: ask(path))}), flush=True
            )
    for name in contents():
        print(json.dumps({"door": "build", "name": name, **measured(lambda name=name: build(files[name]))}), flush=True)
