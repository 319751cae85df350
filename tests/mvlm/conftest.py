"""Fixtures of the tests of `mvlm`: a small data set on disk, a trained run, the command line, and a full disk."""

import logging
import os
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mvlm import cli
from mvlm_dataloading import Dataset, Tokenizer, open_dataset, tokenizer_for
from support.commands import Outcome
from support.models import MICRO, pretrain_config
from support.questions import write_questions
from support.scenes import write_scenes


@pytest.fixture(scope="session")
def scenes(made_once) -> Path:
    """A data set of 32 training, 8 validation and 8 test images. Read only; `scenes_copy` may be changed."""
    return made_once("scenes", write_scenes)


@pytest.fixture
def scenes_copy(scenes, tmp_path) -> Path:
    """A copy of the data set, to be damaged."""
    return Path(shutil.copytree(scenes, tmp_path / "data"))


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
def model(tokenizer):
    """The micro model with random weights, to be asked. Read only."""
    import torch

    from mvlm.inference.trained_model import TrainedModel
    from support.models import micro_model

    return TrainedModel(micro_model(dtype=torch.float32), tokenizer, "fp32")


@pytest.fixture(scope="session")
def trained(made_once, scenes) -> Path:
    """A run of two steps, with a checkpoint after each. Read only; `run_copy` may be changed."""
    from mvlm.training.run import pretrain

    return made_once("trained", lambda out: pretrain(pretrain_config(scenes, out, checkpoint_every_steps=1)))


@pytest.fixture(scope="session")
def without_itm(made_once, scenes) -> Path:
    """A run of one step that was trained without ITM. Read only."""
    from mvlm.training.run import pretrain

    return made_once("without-itm", lambda out: pretrain(pretrain_config(scenes, out, itm_weight=0.0, max_steps=1)))


@pytest.fixture(scope="session")
def questions(made_once) -> Path:
    """Questions about coloured squares and their grounds. Read only."""
    return made_once("questions", write_questions)


@pytest.fixture
def run_copy(trained, tmp_path) -> Path:
    """A copy of the trained run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path) -> None:
    """A machine without a network: nobody listens where the hub is, and the hub's cache is empty."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as closed:
        place = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


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


@pytest.fixture(params=[2, 4], ids="{} ranks".format)
def ranks(request) -> int:
    """Number of ranks."""
    return request.param


@pytest.fixture
def on_ranks(tmp_path_factory) -> Callable[..., tuple[list[int], str]]:
    """Runs `mvlm WORDS` on so many ranks, forked from this process. Returns their exit codes, and what they wrote.

    A rank's own number is in place of "{rank}" in a word.
    """
    from support.faults.forks import in_ranks, wait

    log = tmp_path_factory.mktemp("ranks") / "log"

    def run(size: int, *words: object) -> tuple[list[int], str]:
        def work() -> int:
            logging.basicConfig(stream=sys.stderr, force=True)
            sys.argv = ["mvlm", *(str(word).replace("{rank}", os.environ["RANK"]) for word in words)]
            try:
                cli.main()
            except SystemExit as stop:
                return int(stop.code or 0)
            return 0

        log.write_text("")
        codes = [wait(pid) for pid in in_ranks(work, size, log)]
        return codes, log.read_text(errors="replace")

    return run


@pytest.fixture
def run_mvlm(monkeypatch, capsys, caplog, without_tensorboard) -> Callable[..., Outcome]:
    """Runs `mvlm WORDS` in this process."""

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["mvlm", *map(str, words)])
        capsys.readouterr()
        caplog.clear()
        code = 0
        with caplog.at_level("INFO"):
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        printed = capsys.readouterr()
        logged = [record.getMessage() for record in caplog.records]
        return Outcome(code, printed.out.splitlines(), logged + printed.err.splitlines())

    return run
