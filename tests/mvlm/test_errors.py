"""Optional packages that are not installed: one line with the extra that brings them."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import mvlm
from mvlm.errors import EXTRAS, advise_install
from mvlm_dataloading.errors import need

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


def test_a_package_that_a_command_needs_late_is_named_too(run_mvlm, monkeypatch):
    monkeypatch.setattr("mvlm.cli.run_command", lambda _: need("emoji_of_nobody", "demo"))
    outcome = run_mvlm("data", "emoji")
    line = "mvlm: emoji_of_nobody is needed here and is not installed: pip install 'mvlm[demo]'"
    assert (outcome.code, outcome.err) == (2, [line])


def test_a_name_of_the_face_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for name in [name for name in sys.modules if name.startswith("mvlm.runs")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r"mvlm\.load_model: wanted the package safetensors, .*'mvlm\[train\]'"):
        _ = mvlm.load_model


def test_a_package_that_is_too_old_is_not_called_missing():
    """Else the advice installs what is there."""
    old = ModuleNotFoundError("no", name="onnxscript._framework_apis.torch_2_11")
    wanted = "wanted onnxscript._framework_apis.torch_2_11, which the installed onnxscript does not have; pip install"
    assert str(advise_install(old)).startswith(f"{wanted} --upgrade 'mvlm[export]'")
    dali = ModuleNotFoundError("no", name="nvidia.dali")  # beside other packages of that namespace
    assert advise_install(dali) == "wanted the package nvidia, which is not installed; pip install 'mvlm[data]'"
