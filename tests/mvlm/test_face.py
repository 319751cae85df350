"""The face of the package: the names that `import mvlm` offers."""

from importlib import import_module

import mvlm
from support.commands import run_python

NAMES = [
    *("ConfigError", "DataError", "FinetuneConfig", "MaskVLM", "MaskVLMConfig", "PretrainConfig", "RunError"),
    *("TrainedModel", "finetune", "load_model", "pretrain"),
]


def test_names_of_the_face_are_those_of_their_modules():
    assert mvlm.__all__ == NAMES
    assert set(NAMES) <= set(dir(mvlm))
    for name in NAMES:
        found = getattr(mvlm, name)
        assert found is getattr(import_module(found.__module__), name)


def test_importing_the_package_or_a_configuration_imports_nothing_slow():
    """In a new process; so it takes milliseconds."""
    slow = "{'torch', 'numpy', 'mvlm.model', 'importlib.metadata'} & set(sys.modules)"
    program = f"import sys, mvlm; dir(mvlm); print({slow}); mvlm.PretrainConfig; print('torch' in sys.modules)"
    done = run_python("-c", program)
    assert (done.returncode, done.stdout) == (0, "set()\nFalse\n"), done.stderr
