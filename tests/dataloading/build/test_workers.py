"""Worker processes of a script that they cannot import."""

import subprocess
import sys

import pytest
from PIL import Image

SCRIPT = """
from pathlib import Path
from mvlm_dataloading import build_shards
from mvlm_dataloading.sources.folder import folder

build_shards(folder(Path("images")), Path("out"), workers=1)
"""


@pytest.mark.slow
def test_a_script_that_calls_outside_of_its_main_part_is_told_so(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "images/a.png")
    (tmp_path / "images/a.txt").write_text("a black square")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("mvlm_dataloading.errors.DataError: worker processes: wanted a program that they can import")
    assert "put a script's calls under `if __name__ == '__main__':`" in last
    assert "another one takes over" not in done.stderr
