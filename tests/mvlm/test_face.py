"""The face of the package: the names that `import mvlm` offers."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import mvlm
from support.commands import run_python

NAMES = [
    "ConfigError",
    "DataError",
    "FinetuneConfig",
    "MaskVLM",
    "MaskVLMConfig",
    "PretrainConfig",
    "RunError",
    "TrainedModel",
    "finetune",
    "load_model",
    "pretrain",
]


def imports_for_types() -> dict[str, str]:
    """Name -> module of each import under TYPE_CHECKING in mvlm/__init__.py."""
    tree = ast.parse(Path(mvlm.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    return {node.names[0].name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom)}


def test_names_of_the_face_are_stated_once_for_types_and_once_for_import():
    assert mvlm.__all__ == NAMES == sorted(NAMES)
    assert sorted(imports_for_types()) == NAMES
    assert set(NAMES) <= set(dir(mvlm))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_face_is_the_one_that_its_module_defines(name):
    value = getattr(mvlm, name)
    assert value is getattr(import_module(imports_for_types()[name]), name)
    assert value.__name__ == name
    assert value.__module__ == imports_for_types()[name]


def test_an_unknown_name_of_the_face_is_an_error_that_lists_the_known_ones():
    with pytest.raises(
        AttributeError, match="module 'mvlm' has no attribute 'Model'; it has ConfigError, DataError, Fine"
    ):
        _ = mvlm.Model  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_imports_nothing_slow():
    """Neither torch nor numpy nor the packages' metadata, in a new process; so it takes milliseconds."""
    slow = "{'torch', 'numpy', 'mvlm.model', 'importlib.metadata'}"
    done = run_python("-c", f"import sys, mvlm; dir(mvlm); print({slow} & set(sys.modules))")
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_importing_a_configuration_imports_no_torch():
    done = run_python("-c", "import sys; from mvlm import MaskVLMConfig; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
