"""Data sets that several tests read."""

from pathlib import Path

import pytest

from mvlm_dataloading import Dataset, Tokenizer, open_dataset
from support.data import wave_tokenizer, write_waves


@pytest.fixture(scope="session")
def waves(tmp_path_factory) -> Path:
    """60 training images in several shards, in three formats. Read only."""
    return write_waves(tmp_path_factory.mktemp("waves") / "data")


@pytest.fixture(scope="session")
def train_split(waves) -> Dataset:
    dataset = open_dataset(waves, "train")
    assert len(dataset.tars) > 2
    return dataset


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return wave_tokenizer()
