"""Optional packages that are not installed: one line with the extra that brings them."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mvlm.errors import EXTRAS

EXTRAS_OF_PYPROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
]
MODULES = {"pillow": "PIL", "nvidia-dali-cuda130": "nvidia"}
"""Distribution -> its module, where they differ."""


def modules_of(extra: str) -> set[str]:
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in EXTRAS_OF_PYPROJECT[extra]}
    return {MODULES.get(name, name) for name in names}


@pytest.mark.parametrize("extra", ["train", "data", "export", "app", "search", "ray"])
def test_every_package_of_an_extra_is_known(extra):
    assert modules_of(extra) - set(EXTRAS) <= {"numpy"}, "numpy is a dependency too"
    assert {module for module, known in EXTRAS.items() if known == extra} <= modules_of(extra)


def test_a_command_without_its_package_is_refused_in_one_line(run_mvlm, monkeypatch):
    monkeypatch.setitem(sys.modules, "tyro", None)
    outcome = run_mvlm("pretrain", "tiny")
    line = "mvlm: wanted the package tyro, which is not installed; pip install 'mvlm[train]'"
    assert (outcome.code, outcome.err) == (2, [line])
    assert run_mvlm("--help").code == 0


def test_a_name_of_the_face_without_its_package_says_what_to_install():
    # In a process of its own: modules imported a second time would stay as the attributes of their package.
    code = "import sys; sys.modules['safetensors'] = None; import mvlm; mvlm.load_model"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    wanted = r"ImportError: mvlm\.load_model: wanted the package safetensors, .*'mvlm\[train\]'"
    assert re.search(wanted, done.stderr), done.stderr
