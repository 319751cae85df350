"""Fixtures and hooks of the whole suite."""

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

from support.kernels.interpreter import patch_once_a_launch

if TYPE_CHECKING:
    from mvlm_dataloading import Dataset, Tokenizer
    from support.seaweed import Seaweed

# Triton decides at import whether it interprets, so one process either interprets kernels or compiles them. The suite
# interprets: it needs no GPU, and ops on CPU tensors still take torch unless a test asks for Triton. Tests that compile
# start their own process. `make test-gpu` sets TRITON_INTERPRET=0 and runs the gpu tests alone.
os.environ.setdefault("TRITON_INTERPRET", "1")

# OpenMP reads this when torch is imported. By default threads that wait for one another spin. If other processes keep
# the cores busy, as with `pytest -n 2`, a run on two threads then takes up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Collection makes a million objects that live to the end. Python's collector would look through all of them 17 times
# while they are made, and again each time that tests have made a quarter as many.
gc.disable()


def pytest_configure() -> None:
    """TEST_PRECISION=bf16: what computes in the precision of the machine takes bf16, in hardware or not."""
    if os.environ.get("TEST_PRECISION") == "bf16":
        import torch

        torch.backends.cpu.get_cpu_capability = lambda: "AVX512"
        torch.cpu._is_avx512_bf16_supported = lambda: True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests unless kernels are compiled and there is a device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        return
    for item in marked:
        item.add_marker(pytest.mark.skip(reason="needs a CUDA device and TRITON_INTERPRET=0: run `make test-gpu`"))


def pytest_collection_finish() -> None:
    """Switch Python's collector on, and let it look at no object that is older than the tests."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let Python free all objects at its end. Libraries would otherwise report what is left as leaks."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let Triton's interpreter replace its language once a launch, as soon as a test has imported it."""
    patch_once_a_launch()


@pytest.fixture
def without_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs write no TensorBoard events, which take longer than a micro model's steps."""
    import mvlm.training.loggers

    class Board:
        def __init__(self, *_, **__): ...

        def add_scalar(self, *_): ...

        def add_image(self, *_, **__): ...

        def close(self): ...

    monkeypatch.setattr(mvlm.training.loggers, "SummaryWriter", Board)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Makes what all processes of the suite read: `made_once(name, make)` calls `make(path)` in the first that asks.

    Returns the path, a file or folder of this name. Nobody may change it.
    """
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "made-once"
    root.mkdir(exist_ok=True)

    def once(name: str, make: Callable[[Path], object]) -> Path:
        path, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                make(path)
                done.touch()
        return path

    return once


@pytest.fixture(scope="session")
def waves(made_once) -> Path:
    """60 training and 60 test images in several shards, in three formats. Read only."""
    from support.data import write_waves

    return made_once("waves", write_waves)


@pytest.fixture(scope="session")
def waves_train(waves) -> "Dataset":
    from mvlm_dataloading import open_dataset

    return open_dataset(waves, "train")


@pytest.fixture(scope="session")
def waves_tokenizer() -> "Tokenizer":
    from support.data import wave_tokenizer

    return wave_tokenizer()


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> Path:
    """48 images in at least five shards, the folder of `web`. A test that changes it restores it."""
    from support.data import write_dataset

    return write_dataset(tmp_path_factory.mktemp("served") / "data", 48, max_shard_bytes=60_000, kinds=("JPEG",))


@pytest.fixture
def web(served) -> Iterator[str]:
    """The URL of `served` on a local web server."""
    from support.web_server import serve

    with serve(served) as url:
        yield url


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory) -> "Iterator[Seaweed]":
    """A SeaweedFS server, one for all tests of this process. Tests use names of their own in its bucket."""
    from support.seaweed import serve_seaweed

    with serve_seaweed(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


@pytest.fixture
def data_cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of remote data. Failed requests are repeated at once."""
    monkeypatch.setenv("MVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mvlm_dataloading.dataset.folders.FIRST_PAUSE_S", 0.01)
    return tmp_path / "cache"
