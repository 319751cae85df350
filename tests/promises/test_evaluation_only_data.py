"""A data set of evaluation images alone, from the command that builds it to the loader."""

import pytest

from mvlm import cli
from mvlm_dataloading import DataError, Loader, open_dataset
from support import published
from support.data import wave_tokenizer


@pytest.mark.slow
def test_a_set_of_evaluation_images_is_built_checked_viewed_and_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    published.folder(tmp_path / "images", 12)
    cli.find_command(["data", "folder", "images", "data", "--test", "1.0", "--workers", "1"])()
    assert "data: 12 test\n" in capsys.readouterr().out
    cli.find_command(["data", "check", "data", "--workers", "1"])()
    assert "images              12" in capsys.readouterr().out
    cli.find_command(["data", "view", "view", "--sources", "data"])()
    for folder in ("data", "view"):
        dataset = open_dataset(folder, "test")
        loader = Loader(dataset, wave_tokenizer(), batch_size=5, image_size=32, text_length=12, seed=0, train=False)
        assert sum(len(batch.sample_id) for batch, _ in loader) == 12
        with pytest.raises(DataError, match="wanted the split train, found test"):
            open_dataset(folder, "train")
