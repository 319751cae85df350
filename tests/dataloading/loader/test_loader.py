"""Loaders: which samples they yield, when and where; refused settings."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvlm_dataloading import Augment, Masking, open_dataset
from mvlm_dataloading.loader.masking import draw_token_masks
from support.data import write_dataset
from support.loaders import make_loader, rows, take


def test_loader_yields_every_sample_once_per_epoch_in_full_batches(waves_train, waves_tokenizer):
    loader = make_loader(waves_train, waves_tokenizer, batch_size=7)
    seen, epochs = [], []
    for batch, _ in itertools.islice(loader, 26):  # 182 samples: three epochs and two samples
        assert len(batch.sample_id) == 7
        seen += batch.sample_id.tolist()
        epochs.append(loader.epoch)
    for epoch in range(3):
        assert sorted(seen[60 * epoch : 60 * epoch + 60]) == list(range(60))
    assert seen[:60] != seen[60:120]
    assert epochs == [7 * (k + 1) // 60 for k in range(26)]
    assert loader.step == 26


@pytest.mark.slow
def test_samples_are_the_same_in_batches_and_segments_of_any_size(waves_train, waves_tokenizer, monkeypatch):
    wanted = rows(take(make_loader(waves_train, waves_tokenizer, batch_size=20), 6))
    for settings in ({"batch_size": 1}, {"batch_size": 7, "num_threads": 1}, {"batch_size": 60}, {"batch_size": 50}):
        count = -(-120 // settings["batch_size"])
        assert rows(take(make_loader(waves_train, waves_tokenizer, **settings), count))[:120] == wanted
    monkeypatch.setattr("mvlm_dataloading.loader.reader.FIRST_SEGMENT_BATCHES", 3)
    assert rows(take(make_loader(waves_train, waves_tokenizer), 15)) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_every_global_batch(waves_train, waves_tokenizer, world_size):
    """All ranks together see the samples of a single rank, across the end of an epoch."""
    wanted = rows(take(make_loader(waves_train, waves_tokenizer), 16))
    shares = [
        [rows([pair]) for pair in take(make_loader(waves_train, waves_tokenizer, rank=rank, world_size=world_size), 16)]
        for rank in range(world_size)
    ]
    assert [row for step in range(16) for share in shares for row in share[step]] == wanted


def test_a_batch_larger_than_the_data_set_wraps_around(waves_train, waves_tokenizer):
    batch, _ = take(make_loader(waves_train, waves_tokenizer, batch_size=130), 1)[0]
    assert Counter(Counter(batch.sample_id.tolist()).values()) == {2: 50, 3: 10}


def test_epochs_and_seeds_give_other_draws(waves_train, waves_tokenizer):
    first, second = np.split(np.array(rows(take(make_loader(waves_train, waves_tokenizer, batch_size=60), 2))), 2)
    other = rows(take(make_loader(waves_train, waves_tokenizer, batch_size=60, seed=6), 1))
    by_sample = [{row["sample"]: row for row in part} for part in (first, second, other)]
    for one, two in itertools.combinations(by_sample, 2):
        for what in ("pixels", "patches"):
            assert sum(one[i][what] != two[i][what] for i in range(60)) > 40
        # a third of them has one caption only
        assert 10 < sum(one[i]["tokens"] != two[i]["tokens"] for i in range(60)) < 60


def test_a_pass_in_order_yields_whole_images_and_first_captions(waves_train, waves_tokenizer):
    loader = make_loader(waves_train, waves_tokenizer, batch_size=25, train=False)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.images) for batch, _ in batches] == [25, 25, 10]
        found = rows(batches)
        assert [row["sample"] for row in found] == list(range(60))
        for i, row in enumerate(found):
            assert row["tokens"] == waves_tokenizer.encode(waves_train.captions(i)[:1], 12)[0].tolist()
    settings = {"batch_size": 100, "seed": 99, "augment": Augment(operations=2, flip=0.5)}
    other = rows(make_loader(waves_train, waves_tokenizer, train=False, **settings))
    assert [row["pixels"] for row in other] == [row["pixels"] for row in found]


@pytest.mark.parametrize("prefetch_batches", [0, 3])
def test_a_loader_goes_on_with_another_side(waves_train, waves_tokenizer, prefetch_batches):
    """Each batch is that of a loader that had its side and its masks from the start."""
    masking = Masking(image_mask_ratio=0.3)
    sides = ({"image_size": 64}, {"image_size": 96, "masking": masking})
    small, large = (rows(take(make_loader(waves_train, waves_tokenizer, **side), 9)) for side in sides)
    loader = make_loader(waves_train, waves_tokenizer, prefetch_batches=prefetch_batches)
    batches = iter(loader)
    found = rows([next(batches) for _ in range(4)])
    loader.resize(96, masking)
    found += rows([next(batches) for _ in range(5)])
    assert found == small[:32] + large[32:]
    state = loader.state_dict()
    assert state == make_loader(waves_train, waves_tokenizer, **sides[1]).state_dict() | {
        name: state[name] for name in ("epoch", "position", "step", "met")
    }
    with pytest.raises(ValueError, match="mask_block"):
        loader.resize(80, masking)


def test_folders_of_odd_names_are_read_and_no_index_views_are_left(tmp_path, waves_tokenizer, monkeypatch):
    (tmp_path / "views").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)  # no room in memory
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "views"))
    for folder in (tmp_path / "mein Ördner: 猫", Path("relative")):
        dataset = open_dataset(write_dataset(folder, 6), "train")
        assert len(rows(take(make_loader(dataset, waves_tokenizer), 3))) == 24
    assert list((tmp_path / "views").iterdir()) == []


@pytest.mark.parametrize(
    "settings, word",
    [
        ({"batch_size": 0}, "batch_size"),
        ({"num_threads": 0}, "num_threads"),
        ({"prefetch_batches": -1}, "prefetch_batches"),
        ({"keep_mb": -1}, "keep_mb"),
        ({"crop_scale": (0, 1)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.1)}, "crop_scale"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"max_bad_fraction": 1.0}, "max_bad_fraction"),
        ({"text_mask_ratio": 2.0}, "text_mask_ratio"),
        ({"text_length": 2}, "text length"),
        ({"world_size": 3}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"world_size": 2, "train": False}, "world_size"),
        ({"per_image": 0}, "per_image"),
        ({"image_size": 100}, "mask_block"),
        ({"mask_block": 48}, "mask_block"),
        ({"patch_size": 12}, "patch_size"),
        ({"patch_size": 0}, "patch_size"),
        ({"image_mask_ratio": 0.01}, "image_mask_ratio"),
        ({"image_mask_ratio": 1.2}, "image_mask_ratio"),
    ],
)
def test_loader_arguments_that_do_not_fit_are_refused(waves_train, waves_tokenizer, settings, word):
    with pytest.raises(ValueError, match=word):
        make_loader(waves_train, waves_tokenizer, **settings)


def test_augmentations_and_texts_that_do_not_fit_are_refused():
    wrong: list[dict[str, Any]] = [{"flip": 1.5}, {"operations": 15}, {"magnitude": 31}, {"strip": 0}]
    for settings in (*wrong, {"strip": 2, "flip": 0.5}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Augment(**settings)
    for lengths, ratio in (([5, 2], 0.3), ([5, 5], 1.2)):  # no word between [CLS] and [SEP]
        with pytest.raises(ValueError, match="wanted"):
            draw_token_masks(0, 0, [0, 1], lengths, ratio=ratio)
