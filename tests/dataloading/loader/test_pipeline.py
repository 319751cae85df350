"""The DALI graph against numpy and Pillow."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvlm_dataloading import (
    BuildOptions,
    ShardWriter,
    build_shards,
    open_dataset,
)
from mvlm_dataloading.loader.crop import CropGeometry
from mvlm_dataloading.loader.pipeline import Decoding, build_pipeline
from mvlm_dataloading.loader.sampler import write_index_views
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support import published
from support.data import make_image


def run(dataset, ids, draws, geometry, tmp_path, *, batch_size=6, decoding=Decoding.CPU):
    """Images (n, 3, S, S), corners (n, 2) and sizes (n, 2) of the samples, from the graph."""
    assert len(ids) % batch_size == 0
    pipeline = build_pipeline(
        *write_index_views(tmp_path, dataset, ids),
        lambda batch: draws[(int(batch) * batch_size + np.arange(batch_size)) % len(ids)],
        geometry,
        batch_size=batch_size,
        num_threads=1,
        decoding=decoding,
    )
    # Copied before the next run, which fills the same buffers.
    outputs = [[np.array(part.as_tensor()) for part in _images_and_windows(pipeline)] for _ in ids[::batch_size]]
    return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _images_and_windows(pipeline):
    images, *_, corner, size = pipeline.run()
    return images, corner, size


def window_oracle(height: int, width: int, u: np.ndarray, scale, ratio) -> tuple[int, int, int, int]:
    """The documented formula for one image, in Python floats: y, x, h, w."""
    area = height * width * (scale[0] + (scale[1] - scale[0]) * float(u[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** float(u[1])
    h = min(max(int(np.floor(np.sqrt(area / aspect) + 0.5)), 1), height)
    w = min(max(int(np.floor(np.sqrt(area * aspect) + 0.5)), 1), width)
    return int(float(u[2]) * (height - h + 1)), int(float(u[3]) * (width - w + 1)), h, w


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale, ratio", [((0.2, 1.0), (3 / 4, 4 / 3)), ((0.01, 0.02), (0.1, 10.0)), ((1.0, 1.0), (1.0, 1.0))]
)
def test_crops_follow_the_formula_and_pixels_match_pillow(train_split, tmp_path, scale, ratio):
    ids = np.arange(60)
    draws = np.random.default_rng(1).random((60, 4))
    draws[:4] = [[0, 0, 0, 0], [1 - 2**-53] * 4, [0, 1 - 2**-53, 0, 1 - 2**-53], [1 - 2**-53, 0, 1 - 2**-53, 0]]
    images, corners, sizes = run(
        train_split, ids, draws, CropGeometry(image_size=32, crop_scale=scale, crop_ratio=ratio), tmp_path
    )
    assert images.dtype == np.uint8
    assert images.shape == (60, 3, 32, 32)
    worst = 0.0
    for i in ids:
        pillow_image = Image.open(io.BytesIO(train_split.image_bytes(i)))
        y, x, h, w = window_oracle(pillow_image.height, pillow_image.width, draws[i], scale, ratio)
        assert (corners[i].tolist(), sizes[i].tolist()) == ([y, x], [h, w])
        assert 0 <= y <= pillow_image.height - h
        assert 0 <= x <= pillow_image.width - w
        wanted = pillow_image.crop((x, y, x + w, y + h)).resize((32, 32), Image.Resampling.BILINEAR)
        worst = max(worst, np.abs(np.array(wanted).transpose(2, 0, 1) - images[i].astype(float)).mean())
    # Rounding in two resizers, and for JPEG and WebP in two decoders: well under a level on average.
    assert worst < 1.0


def test_without_randomness_the_whole_image_is_resized(train_split, tmp_path):
    ids = np.arange(12)
    images, corners, sizes = run(
        train_split, ids, np.full((12, 4), 0.5), CropGeometry(image_size=48, random=False), tmp_path
    )
    for i in ids:
        pillow_image = Image.open(io.BytesIO(train_split.image_bytes(i)))
        assert (corners[i].tolist(), sizes[i].tolist()) == ([0, 0], [pillow_image.height, pillow_image.width])
        wanted = pillow_image.resize((48, 48), Image.Resampling.BILINEAR)
        assert np.abs(np.array(wanted).transpose(2, 0, 1) - images[i].astype(float)).mean() < 1.0


def test_grey_transparent_and_cmyk_images_become_rgb(tmp_path):
    kinds = [("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG")]
    with ShardWriter(tmp_path / "d", name="", source="", licence="", attribution="", recipe={}) as writer:
        for mode, kind in kinds:
            file = io.BytesIO()
            Image.open(io.BytesIO(make_image(4))).convert(mode).save(file, kind)
            assert writer.add(f"{mode}-{kind}", file.getvalue(), ["x"]) is None
    dataset = open_dataset(tmp_path / "d", "train")
    ids = np.arange(len(kinds))
    images, *_ = run(
        dataset, ids, np.zeros((len(ids), 4)), CropGeometry(image_size=32, random=False), tmp_path, batch_size=7
    )
    plain = np.array(Image.open(io.BytesIO(make_image(4))).resize((32, 32), Image.Resampling.BILINEAR)).transpose(
        2, 0, 1
    )
    for (mode, kind), image in zip(kinds, images, strict=True):
        expected = plain if mode not in ("L", "LA", "1") else np.broadcast_to(image[:1], image.shape)
        assert np.abs(image.astype(float) - expected).mean() < 12, (mode, kind)


def write(out: Path, numbers, splits=None, each: int = 6, captions=published.captions, **settings) -> Path:
    """A data set of the images `numbers`, in tars of `each`."""
    split_of = splits or (lambda i: "train")
    records: dict[str, list[Record]] = {}
    for i in numbers:
        image = published.encoded(published.make_image(i, (60 + i, 50)), "PNG")
        records.setdefault(split_of(i), []).append(Record(f"{out.name}{i:03d}", image, captions(i), str(i)))
    pieces = [ListedPiece(s, known[k : k + each]) for s, known in records.items() for k in range(0, len(known), each)]
    return build_shards(Source(out.name, "tests", "CC0", {}, pieces), out, BuildOptions(**settings), workers=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """20 images for training in four tars, 3 for a test."""
    return write(tmp_path_factory.mktemp("views") / "one", range(23), lambda i: "test" if i >= 20 else "train")


def test_dali_follows_indices_that_permute_select_and_repeat(one, tmp_path):
    """Views and the loader rely on this undocumented behaviour: lines in any order, in part, repeated, and tars named
    several times. Checked for the installed version."""
    lines = (one / "train-000000.idx").read_text().splitlines()[1:]
    others = (one / "train-000001.idx").read_text().splitlines()[1:]
    chosen = [[lines[i] for i in (4, 1, 1, 5)], [others[2]], [lines[i] for i in (0, 4)]]
    tars = [str(one / f"train-00000{tar}.tar") for tar in (0, 1, 0)]
    indices = []
    for number, part in enumerate(chosen):
        indices.append(tmp_path / f"{number}.idx")
        indices[-1].write_text(f"v1.2 {len(part)}\n" + "\n".join(part) + "\n")
    pipeline = build_pipeline(
        tars, [*map(str, indices)], lambda batch: np.zeros((7, 4)), CropGeometry(image_size=32, random=False),
        batch_size=7, num_threads=1,
    )  # fmt: skip
    wanted = [published.captions(i)[0] for i in (4, 1, 1, 5, 8, 0, 4)]
    for _ in range(3):  # over several epochs
        text = pipeline.run()[2]
        assert [text.at(row).tobytes().decode().split("\n")[0] for row in range(7)] == wanted


def test_dali_takes_the_extension_from_the_index(tmp_path):
    """Otherwise tars with dots in their member names could not be read in place."""
    tar = tmp_path / "dots.tar"
    image = published.encoded(published.make_image(0))
    with tarfile.open(tar, "w") as file:
        published.add_members(file, [("a.b.c.jpg", image), ("a.b.c.txt", b"dots")])
    (tmp_path / "dots.idx").write_text(
        f"v1.2 1\njpg 512 {len(image)} a.b.c.jpg txt {1536 + len(image) // 512 * 512} 4 a.b.c.txt\n"
    )
    pipeline = build_pipeline(
        [str(tar)], [str(tmp_path / "dots.idx")], lambda batch: np.zeros((1, 4)),
        CropGeometry(image_size=32, random=False),         batch_size=1, num_threads=1,
    )  # fmt: skip
    assert pipeline.run()[2].at(0).tobytes() == b"dots"
