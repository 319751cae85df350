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


IMPORTS = """
import sys
def loaded(*names):
    print(*sorted(set(names) & set(sys.modules)), sep=",")
import mvlm
dir(mvlm)
loaded("torch", "numpy", "mvlm.model", "importlib.metadata")
import mvlm.cli
assert "data vqa-v2" in mvlm.cli.COMMANDS
loaded("torch", "numpy", "PIL", "pyarrow", "nvidia.dali")
mvlm.PretrainConfig
loaded("torch")
try:
    mvlm.cli.find_command(["pretrain", "hgue", "--data", "d", "--out", "o"])()
except mvlm.ConfigError as error:
    print(error)
mvlm.cli.find_command(["score", "entailment", *sys.argv[1:]])()
loaded("torch", "nvidia.dali", "tensorboard", "mvlm.model", "PIL")
"""
"""Slow packages that each step has imported."""


def test_imports_and_mistakes_and_scores_need_nothing_slow(tmp_path):
    """In a new process; so it takes milliseconds."""
    file = tmp_path / "labels"
    file.write_text('{"pairID": 1, "label": "neutral", "gold_label": "neutral"}\n')
    done = run_python("-c", IMPORTS, file, file)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["", "", ""]
    assert lines[3].startswith("unknown preset")
    assert "'hgue'" in lines[3]
    assert '"accuracy": 100' in done.stdout
    assert lines[-1] == ""
