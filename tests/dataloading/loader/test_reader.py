"""Segments of a reader: their length, and the memory that they free."""

import gc
import weakref
from itertools import islice
from types import SimpleNamespace

import pytest

from mvlm_dataloading import Loader, LoaderWork
from mvlm_dataloading.loader import reader as reader_module
from mvlm_dataloading.loader.pipeline import build_pipeline
from mvlm_dataloading.randomness import uniforms


@pytest.fixture
def segments(monkeypatch):
    """Pipelines, crop draws and lengths of the segments that a reader opens, of at most 32 samples each."""
    built = SimpleNamespace(pipelines=[], draws=[], lengths=[])

    def build_recorded(*args, **settings):
        built.pipelines.append(build_pipeline(*args, **settings))
        return built.pipelines[-1]

    def draw_recorded(*args):
        drawn = uniforms(*args)
        built.draws.append(weakref.ref(drawn))
        built.lengths.append(len(drawn))
        return drawn

    monkeypatch.setattr("mvlm_dataloading.loader.segment.build_pipeline", build_recorded)
    monkeypatch.setattr("mvlm_dataloading.loader.segment.uniforms", draw_recorded)
    monkeypatch.setattr(reader_module, "MAX_SEGMENT_SAMPLES", 32)
    return built


def start(dataset, tokenizer, ranks: int = 1) -> Loader:
    """The loader of the last rank, which has 8 samples of a batch."""
    return Loader(
        dataset, tokenizer, batch_size=8 * ranks, world_size=ranks, rank=ranks - 1, image_size=64, text_length=12,
        seed=5, work=LoaderWork(prefetch_batches=0),
    )  # fmt: skip


@pytest.mark.slow
def test_closed_segments_free_memory_without_the_garbage_collector(train_split, tokenizer, segments):
    gc.collect()
    gc.disable()
    try:
        loader = start(train_split, tokenizer)
        assert len(list(islice(loader, 10))) == 10
        # `_pipe` is DALI's: the C++ pipeline.
        assert [pipeline._pipe is None for pipeline in segments.pipelines] == [True, True, False]
        assert [draws() is None for draws in segments.draws] == [True, True, False]
        loader.close()
        assert segments.pipelines[-1]._pipe is None
        assert segments.draws[-1]() is None
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_segments_have_the_same_length_at_any_number_of_ranks(train_split, tokenizer, segments, ranks):
    assert len(list(islice(start(train_split, tokenizer, ranks), 10))) == 10
    assert segments.lengths == [32, 32, 32]


def test_reader_trims_memory_at_intervals(train_split, tokenizer, monkeypatch):
    trims = []
    libc = SimpleNamespace(malloc_trim=trims.append)
    monkeypatch.setattr(reader_module, "ctypes", SimpleNamespace(CDLL=lambda name: libc))
    monkeypatch.setattr(reader_module, "TRIM_EVERY_SAMPLES", 24)
    for count, _ in enumerate(islice(start(train_split, tokenizer), 12), 1):
        assert len(trims) == count // 3
