"""Messages for packages that are not installed."""

import sys

import pytest

import mvlm_dataloading
from mvlm_dataloading.errors import need


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with pytest.raises(ImportError, match=r"no_such_package\.part is needed here .* pip install 'mvlm\[demo\]'"):
        need("no_such_package.part", "demo")
    assert need("json").dumps([]) == "[]"


def test_only_loading_needs_dali(waves_train, waves_tokenizer, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")] + ["nvidia.dali.fn"]:
        monkeypatch.setitem(sys.modules, name, None)  # which makes an import fail
    loader = mvlm_dataloading.Loader(waves_train, waves_tokenizer, batch_size=2, image_size=32, text_length=9, seed=0)
    with pytest.raises(ImportError, match=r"nvidia\.dali\.fn is needed here .* pip install 'mvlm\[data\]'"):
        next(iter(loader))
