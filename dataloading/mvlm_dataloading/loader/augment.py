"""Flip and RandAugment: random parameters per sample, and the DALI stages that apply them.

On a CPU every image operation costs a pass over memory, so operations are combined: all geometric ones become one warp
by one matrix, brightness and contrast one multiplication. An image skips the stages that would not change it.

Two things differ from RandAugment as published (Cubuk et al. 2020): the stages have a fixed order, and the operations
of an image are distinct.

    warp -> colour -> posterize -> solarize -> equalize -> autocontrast -> contrast and brightness -> sharpness -> flip

Operations at magnitude m of 0 to 30, with a random sign where one is possible, on pixels x in 0..255. Each result is
rounded and clamped to 0..255. All but equalize match Pillow's `ImageEnhance` and `ImageOps`, as the tests check:

    shear_x, shear_y          by 0.3 m/30 about the centre       translate_x, translate_y   by 150/331 m/30 of the side
    rotate                    by 30 m/30 degrees about the centre      (nearest pixel; outside is 128)
    colour                    f x + (1 - f) grey(x), f = 1 +- 0.9 m/30
    contrast                  f x + (1 - f) mean of grey             brightness   f x
    sharpness                 f x + (1 - f) smooth(x), smooth the 3 x 3 kernel (1 1 1; 1 5 1; 1 1 1) / 13
    posterize                 the upper 8 - round(4 m/30) bits       solarize     255 - x where x >= 256 (1 - m/30)
    autocontrast              each channel stretched to 0..255
    equalize                  each channel: 255 (c(x) - c0) / (c(255) - c0), c counts pixels up to x, c0 its first step
    identity

Shape legend: n samples, S image side.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mvlm_dataloading.randomness import Purpose, hash64, uniforms

OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "colour", "contrast", "brightness",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
MAX_MAGNITUDE = 30
FILL = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Augment:
    """Augmentations of training images after the crop, all off by default; the crop's shape; and the images in a strip.

    Raises:
        ValueError: a setting is out of its range.
    """

    flip: float = 0.0
    """Probability of a horizontal flip. 0 by default, because captions say left and right."""
    operations: int = 0
    """Number of distinct RandAugment operations per image; 2 is usual."""
    magnitude: int = 9
    """Strength of these operations, 0 to 30."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of a random crop's width over its height."""
    strip: int = 1
    """Number n of square images that each stored image holds side by side, (S', n S'). Each is cropped alike and
    resized; batches hold them as (B, 3, S, n S). Patch masks are those of one image. Strips are not augmented."""

    def __post_init__(self) -> None:
        for name, value, high in (
            ("flip", self.flip, 1),
            ("operations", self.operations, len(OPERATIONS)),
            ("magnitude", self.magnitude, MAX_MAGNITUDE),
        ):
            if not 0 <= value <= high:
                raise ValueError(f"wanted {name} from 0 to {high}, got {value}")
        if self.strip < 1 or (self.strip > 1 and not self.is_identity):
            raise ValueError(f"wanted strip of at least 1, and no augmentation if it is above 1, got {self.strip}")

    @property
    def is_identity(self) -> bool:
        """True if these settings change no image."""
        return not (self.flip or self.operations)


class AugmentParameters(NamedTuple):
    """Random parameters of n images. A stage changes the images whose `apply_*`, bool (n,), is True."""

    apply_warp: NDArray[np.bool_]
    matrix: NDArray[np.float32]
    """(n, 2, 3): maps the position of a pixel in the result to its source, (x, y) with pixel centres at 0.5."""
    apply_colour: NDArray[np.bool_]
    colour: NDArray[np.float32]
    apply_posterize: NDArray[np.bool_]
    bits: NDArray[np.uint8]
    """(n,), bits of a value that posterizing keeps, as a mask."""
    apply_solarize: NDArray[np.bool_]
    threshold: NDArray[np.uint8]
    apply_equalize: NDArray[np.bool_]
    apply_autocontrast: NDArray[np.bool_]
    apply_tone: NDArray[np.bool_]
    contrast: NDArray[np.float32]
    brightness: NDArray[np.float32]
    apply_sharpness: NDArray[np.bool_]
    kernel: NDArray[np.float32]
    """(n, 3, 3), convolution kernel of the sharpness."""
    flip: NDArray[np.int32]

    def rows(self, rows: NDArray[np.int64]) -> list[NDArray]:
        """Parameters of the images `rows`, as a list for DALI's external source."""
        return [values[rows] for values in self]


def draw_parameters(augment: Augment, seed: int, epochs: Any, ids: NDArray[np.int64], side: int) -> AugmentParameters:
    """Parameters of n samples as a function of (seed, epoch, sample id), for images of `side` pixels.

    Args:
        epochs: one number, or int (n,).
    """
    n = len(ids)
    keys = hash64(hash64(Purpose.AUGMENT, seed, epochs, ids)[:, None], np.arange(len(OPERATIONS)))
    chosen = np.argsort(keys, axis=1, kind="stable")[:, : augment.operations]  # (n, operations), in the order drawn
    # The last draw is the flip's. The three before it were those of colour jitter, which is gone.
    u = uniforms(Purpose.SIGN, seed, epochs, ids, len(OPERATIONS) + 4)
    level = augment.magnitude / MAX_MAGNITUDE
    signed = np.where(u[:, : len(OPERATIONS)] < 0.5, -level, level)  # (n, operations)
    done = {name: (chosen == k).any(axis=1) for k, name in enumerate(OPERATIONS)}  # (n,) each

    def factor(name: str) -> NDArray[np.float64]:
        return np.where(done[name], 1 + 0.9 * signed[:, OPERATIONS.index(name)], 1.0)

    matrix = np.broadcast_to(np.eye(3), (n, 3, 3))
    # The matrix maps the result to the source, so the operation drawn first is the leftmost factor.
    for turn in range(augment.operations):
        matrix = matrix @ _matrices(chosen[:, turn], signed, side)
    contrast, brightness, colour = factor("contrast"), factor("brightness"), factor("colour")
    sharpness = factor("sharpness")[:, None, None]
    smooth = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
    return AugmentParameters(
        apply_warp=(matrix != np.eye(3)).any(axis=(1, 2)),
        matrix=matrix[:, :2].astype(np.float32),
        apply_colour=colour != 1,
        colour=colour.astype(np.float32),
        apply_posterize=done["posterize"],
        bits=np.full(n, (0xFF << round(4 * level)) & 0xFF, np.uint8),
        apply_solarize=done["solarize"] & (level > 0),
        threshold=np.full(n, min(255, round(256 * (1 - level))), np.uint8),
        apply_equalize=done["equalize"],
        apply_autocontrast=done["autocontrast"],
        apply_tone=(contrast != 1) | (brightness != 1),
        contrast=contrast.astype(np.float32),
        brightness=brightness.astype(np.float32),
        apply_sharpness=sharpness[:, 0, 0] != 1,
        kernel=((1 - sharpness) * smooth + sharpness * np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])).astype(np.float32),
        flip=(u[:, -1] < augment.flip).astype(np.int32),
    )


def _matrices(operation: NDArray[np.int64], signed: NDArray[np.float64], side: int) -> NDArray[np.float64]:
    """Matrices (n, 3, 3) that map pixel positions (x, y, 1) of the result to the source, one operation per image.

    Identity for an operation that moves no pixels.

    Args:
        operation: int64 (n,), index in `OPERATIONS`.
        signed: float64 (n, operations), magnitude of each operation from -1 to 1.
        side: of the images, in pixels.
    """
    n = len(operation)
    amount = signed[np.arange(n), operation]
    linear = np.broadcast_to(np.eye(2), (n, 2, 2)).copy()
    shift = np.zeros((n, 2))
    for k, (y, x) in {1: (0, 1), 2: (1, 0)}.items():  # shear_x, shear_y
        linear[operation == k, y, x] = 0.3 * amount[operation == k]
    for k, axis in {3: 0, 4: 1}.items():
        shift[operation == k, axis] = 150 / 331 * side * amount[operation == k]
    turned = operation == OPERATIONS.index("rotate")
    angle = np.radians(30 * amount[turned])
    linear[turned] = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], -1).reshape(-1, 2, 2)
    centre = np.full(2, side / 2)
    matrix = np.broadcast_to(np.eye(3), (n, 3, 3)).copy()
    matrix[:, :2, :2] = linear
    matrix[:, :2, 2] = centre - linear @ centre + shift
    return matrix


def apply_augmentations(dali: Any, image: Any, parameters: list[Any]) -> Any:
    """Apply the stages before the flip, in a DALI graph with conditionals: image uint8 (S, S, 3) in and out.

    Args:
        parameters: the fields of `AugmentParameters`, as graph nodes.
    """
    fn, types, grey_of = dali.fn, dali.types, dali.pipeline.do_not_convert(_grey)
    d = AugmentParameters(*parameters)
    uint8 = types.DALIDataType.UINT8
    if d.apply_warp:
        image = fn.warp_affine(
            image, matrix=d.matrix, fill_value=FILL, interp_type=types.DALIInterpType.INTERP_NN, inverse_map=True
        )
    if d.apply_colour:
        # int16 arithmetic in sixteenths of a level takes DALI's fast paths. Its `color_twist` takes four times as long.
        grey = fn.color_space_conversion(
            grey_of(dali, image), image_type=types.DALIImageType.GRAY, output_type=types.DALIImageType.RGB
        )
        int16 = types.DALIDataType.INT16
        image = fn.brightness_contrast(image, brightness=16 * d.colour, dtype=int16)
        image = image + fn.brightness_contrast(grey, brightness=16 * (1 - d.colour), dtype=int16)
        image = fn.brightness_contrast(image, brightness=1 / 16, dtype=uint8)
    if d.apply_posterize:
        image = image & d.bits
    if d.apply_solarize:
        image = image ^ ((image >= d.threshold) * types.Constant(np.uint8(255)))
    if d.apply_equalize:
        image = fn.equalize(image)
    if d.apply_autocontrast:
        # DALI wants an operator's arguments on the host, even those of a GPU operator.
        low = fn.cast(fn.reductions.min(image, axes=[0, 1]), dtype=types.DALIDataType.FLOAT).cpu()
        high = fn.cast(fn.reductions.max(image, axes=[0, 1]), dtype=types.DALIDataType.FLOAT).cpu()
        # A channel with a single value is kept: mean 0, divisor 1.
        flat = high == low
        image = fn.crop_mirror_normalize(
            image, mean=low * (1 - flat), std=(high - low) / 255 + flat, dtype=uint8, output_layout="HWC"
        )
    if d.apply_tone:
        centre = fn.reductions.mean(grey_of(dali, image)).cpu()
        image = fn.brightness_contrast(
            image, brightness=d.brightness, contrast=d.contrast, contrast_center=centre, dtype=uint8
        )
    if d.apply_sharpness:
        image = fn.filter(image, d.kernel)
    return image


def _grey(dali: Any, image: Any) -> Any:
    fn, types = dali.fn, dali.types
    return fn.color_space_conversion(image, image_type=types.DALIImageType.RGB, output_type=types.DALIImageType.GRAY)
