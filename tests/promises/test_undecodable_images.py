"""Undecodable images in training: replaced, counted and limited, and alike on all ranks and after a resume."""

import itertools
import json
import os
from typing import Any

import numpy as np
import pytest

from mvlm_dataloading import DataError, Loader, open_dataset, rebuild_indices
from mvlm_dataloading.loader import segment
from mvlm_dataloading.loader.resume import merge_states
from mvlm_dataloading.loader.sampler import SampleOrder, substitute_sample
from mvlm_dataloading.randomness import Purpose, hash64
from support.data import damaged_dataset, make_image, shard_writer, write_dataset, write_tar
from support.loaders import make_loader

BAD = [3, 41, 77, 78]


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """100 images in a few shards, four of them damaged after they were written."""
    return damaged_dataset(
        tmp_path_factory.mktemp("damaged") / "data", 100, BAD, max_shard_bytes=300_000, kinds=("PNG", "JPEG")
    )


def load(dataset, tokenizer, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 10, "image_size": 32, "text_length": 12, "seed": 1}
    return make_loader(dataset, tokenizer, **(defaults | settings))


def stream(loader: Loader, count: int) -> list[tuple[int, bytes, bytes]]:
    found = []
    for batch, masks in itertools.islice(loader, count):
        for b, i in enumerate(batch.sample_id.tolist()):
            found.append((i, batch.images[b].numpy().tobytes(), masks.patch_ids[b].numpy().tobytes()))
    return found


@pytest.mark.slow
def test_undecodable_images_are_replaced_counted_and_named(damaged, waves_tokenizer, caplog):
    loader = load(damaged, waves_tokenizer)
    samples = [i for i, _, _ in stream(loader, 30)]  # three epochs
    assert loader.skipped == 4
    ids, epochs = SampleOrder(damaged.shard_sizes, 1, shuffle=True)(0, 300)
    for got, wanted, epoch in zip(samples, ids.tolist(), epochs.tolist(), strict=True):
        assert got == (substitute_sample(1, epoch, wanted, 100, set(BAD)) if wanted in BAD else wanted)
    skips = [record.getMessage() for record in caplog.records if "cannot be decoded" in record.getMessage()]
    assert sorted(skips) == sorted(f"skipped an image that cannot be decoded: {damaged.where(i)}" for i in BAD)
    assert all(".tar offset " in skip and " key train00" in skip for skip in skips)


@pytest.mark.slow
def test_substitutes_do_not_depend_on_the_batch_size(damaged, waves_tokenizer):
    wanted = stream(load(damaged, waves_tokenizer), 20)
    assert stream(load(damaged, waves_tokenizer, batch_size=1, num_threads=1), 60) == wanted[:60]
    assert stream(load(damaged, waves_tokenizer, batch_size=100), 2) == wanted


@pytest.mark.slow
def test_bytes_after_the_end_of_an_image_do_no_harm(tmp_path, waves_tokenizer, caplog):
    """The guard takes such a file for a damaged one, the decoder does not."""
    kinds = {"JPEG": ".jpg", "PNG": ".png"}
    for name, more in (("plain", b""), ("longer", b"\0" * 40)):
        with shard_writer(tmp_path / name) as writer:
            for i in range(12):
                kind = list(kinds)[i % 2]
                assert writer.add(f"{i}", make_image(i, kind=kind) + more, [f"picture {i}"], {"image_id": i}) is None
    plain, longer = (stream(load(open_dataset(tmp_path / n, "train"), waves_tokenizer), 3) for n in ("plain", "longer"))
    assert plain == longer
    assert "images with bytes after their end" in caplog.text
    assert "cannot be decoded" not in caplog.text


@pytest.mark.slow
def test_a_truncated_image_is_bad_whatever_its_crop(tmp_path, waves_tokenizer):
    """Uninterrupted, resumed after some steps, and on two ranks: the same samples with the same pixels.

    Number 5 is truncated at 90 % and 17 at 97 %, so many crops above the cut decode. Others have a byte after the end.
    """
    members = []
    for i in range(24):
        image = make_image(i, kind="JPEG", size=(240, 320)) + b"\0" * (i % 4 == 0)
        cut = {5: 0.9, 17: 0.97}.get(i, 1)
        members += [(f"{i:02d}.jpg", image[: int(len(image) * cut)]), (f"{i:02d}.txt", b"a wave")]
    write_tar(tmp_path / "train-000.tar", members)
    rebuild_indices(tmp_path)
    truncated = open_dataset(tmp_path, "train")
    settings = {"batch_size": 4, "max_bad_fraction": 0.2}
    loader = load(truncated, waves_tokenizer, **settings)
    wanted = stream(loader, 12)
    assert loader.state_dict()["skipped"] == [5, 17]
    assert not {5, 17} & {i for i, _, _ in wanted}
    for step in (1, 7):
        first, again = (load(truncated, waves_tokenizer, **settings) for _ in range(2))
        stream(first, step)
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert again.skipped == first.skipped
        assert stream(again, 12 - step) == wanted[4 * step :]
    ranks = [load(truncated, waves_tokenizer, **settings, rank=rank, world_size=2) for rank in range(2)]
    shares = [stream(rank, 12) for rank in ranks]
    assert [row for step in range(12) for share in shares for row in share[2 * step : 2 * step + 2]] == wanted


@pytest.mark.slow
def test_too_many_undecodable_images_stop_training_with_a_list(damaged, waves_tokenizer):
    loader = load(damaged, waves_tokenizer, max_bad_fraction=0.03)
    with pytest.raises(
        DataError, match="wanted at most 3% undecodable images, found 4 of 100; build the data set again"
    ) as error:
        stream(loader, 10)
    for i in BAD:
        assert damaged.where(i) in str(error.value)
    assert "\n" not in str(error.value)
    # Four of a hundred are no more than 4 %.
    stream(load(damaged, waves_tokenizer, max_bad_fraction=0.04), 10)


@pytest.mark.slow
def test_an_undecodable_substitute_is_replaced_alike_on_all_ranks(tmp_path, waves_tokenizer):
    """Two bad ones of ten: a run that knows of the first has read its substitute, and finds that one bad."""
    bad, epochs = {2, 7}, 6
    dataset = damaged_dataset(tmp_path / "data", 10, bad)
    chains = 0
    for seed in (0, 1):
        at = zip(
            *(part.tolist() for part in SampleOrder(dataset.shard_sizes, seed, shuffle=True)(0, 10 * epochs)),
            strict=True,
        )
        wanted = []
        for i, epoch in at:
            draws = (int(hash64(Purpose.SUBSTITUTE, seed, epoch, i, k) % np.uint64(10)) for k in itertools.count())
            wanted.append(i if i not in bad else next(draw for draw in draws if draw not in bad))
        settings = {"seed": seed, "max_bad_fraction": 0.9}
        for known in ([], [2]):
            loader = load(dataset, waves_tokenizer, **settings)
            loader.load_state_dict(loader.state_dict() | {"skipped": known})
            assert [i for i, _, _ in stream(loader, epochs)] == wanted, (seed, known)
        ranks = [load(dataset, waves_tokenizer, **settings, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
        shares = [[i for i, _, _ in stream(loader, 5 * epochs)] for loader in ranks]
        assert [i for pair in zip(*shares, strict=True) for i in pair] == wanted, seed
        chains += any(substitute_sample(seed, 0, i, 10, {i}) in bad for i in bad)
    assert chains > 0  # else the case did not occur


def test_a_pass_in_order_stops_at_an_undecodable_image(damaged, waves_tokenizer):
    with pytest.raises(DataError, match=r"offset .* key train0003: wanted an image, found one that cannot be decoded"):
        stream(load(damaged, waves_tokenizer, train=False), 10)


def test_a_shard_that_vanishes_is_not_a_bad_image(tmp_path, waves_tokenizer):
    dataset = damaged_dataset(tmp_path / "data", 4, [0])
    loader = load(dataset, waves_tokenizer, batch_size=2)
    dataset.tars[0].rename(tmp_path / "elsewhere")
    with pytest.raises(
        DataError, match=r"train-000000\.tar: wanted a shard that dataset\.json names, found no such file"
    ):
        stream(loader, 10)
    assert loader.skipped == 0


def test_a_shard_that_is_truncated_during_a_run_is_refused_unread(tmp_path, waves_tokenizer, monkeypatch):
    """DALI maps shards, so reading past the end would end the process with SIGBUS."""
    monkeypatch.setattr("mvlm_dataloading.loader.reader.FIRST_SEGMENT_BATCHES", 1)
    monkeypatch.setattr("mvlm_dataloading.loader.reader.MAX_SEGMENT_SAMPLES", 8)
    dataset = open_dataset(write_dataset(tmp_path / "data", 24, max_shard_bytes=50_000), "train")
    loader = load(dataset, waves_tokenizer, batch_size=8, prefetch_batches=0)
    assert len(stream(loader, 1)) == 8
    for tar in dataset.tars:
        os.truncate(tar, tar.stat().st_size // 2)
    with pytest.raises(DataError, match=r"train-00000\d\.tar: wanted \d+ bytes as in dataset\.json, found \d+ bytes"):
        stream(loader, 1)


def test_a_small_split_without_a_good_image_is_an_error_on_several_ranks(tmp_path, waves_tokenizer):
    """The margin of several ranks is wider than so small a split."""
    loader = load(
        damaged_dataset(tmp_path / "data", 4, range(4)),
        waves_tokenizer,
        batch_size=2,
        world_size=2,
        max_bad_fraction=0.5,
    )
    with pytest.raises(DataError, match="wanted at most 50% undecodable images, found 4"):
        stream(loader, 2)


@pytest.mark.slow
@pytest.mark.parametrize("failures, ends", [(12, False), (400, True)])
def test_a_lack_of_memory_marks_no_image(waves_train, waves_tokenizer, monkeypatch, caplog, failures, ends):
    """DALI then refuses good images. A short lack is survived, a long one ends with DALI's error."""
    wanted = stream(load(waves_train, waves_tokenizer), 2)
    loader = load(waves_train, waves_tokenizer, prefetch_batches=0)
    left, read = [failures], segment.DecodedSegment.next

    def fail(self):
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("CUDA allocation failed: out of memory")
        return read(self)

    monkeypatch.setattr(segment.DecodedSegment, "next", fail)
    if ends:
        with pytest.raises(RuntimeError, match="CUDA allocation failed"):
            stream(loader, 1)
    else:
        assert stream(loader, 2) == wanted
        assert "a batch is read again" in caplog.text
    assert loader.skipped == 0


@pytest.mark.slow
def test_too_many_undecodable_images_stop_ranks_however_often_they_resume(tmp_path, waves_tokenizer):
    """10 % are bad and 5 % are allowed. Each of four ranks sees few, so what all have found counts after a resume."""
    dataset = damaged_dataset(tmp_path / "data", 80, range(0, 80, 10), kinds=("JPEG",))

    def resume_often() -> None:
        state: dict[str, Any] = {}
        for _ in range(8):  # four epochs
            ranks = [load(dataset, waves_tokenizer, batch_size=40, rank=rank, world_size=4) for rank in range(4)]
            for loader in ranks:
                if state:
                    loader.load_state_dict(state)
                stream(loader, 1)
            state = merge_states([json.loads(json.dumps(loader.state_dict())) for loader in ranks], len(dataset))

    with pytest.raises(DataError, match=r"wanted at most 5% undecodable images, found \d+ of"):
        resume_often()
