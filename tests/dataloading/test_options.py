"""Options out of range."""

import pytest

from mvlm_dataloading import DataError
from support import published
from support.data import build_records, make_record


def test_settings_that_cannot_be(tmp_path):
    for name, value in (("quality", 0), ("short_side", 1), ("max_pixels", 10**9), ("max_aspect", 0.5)):
        with pytest.raises(DataError, match=f"{name.replace('_', '-')}: wanted .* to .*, got"):
            build_records(tmp_path / "out", {"train": [make_record("a", published.picture(0))]}, **{name: value})  # pyright: ignore[reportArgumentType]
