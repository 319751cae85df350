"""Resuming from a state with the same loader and with others."""

import hashlib
import itertools
import json
import time

import pytest

from mvlm_dataloading import DataError, Loader, Masking, open_dataset
from mvlm_dataloading.loader.augment import Augment
from mvlm_dataloading.loader.resume import merge_states
from support.loaders import make_loader

MASKS_DIFFER = "same pixels; captions or masks differ (tokenizer, text length or masks)"


def load(dataset, tokenizer, **settings) -> Loader:
    augment = settings.pop("augment", Augment(operations=2, flip=0.5))
    size, length = settings.pop("image_size", 32), settings.pop("text_length", 12)
    return make_loader(dataset, tokenizer, image_size=size, text_length=length, seed=5, augment=augment, **settings)


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def state_after(dataset, tokenizer, batches: int, **settings) -> dict:
    loader = load(dataset, tokenizer, **({"batch_size": 8} | settings))
    take(loader, batches)
    return json.loads(json.dumps(loader.state_dict()))


def samples(batches) -> list[tuple[int, bytes]]:
    return [
        (int(i), image.numpy().tobytes())
        for batch, _ in batches
        for i, image in zip(batch.sample_id, batch.images, strict=True)
    ]


@pytest.mark.slow
def test_resuming_the_same_loader_is_exact(train_split, tokenizer):
    whole = samples(take(load(train_split, tokenizer, batch_size=8), 16))
    loader = load(train_split, tokenizer, batch_size=8)
    loader.load_state_dict(state_after(train_split, tokenizer, 5))
    assert loader.resumed is not None
    assert (loader.resumed.exact_pixels, loader.resumed.exact_text, loader.resumed.changed) == (True, True, ())
    assert str(loader.resumed) == "same samples in the same order, same pixels, captions and masks"
    assert samples(take(loader, 11)) == whole[40:]


@pytest.mark.slow
def test_resuming_at_another_batch_size_and_number_of_ranks_keeps_the_pixels(train_split, tokenizer):
    """From 1 rank to 4 to 2, at other batch sizes, within an epoch and across its end."""
    whole = samples(take(load(train_split, tokenizer, batch_size=20), 9))
    state, at = state_after(train_split, tokenizer, 3), 24
    for world_size, batch_size, batches in ((4, 12, 2), (2, 10, 6), (1, 6, 1)):
        parts, states = [], []
        for rank in range(world_size):
            loader = load(train_split, tokenizer, batch_size=batch_size, rank=rank, world_size=world_size)
            loader.load_state_dict(state)
            assert loader.resumed is not None
            assert loader.resumed.exact_pixels
            assert any("which changes no sample" in words for words in loader.resumed.changed)
            parts.append([samples([pair]) for pair in take(loader, batches)])
            states.append(loader.state_dict())
        found = [sample for step in range(batches) for part in parts for sample in part[step]]
        assert found == whole[at : at + batches * batch_size]
        assert all(other == states[0] for other in states)
        state, at = json.loads(json.dumps(states[0])), at + batches * batch_size
    assert at > 60


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, words",
    [
        ({"augment": Augment()}, "same captions and masks; pixels differ (crops or augmentations)"),
        ({"crop_scale": (0.5, 1.0)}, "same captions and masks; pixels differ (crops or augmentations)"),
        ({"image_size": 64}, "pixels and captions or masks differ"),
        ({"text_length": 9}, MASKS_DIFFER),
        (
            {"masking": Masking(text_mask_ratio=0.5)},
            MASKS_DIFFER,
        ),
        (
            {"masking": Masking(image_masking="variable")},
            MASKS_DIFFER,
        ),
        (
            {"masking": Masking(text_masking="uniform")},
            MASKS_DIFFER,
        ),
        (
            {"masking": Masking(text_masking="variable")},
            MASKS_DIFFER,
        ),
        (
            {"masking": Masking(whole_word_masking=True)},
            MASKS_DIFFER,
        ),
    ],
)
def test_resuming_with_other_settings_keeps_the_samples_and_reports_it(train_split, tokenizer, settings, words, caplog):
    whole = samples(take(load(train_split, tokenizer, batch_size=8), 8))
    loader = load(train_split, tokenizer, batch_size=8, **settings)
    loader.load_state_dict(state_after(train_split, tokenizer, 4))
    assert words in str(loader.resumed)
    assert words in caplog.text
    found = samples(take(loader, 4))
    assert [i for i, _ in found] == [i for i, _ in whole[32:]]
    assert loader.resumed is not None
    assert loader.resumed.exact_pixels == (found == whole[32:])


def test_states_of_earlier_versions_fit(train_split, tokenizer):
    """The keys of a state, and its hashes of settings, are those of version 0.1.0."""
    state = load(train_split, tokenizer, batch_size=8).state_dict()
    assert list(state) == [
        "seed", "epoch", "position", "step", "fingerprint", "batch_size", "world_size", "skipped", "met", "order",
        "pictures", "text", "versions",
    ]  # fmt: skip
    assert state["pictures"] == "f25b1191caa7d5ea"
    patches = {"image_size": 32, "patch_size": 16, "mask_block": 32, "ratio": 0.6}
    text = {"tokenizer": tokenizer.fingerprint, "length": 12, "ratio": 0.3, "patches": patches}
    assert state["text"] == hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:16]


@pytest.mark.slow
def test_resuming_with_other_versions_reports_them(train_split, tokenizer):
    loader = load(train_split, tokenizer, batch_size=8)
    loader.load_state_dict(state_after(train_split, tokenizer, 1) | {"versions": {"torch": "0.1"}})
    assert loader.resumed is not None
    assert not loader.resumed.exact_pixels
    assert "the version of torch, DALI or its decoders" in str(loader.resumed)


@pytest.mark.slow
def test_other_data_are_refused_unless_allowed(train_split, waves, tokenizer, caplog):
    state = state_after(open_dataset(waves, "test"), tokenizer, 4)
    loader = load(train_split, tokenizer, batch_size=8)
    with pytest.raises(DataError, match="wanted the data of the state"):
        loader.load_state_dict(state)
    loader.load_state_dict(state, other_data=True)
    assert loader.state_dict()["position"] == 32
    assert loader.resumed is not None
    assert not loader.resumed.exact_pixels
    assert not loader.resumed.same_data
    assert str(loader.resumed).startswith("samples, pixels and captions differ (the data, from fingerprint ")
    assert "same samples" not in caplog.text
    assert loader.state_dict()["skipped"] == []
    assert len(take(loader, 2)) == 2


def test_malformed_states_and_other_sample_orders_are_refused(train_split, tokenizer):
    loader = load(train_split, tokenizer, batch_size=8)
    with pytest.raises(DataError, match="wanted the state of a loader, found one without seed, epoch"):
        loader.load_state_dict({"step": 1})
    with pytest.raises(DataError, match="wanted a state with sample order version 1, found 99; finish the run"):
        loader.load_state_dict(state_after(train_split, tokenizer, 1) | {"order": 99})


@pytest.mark.slow
def test_loader_state_ignores_prefetched_batches(train_split, tokenizer):
    for prefetch in (0, 1, 7):
        loader = load(train_split, tokenizer, batch_size=8, prefetch_batches=prefetch)
        states = []
        for _ in range(9):
            take(loader, 1)
            time.sleep(0.02)  # lets the thread prefetch
            states.append(loader.state_dict())
        assert [state["epoch"] * 60 + state["position"] for state in states] == [8 * k for k in range(1, 10)]


def test_merge_states_has_the_bad_images_of_all_ranks_and_the_samples_of_all():
    """Two ranks after 30 samples of the second epoch of 100, each with the bad images of its own batches."""
    state = {"seed": 3, "epoch": 1, "position": 30, "step": 13, "order": 1}
    states = [state | {"skipped": [7, 90], "met": 65}, state | {"skipped": [2, 7], "met": 65}]
    assert merge_states(states, samples=100) == state | {"skipped": [2, 7, 90], "met": 130}
    assert states[0] == state | {"skipped": [7, 90], "met": 65}  # unchanged


def test_merge_states_of_one_rank_is_its_state():
    state = {"seed": 3, "epoch": 0, "position": 8, "step": 1, "skipped": [5], "met": 8}
    assert merge_states([state], samples=100) == state
