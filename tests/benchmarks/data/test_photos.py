"""The generated photographs."""

import io

import numpy as np
import pytest
from PIL import Image

from mvlm_benchmarks.data import photos
from mvlm_dataloading import open_dataset


@pytest.mark.slow
def test_photos_are_distinct_jpegs_of_photographic_size(tmp_path) -> None:
    photos.build(tmp_path / "photos", 160)
    dataset = open_dataset(tmp_path / "photos", "train")
    assert len(dataset) == 160
    files = [dataset.image_bytes(i) for i in range(160)]
    assert len(set(files)) == 160
    assert 30_000 < np.mean([len(file) for file in files]) < 90_000
    sizes = np.array([sorted(Image.open(io.BytesIO(file)).size) for file in files])
    assert (np.abs(sizes - [375, 500]) <= 21).all()
    assert all(file.startswith(b"\xff\xd8") for file in files)
