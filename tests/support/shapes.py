"""The committed data set, whose bytes never change: 60 training, 8 validation and 8 test images of simple shapes.

`tests/promises/faults/make_data.py` drew it.
"""

import os
import shutil
from pathlib import Path

SHAPES = Path(__file__).parents[1] / "promises" / "faults" / "data"


def copy_shapes(folder: Path) -> Path:
    """Copy the data set to `folder`, which must not exist. Returns `folder`."""
    shutil.copytree(SHAPES, folder)
    for index in folder.glob("*.idx"):
        os.utime(index)  # a checkout may write a tar after its index, which then looks outdated
    return folder
