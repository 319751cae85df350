"""The face of the package: the names that `import mvlm` offers."""

import ast
from importlib import import_module
from pathlib import Path

import pytest

import mvlm
from support.commands import run_python

NAMES = [
    *("ConfigError", "DataError", "FinetuneConfig", "MaskVLM", "MaskVLMConfig", "PretrainConfig", "RunError"),
    *("TrainedModel", "finetune", "load_model", "pretrain"),
]


def test_names_of_the_face_are_those_of_their_modules():
    tree = ast.parse(Path(mvlm.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    for_types = {node.names[0].name: node.module or "" for node in block.body if isinstance(node, ast.ImportFrom)}
    assert mvlm.__all__ == sorted(for_types) == NAMES
    assert set(NAMES) <= set(dir(mvlm))
    for name in NAMES:
        assert getattr(mvlm, name) is getattr(import_module(for_types[name]), name)
        assert getattr(mvlm, name).__module__ == for_types[name]


def test_an_unknown_name_of_the_face_is_an_error_that_lists_the_known_ones():
    with pytest.raises(AttributeError, match=r"'Model'.* ConfigError, DataError, Fine"):
        _ = mvlm.Model  # pyright: ignore[reportAttributeAccessIssue]


def test_importing_the_package_or_a_configuration_imports_nothing_slow():
    """In a new process; so it takes milliseconds."""
    slow = "{'torch', 'numpy', 'mvlm.model', 'importlib.metadata'} & set(sys.modules)"
    program = f"import sys, mvlm; dir(mvlm); print({slow}); mvlm.PretrainConfig; print('torch' in sys.modules)"
    done = run_python("-c", program)
    assert (done.returncode, done.stdout) == (0, "set()\nFalse\n"), done.stderr
