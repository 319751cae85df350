"""Fixtures of the tests of `mvlm`: a small data set on disk, a trained run, and faults of the system."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvlm_dataloading import Dataset, Tokenizer, open_dataset, tokenizer_for
from support.models import MICRO, pretrain_config
from support.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """A data set of 32 training, 8 validation and 8 test pictures. Read only."""
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="session")
def train_split(scenes) -> Dataset:
    return open_dataset(scenes, "train")


@pytest.fixture(scope="session")
def heldout_split(scenes) -> Dataset:
    return open_dataset(scenes, "test")


@pytest.fixture(scope="session")
def tokenizer(train_split) -> Tokenizer:
    return tokenizer_for(train_split, MICRO["vocab_size"])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, scenes) -> Path:
    """A run of two steps, with a checkpoint after each. Read only; `run_copy` is yours."""
    from mvlm.training.run import pretrain

    out = tmp_path_factory.mktemp("trained") / "run"
    pretrain(pretrain_config(scenes, out, checkpoint_every_steps=1))
    return out


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A copy of the trained run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def file_limit():
    """A context in which no file may be longer than so many bytes: a full disk, by the system's own error."""

    @contextmanager
    def limited(length: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
