"""Images loaded from files, and images with masked patches."""

import numpy as np
import pytest
from PIL import Image

from mvlm.errors import RunError
from mvlm.inference.images import decode_image, load_image
from support.scenes import png


@pytest.mark.parametrize("suffix", ["", ".tiff"])
@pytest.mark.parametrize("scale, kind", [(1, np.float32), (255, np.float32), (255, np.int32), (65535, np.int32)])
def test_wide_values_are_scaled_and_not_clipped(tmp_path, suffix, scale, kind):
    """Floats from 0 to 1 or 255, and integers of 8 or 16 bits in Pillow's modes F and I."""
    ramp = np.tile(np.linspace(0, 1, 32), (32, 1))
    image = Image.fromarray((ramp * scale).astype(kind))
    if suffix:
        image.save(tmp_path / "a.tiff")
    found = decode_image(str(tmp_path / "a.tiff") if suffix else image)
    assert np.abs(found.astype(float) - 255 * ramp[..., None]).max() <= 1


@pytest.mark.parametrize("values", [[-1.0, 0.5], [0.0, 300.0], [0, 70000], [-3, 200]])
def test_values_of_no_known_range_are_refused(values):
    kind = np.int32 if isinstance(values[0], int) else np.float32
    with pytest.raises(RunError, match="image: wanted values of 8 or 16 bits"):
        decode_image(Image.fromarray(np.array([values], kind)))


def test_a_transparent_grey_of_16_bits_becomes_white(tmp_path):
    grey = np.full((32, 32), 77 << 8, np.uint16)
    grey[:, 16:] = 5
    Image.fromarray(grey).save(tmp_path / "a.png", transparency=5)
    found = load_image(tmp_path / "a.png", 32)
    assert (found[:, :, :15] == 77).all()
    assert (found[:, :, 17:] == 255).all()


def test_what_is_no_whole_image_is_refused(tmp_path):
    whole = png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name, content in {"empty.png": b"", "text.png": b"text", "cut.png": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.png").mkdir()
    for name in ("none.png", "empty.png", "text.png", "cut.png", "folder.png"):
        with pytest.raises(RunError, match=f"{name}: wanted an image"):
            load_image(tmp_path / name, 32)
