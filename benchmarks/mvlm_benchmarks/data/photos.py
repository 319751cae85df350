"""A data set of realistic JPEGs, made from photographs in scikit-image and scikit-learn.

Each image is a random crop of one of eleven photographs, resized to about 500 x 375 or 375 x 500, with changed colours
and some noise, at JPEG quality 80 to 95. All files differ. They have about 60 kB and take as long to decode as
photographs.
"""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from mvlm.errors import ConfigError
from mvlm_dataloading import ShardWriter

PHOTOGRAPHS = (
    "skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png",
    "skimage/data/hubble_deep_field.jpg", "skimage/data/ihc.png", "skimage/data/motorcycle_left.png",
    "skimage/data/motorcycle_right.png", "skimage/data/retina.jpg", "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg", "sklearn/datasets/images/flower.jpg",
)  # fmt: skip


def build(out: Path, count: int, max_shard_bytes: int = 32 << 20) -> None:
    """Write shards of `count` images. Raises ConfigError if a package with photographs is not installed."""
    photographs = [Image.open(_find(name)).convert("RGB") for name in PHOTOGRAPHS]
    with ShardWriter(
        out,
        name="photos",
        source="photographs of scikit-image and scikit-learn",
        licence="see these packages",
        attribution="the photographers named in these packages",
        recipe={"count": count},
        max_shard_bytes=max_shard_bytes,
    ) as writer:
        for i in range(count):
            photograph = photographs[i % len(photographs)]
            name = Path(PHOTOGRAPHS[i % len(photographs)]).stem.replace("_", " ")
            caption = f"image {i} shows a part of the photograph {name}, with other colours"
            writer.add(f"{i:06d}", _variant(photograph, np.random.default_rng(i)), [caption], {"image_id": i})


def _variant(photograph: Image.Image, rng: np.random.Generator) -> bytes:
    """Make one JPEG: a random crop of the photograph, enlarged at most by about a half."""
    size = np.array([500, 375] if rng.random() < 0.75 else [375, 500]) + rng.integers(-20, 21, 2)
    whole = np.array(photograph.size)
    scale = min(1.0, (whole / size).min()) * rng.uniform(0.7, 1.0)
    crop = size * scale
    corner = rng.random(2) * (whole - crop)
    image = photograph.resize((int(size[0]), int(size[1])), Image.Resampling.BICUBIC, box=(*corner, *(corner + crop)))
    pixels = np.asarray(image, np.float32) * rng.uniform(0.8, 1.2, 3) + rng.normal(0, 3, (size[1], size[0], 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=int(rng.integers(80, 96)))
    return file.getvalue()


def _find(name: str) -> Path:
    package, _, inside = name.partition("/")
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ConfigError(f"photos: wanted {package}, which is not installed; pip install 'mvlm[bench]'")
    return Path(found.origin).parent / inside
