"""Augmentations against Pillow and numpy, one by one and combined."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from mvlm_dataloading import open_dataset
from mvlm_dataloading.loader.augment import OPERATIONS, Augment, AugmentParameters, draw_parameters
from mvlm_dataloading.loader.pipeline import Decoding, build_pipeline
from mvlm_dataloading.loader.pixels import CropGeometry, FileEnds
from mvlm_dataloading.randomness import Purpose, hash64, uniforms
from support.data import make_image, shard_writer

SIDE = 48


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Square PNGs of SIDE pixels, which the graph returns unchanged when nothing is augmented."""
    folder = tmp_path_factory.mktemp("squares") / "data"
    with shard_writer(folder) as writer:
        for i in range(8):
            writer.add(f"{i}", make_image(i, size=(SIDE, SIDE)), ["x"])
    return open_dataset(folder, "train")


def originals(squares, ids) -> list[Image.Image]:
    return [Image.open(io.BytesIO(squares.image_bytes(int(i)))).convert("RGB") for i in ids]


def graph(squares, ids, drawn: AugmentParameters, **settings):
    """The pipeline that loads these samples whole, augmented as drawn."""
    return build_pipeline(
        squares,
        ids,
        lambda _: np.zeros((len(ids), 4)),
        CropGeometry(image_size=SIDE, random=False),
        batch_size=len(ids),
        num_threads=1,
        augment=lambda _: drawn.rows(np.arange(len(ids))),
        file_ends=FileEnds(),
        **settings,
    )


def through_the_graph(squares, ids, drawn: AugmentParameters) -> np.ndarray:
    """uint8 (n, S, S, 3)."""
    return np.array(graph(squares, ids, drawn, prefetch=1).run()[0].as_tensor()).transpose(0, 2, 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("decoding", Decoding)
@pytest.mark.parametrize("augment", [Augment(operations=2), Augment(flip=0.5)], ids=str)
def test_gpu_graphs_can_be_defined(squares, monkeypatch, decoding, augment):
    """DALI checks devices and types while a graph is defined, which needs no GPU."""
    monkeypatch.setattr("nvidia.dali.Pipeline.build", lambda _: None)
    drawn = draw_parameters(augment, 3, np.zeros(8, np.int64), np.arange(8), SIDE)
    graph(squares, np.arange(8), drawn, device_id=0, decoding=decoding)


def drawn_operations(seed: int, epoch: int, sample: int) -> list[str]:
    """All operations, in the order in which they are drawn for a sample."""
    base = hash64(Purpose.AUGMENT, seed, epoch, sample)
    return sorted(OPERATIONS, key=lambda name: int(hash64(base, OPERATIONS.index(name))))


GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
UNSIGNED = ("identity", "posterize", "solarize", "autocontrast", "equalize")


def matrix_of(name: str, level: float, side: int) -> np.ndarray:
    """The documented geometric operation around the centre, (3, 3)."""
    centre = np.array([[1, 0, side / 2], [0, 1, side / 2], [0, 0, 1]])
    angle, shift = np.radians(30 * level), 150 / 331 * side * level
    matrix = {
        "shear_x": [[1, 0.3 * level, 0], [0, 1, 0], [0, 0, 1]],
        "shear_y": [[1, 0, 0], [0.3 * level, 1, 0], [0, 0, 1]],
        "translate_x": [[1, 0, shift], [0, 1, 0], [0, 0, 1]],
        "translate_y": [[1, 0, 0], [0, 1, shift], [0, 0, 1]],
        "rotate": [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]],
    }[name]
    return centre @ matrix @ np.linalg.inv(centre)


def pillow(name: str, image: Image.Image, sign: int, magnitude: int) -> Image.Image:
    """The documented operation, computed by Pillow."""
    level = sign * magnitude / 30
    if name in GEOMETRIC:
        return affine(image, matrix_of(name, level, SIDE)[:2].ravel().tolist())
    enhance = {"colour": "Color", "contrast": "Contrast", "brightness": "Brightness", "sharpness": "Sharpness"}
    if name in enhance:
        return getattr(ImageEnhance, enhance[name])(image).enhance(1 + 0.9 * level)
    return {
        "identity": lambda: image,
        "posterize": lambda: ImageOps.posterize(image, 8 - round(4 * magnitude / 30)),
        "solarize": lambda: ImageOps.solarize(image, round(256 * (1 - magnitude / 30))),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: equalize(image),
    }[name]()


def equalize(image: Image.Image) -> Image.Image:
    """The documented formula. Pillow rounds its steps to integers, which is far off for small images."""
    x = np.asarray(image)
    out = np.empty_like(x)
    for c in range(3):
        sums = np.cumsum(np.bincount(x[..., c].ravel(), minlength=256))
        first = sums[sums > 0][0]
        out[..., c] = np.rint((sums - first) * 255 / max(1, sums[-1] - first)).clip(0, 255)[x[..., c]]
    return Image.fromarray(out)


def affine(image: Image.Image, rows) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, rows, Image.Resampling.NEAREST, fillcolor=(128, 128, 128)
    )


@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [9, 30])
def test_each_augmentation_matches_pillow(squares, magnitude):
    """About 40 images each, with both signs of those that have one."""
    ids, epochs = np.tile(np.arange(8), 70), np.repeat(np.arange(70), 8)
    drawn = draw_parameters(Augment(operations=1, magnitude=magnitude), 3, epochs, ids, SIDE)
    found = through_the_graph(squares, ids, drawn).astype(int)
    signs = {name: {1} if name in UNSIGNED else {-1, 1} for name in OPERATIONS}
    seen = {name: set() for name in OPERATIONS}
    for image, original, epoch, i in zip(found, originals(squares, ids), epochs.tolist(), ids.tolist(), strict=True):
        name, *_ = drawn_operations(3, epoch, i)
        tries = {sign: np.asarray(pillow(name, original, sign, magnitude), int) for sign in signs[name]}
        sign, wanted = min(tries.items(), key=lambda item: np.abs(item[1] - image).mean())
        seen[name].add(sign)
        difference = np.abs(wanted - image)
        if name == "sharpness":
            difference = difference[1:-1, 1:-1]  # Pillow leaves the outermost pixels as they are
        # Pillow truncates where we round, in some operations twice. A pixel on a tie of nearest neighbours may differ.
        near = 0 if name in ("identity", "posterize", "solarize") else 2
        share = 0.02 if near and name not in GEOMETRIC else 0.005
        assert (difference > near).mean() <= (0 if near == 0 else share), (name, sign, difference.max())
    assert seen == signs


@pytest.mark.slow
def test_combined_augmentations_follow_the_documented_order(squares):
    """Five random operations and flip, against numpy in float64 from the parameters' definition."""
    ids = np.tile(np.arange(8), 10)
    augment = Augment(operations=5, magnitude=14, flip=0.5)
    drawn = draw_parameters(augment, 5, np.repeat(np.arange(10), 8), ids, SIDE)
    found = through_the_graph(squares, ids, drawn).astype(int)
    assert all(
        0 < getattr(drawn, name).mean() < 1
        for name in ("apply_warp", "apply_posterize", "apply_equalize", "apply_sharpness", "flip")
    )
    for row, original in enumerate(originals(squares, ids)):
        image = original
        if drawn.apply_warp[row]:
            image = affine(image, drawn.matrix[row].astype(float).ravel().tolist())
        x = np.asarray(image, float)
        grey = x @ [0.299, 0.587, 0.114]
        x = rounded(drawn.colour[row] * x + (1 - drawn.colour[row]) * np.rint(grey)[..., None])
        if drawn.apply_posterize[row]:
            x = (x.astype(int) & int(drawn.bits[row])).astype(float)
        if drawn.apply_solarize[row]:
            x = np.where(x >= drawn.threshold[row], 255 - x, x)
        if drawn.apply_equalize[row]:
            x = np.asarray(equalize(Image.fromarray(x.astype(np.uint8))), float)
        if drawn.apply_autocontrast[row]:
            low, high = x.min((0, 1)), x.max((0, 1))
            x = rounded((x - low) * 255 / (high - low))
        mean = np.rint(x @ [0.299, 0.587, 0.114]).mean()
        x = rounded(drawn.brightness[row] * (mean + drawn.contrast[row] * (x - mean)))
        padded = np.pad(x, ((1, 1), (1, 1), (0, 0)), "reflect")
        shifts = itertools.product(range(3), range(3))
        x = rounded(sum(drawn.kernel[row, i, j] * padded[i : i + SIDE, j : j + SIDE] for i, j in shifts))
        if drawn.flip[row]:
            x = x[:, ::-1]
        difference = np.abs(x - found[row])
        assert np.median(difference) <= 1
        # A level of difference before a threshold or a mask of bits becomes many levels after it.
        assert (difference > 6).mean() < 0.06, (row, difference.max())


def rounded(x) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255)


def test_augment_operations_are_distinct_and_evenly_drawn():
    drawn = draw_parameters(Augment(operations=2), 1, 0, np.arange(7000), 224)
    # Each of 14 operations is one of two for 2/14 of the samples: 1,000 expected, standard deviation 29.
    for kind in ("posterize", "solarize", "equalize", "autocontrast", "colour", "sharpness"):
        name = f"apply_{kind}"
        assert 880 < getattr(drawn, name).sum() < 1120, name
    assert 880 < (drawn.contrast > 1).sum() + (drawn.contrast < 1).sum() < 1120
    assert abs((drawn.colour > 1).sum() - (drawn.colour < 1).sum()) < 150
    # A pair of five geometric ones, or one of them: 1 - (9 * 8) / (14 * 13) of the samples.
    assert abs(drawn.apply_warp.mean() - (1 - 72 / 182)) < 0.03
    assert drawn.flip.sum() == 0
    assert abs(draw_parameters(Augment(flip=0.25), 1, 0, np.arange(4000), 224).flip.mean() - 0.25) < 0.03


def test_geometric_operations_compose_in_the_order_drawn():
    """The operation drawn first is applied first. Its matrix is the leftmost factor."""
    drawn = draw_parameters(Augment(operations=2, magnitude=20), 9, 4, np.arange(300), 64)
    signs = uniforms(Purpose.SIGN, 9, 4, np.arange(300), len(OPERATIONS))
    pairs = 0
    for i in range(300):
        two, wanted = drawn_operations(9, 4, i)[:2], np.eye(3)
        for name in two:
            if name in GEOMETRIC:
                sign = -1 if signs[i, OPERATIONS.index(name)] < 0.5 else 1
                wanted = wanted @ matrix_of(name, sign * 20 / 30, 64)
        assert np.allclose(wanted[:2], drawn.matrix[i], atol=1e-4)
        pairs += {*two} <= {*GEOMETRIC}
    assert pairs > 15  # 20 of 182 samples, 33 expected
