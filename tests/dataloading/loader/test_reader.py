"""What a reader does with its pipelines and their memory."""

import gc
from itertools import islice
from types import SimpleNamespace

import pytest

from mvlm_dataloading import Loader
from mvlm_dataloading.loader import reader as reader_module


@pytest.fixture
def segments(monkeypatch):
    """All that are built, of at most 32 samples."""
    built = []

    class Recorded(reader_module.Segment):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            built.append(self)

    monkeypatch.setattr(reader_module, "Segment", Recorded)
    monkeypatch.setattr(reader_module, "_SEGMENT_SAMPLES", 32)
    return built


def start(dataset, tokenizer, ranks: int = 1) -> Loader:
    """The loader of the last rank, which has 8 samples of a batch."""
    return Loader(
        dataset, tokenizer, batch_size=8 * ranks, world_size=ranks, rank=ranks - 1, image_size=64, text_length=12,
        seed=5, ahead=0,
    )  # fmt: skip


def test_a_pipeline_goes_without_the_garbage_collector(train_split, tokenizer, segments):
    gc.collect()
    gc.disable()
    try:
        loader = start(train_split, tokenizer)
        assert len(list(islice(loader, 10))) == 10
        pipelines = [segment._pipeline for segment in segments]
        assert len(pipelines) == 3
        assert [pipeline._pipe is None for pipeline in pipelines] == [True, True, False]
        assert [len(segment._tables) for segment in segments] == [0, 0, 1]  # what was drawn for each sample
        loader.close()
        assert pipelines[-1]._pipe is None
    finally:
        gc.enable()


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_segment_is_as_long_at_any_number_of_ranks(train_split, tokenizer, segments, ranks):
    assert len(list(islice(start(train_split, tokenizer, ranks), 10))) == 10
    assert [len(segment) for segment in segments] == [32, 32, 32]


def test_memory_is_trimmed_at_intervals(train_split, tokenizer, monkeypatch):
    trims = []
    libc = SimpleNamespace(malloc_trim=trims.append)
    monkeypatch.setattr(reader_module, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    monkeypatch.setattr(reader_module, "_TRIM_SAMPLES", 24)
    for count, _ in enumerate(islice(start(train_split, tokenizer), 12), 1):
        assert len(trims) == count // 3
