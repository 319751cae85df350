"""Resuming from a state with the same loader and with others."""

import hashlib
import json
from dataclasses import make_dataclass

import pytest

from mvlm_dataloading import DataError, Loader, open_dataset
from mvlm_dataloading.loader.augment import Augment
from mvlm_dataloading.loader.resume import ResumeReport, merge_states, text_hash
from mvlm_dataloading.masking import Masking
from support.loaders import make_loader, rows, take


def load(dataset, tokenizer, **settings) -> Loader:
    return make_loader(dataset, tokenizer, **{"augment": Augment(operations=2, flip=0.5), "image_size": 32} | settings)


def state_after(dataset, tokenizer, batches: int, **settings) -> dict:
    loader = load(dataset, tokenizer, **settings)
    take(loader, batches)
    return json.loads(json.dumps(loader.state_dict()))


def resumed(loader: Loader, state: dict, **settings) -> ResumeReport:
    loader.load_state_dict(state, **settings)
    assert loader.resumed is not None
    return loader.resumed


@pytest.fixture(scope="module")
def whole(waves_train, waves_tokenizer) -> list[dict]:
    """Rows of 20 batches of 8: two epochs and two thirds."""
    return rows(take(load(waves_train, waves_tokenizer), 20))


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 3, 8, 15])
def test_resume_is_bitwise(waves_train, waves_tokenizer, whole, batches):
    """Positions before, at (7.5 batches of 8 are an epoch) and after the end of an epoch; threads and memory differ."""
    state = state_after(waves_train, waves_tokenizer, batches, keep_mb=10 * (batches % 2))
    assert (state["epoch"], state["position"]) == divmod(8 * batches, 60)
    loader = load(waves_train, waves_tokenizer, num_threads=1, keep_mb=10 * (batches == 8))
    assert resumed(loader, state) == ResumeReport(exact_pixels=True, exact_text=True, changed=())
    assert (loader.step, loader.epoch) == (batches, 8 * batches // 60)
    assert rows(take(loader, 20 - batches)) == whole[8 * batches :]
    assert loader.step == 20
    loader.load_state_dict(state)  # the same loader again
    assert rows(take(loader, 1)) == whole[8 * batches : 8 * batches + 8]


@pytest.mark.slow
def test_resuming_with_other_batches_and_ranks_keeps_the_samples(waves_train, waves_tokenizer, whole):
    """From 1 rank to 4 to 2, at other batch sizes, within an epoch, at its end and across it."""
    state, at = state_after(waves_train, waves_tokenizer, 3), 24
    for world_size, batch_size, batches in ((4, 12, 3), (2, 10, 6), (1, 6, 1)):
        parts, states = [], []
        for rank in range(world_size):
            loader = load(waves_train, waves_tokenizer, batch_size=batch_size, rank=rank, world_size=world_size)
            report = resumed(loader, state)
            assert (report.exact_pixels, report.exact_text, len(report.changed) > 0) == (True, True, True)
            parts.append([rows([pair]) for pair in take(loader, batches)])
            states.append(loader.state_dict())
        assert [row for step in range(batches) for part in parts for row in part[step]] == whole[
            at : at + batches * batch_size
        ]
        assert all(other == states[0] for other in states)
        state, at = json.loads(json.dumps(states[0])), at + batches * batch_size
    assert at > 120  # two epochs


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, same_pixels, same_text",
    [
        ({"augment": Augment(operations=2, flip=0.5, crop_ratio=(1, 1))}, False, True),
        ({"crop_scale": (0.5, 1.0)}, False, True),
        ({"image_size": 64}, False, False),
        ({"text_length": 9}, True, False),
        ({"text_mask_ratio": 0.5}, True, False),
        ({"text_mask_ratio": None}, True, False),
        ({"whole_word_masking": True}, True, False),
    ],
)
def test_resuming_with_other_settings_keeps_the_samples_and_reports_it(
    waves_train, waves_tokenizer, whole, settings, same_pixels, same_text
):
    loader = load(waves_train, waves_tokenizer, **settings)
    report = resumed(loader, state_after(waves_train, waves_tokenizer, 4))
    assert (report.exact_pixels, report.exact_text) == (same_pixels, same_text)
    found, wanted = rows(take(loader, 4)), whole[32:64]
    assert [row["sample"] for row in found] == [row["sample"] for row in wanted]
    assert same_pixels == ([row["pixels"] for row in found] == [row["pixels"] for row in wanted])


def test_states_of_earlier_versions_fit(waves_train, waves_tokenizer):
    """The keys of a state, and its hashes of settings, are those of version 0.1.0."""
    state = load(waves_train, waves_tokenizer).state_dict()
    assert list(state) == [
        "seed", "epoch", "position", "step", "fingerprint", "batch_size", "world_size", "skipped", "met", "order",
        "pictures", "text", "versions",
    ]  # fmt: skip
    assert state["pictures"] == "f25b1191caa7d5ea"
    assert (
        load(waves_train, waves_tokenizer, augment=Augment(strip=2)).state_dict()["pictures"]
        != (load(waves_train, waves_tokenizer, augment=Augment()).state_dict()["pictures"])
    )
    patches = {"image_size": 32, "patch_size": 16, "mask_block": 32, "ratio": 0.6}
    text = {"tokenizer": waves_tokenizer.fingerprint, "length": 12, "ratio": 0.3, "patches": patches}
    assert state["text"] == hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()[:16]
    other = load(waves_train, waves_tokenizer)
    assert not resumed(other, state | {"versions": {"torch": "0.1"}}).exact_pixels


def test_the_seed_of_the_state_replaces_the_loaders(waves_train, waves_tokenizer):
    loader = load(waves_train, waves_tokenizer)
    take(loader, 2)
    other = load(waves_train, waves_tokenizer, seed=77)
    other.load_state_dict(loader.state_dict())
    assert rows(take(other, 3)) == rows(take(loader, 3))


def test_other_data_and_other_states_are_refused(waves_train, waves, waves_tokenizer):
    state = state_after(open_dataset(waves, "test"), waves_tokenizer, 4)
    loader = load(waves_train, waves_tokenizer)
    own = loader.state_dict()
    for wrong, word in ((state, "fingerprint"), ({"step": 1}, "seed, epoch"), (own | {"order": 99}, "order version")):
        with pytest.raises(DataError, match=word):
            loader.load_state_dict(wrong)
    report = resumed(loader, state, other_data=True)
    assert (report.exact_pixels, report.exact_text, report.same_data) == (False, False, False)
    assert (loader.state_dict()["position"], loader.state_dict()["skipped"]) == (32, [])
    assert len(take(loader, 2)) == 2


def test_merge_states_has_the_bad_images_and_the_samples_of_all_ranks():
    """Two ranks after 30 samples of the second epoch of 100, each with the bad images of its own batches."""
    state = {"seed": 3, "epoch": 1, "position": 30, "step": 13, "order": 1}
    states = [state | {"skipped": [7, 90], "met": 65}, state | {"skipped": [2, 7], "met": 65}]
    assert merge_states(states, samples=100) == state | {"skipped": [2, 7, 90], "met": 130}
    assert states[0] == state | {"skipped": [7, 90], "met": 65}  # unchanged


def test_a_new_setting_of_masks_is_in_the_hash_but_not_at_its_default():
    newer = make_dataclass("Newer", [("scattered", bool, False)], bases=(Masking,), frozen=True, kw_only=True)
    before, same, other = (text_hash("t", 8, x, 96, False) for x in (Masking(), newer(), newer(scattered=True)))
    assert before == same != other
