import subprocess
import sys

import pytest

import mvlm_dataloading


def test_every_public_name_can_be_imported():
    names = dir(mvlm_dataloading)
    assert {"Loader", "open_dataset", "from_folder", "Batch"} <= set(names)
    for name in names:
        assert getattr(mvlm_dataloading, name).__name__ == name.removeprefix("from_")
    with pytest.raises(AttributeError, match="no attribute 'Loadr'"):
        _ = mvlm_dataloading.Loadr


def test_writing_shards_does_not_load_torch_or_dali():
    code = (
        "import sys, mvlm_dataloading as d;"
        "d.ShardWriter, d.build_shards, d.from_folder, d.open_dataset, d.train_tokenizer;"
        "assert not {'torch', 'nvidia.dali'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
