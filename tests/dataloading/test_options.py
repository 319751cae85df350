"""Options out of range."""

import pytest

from mvlm_dataloading import DataError
from support import published
from support.data import build_records, make_record


def test_build_options_out_of_range_are_refused(tmp_path):
    for name, value in (("quality", 0), ("short_side", 1), ("max_pixels", 10**9), ("max_aspect", 0.5)):
        with pytest.raises(DataError, match=f"{name.replace('_', '-')}: wanted .* to .*, got"):
            build_records(tmp_path / "out", {"train": [make_record("a", published.make_image(0))]}, **{name: value})  # pyright: ignore[reportArgumentType]
