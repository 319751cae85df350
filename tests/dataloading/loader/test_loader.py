import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from mvlm_dataloading import DataError, Loader, Tokenizer, open_dataset
from mvlm_dataloading.loader import reader as reader_module
from mvlm_dataloading.loader.sampler import write_index_views
from support.data import write_dataset
from support.loaders import make_loader


def load(dataset, tokenizer, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 64, "text_length": 12, "seed": 5}
    return make_loader(dataset, tokenizer, **(defaults | settings))


def rows(batches) -> list[dict]:
    """The samples of batches one by one, independent of the batch that they came in."""
    found = []
    for batch, masks in batches:
        cuts = batch.cu_seqlens.tolist()
        for b, sample in enumerate(batch.sample_id.tolist()):
            inside = [i - cuts[b] for i in masks.token_ids.tolist() if cuts[b] <= i < cuts[b + 1]]
            found.append(
                {
                    "sample": sample,
                    "pixels": batch.images[b].numpy().tobytes(),
                    "tokens": batch.tokens[cuts[b] : cuts[b + 1]].tolist(),
                    "patches": masks.patch_ids[b].tolist(),
                    "masked": inside,
                    "ids": (int(batch.image_id[b]), int(batch.text_id[b])),
                }
            )
    return found


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def test_loader_yields_every_sample_once_per_epoch_in_full_batches(train_split, tokenizer):
    loader = load(train_split, tokenizer, batch_size=7)
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
def test_samples_are_the_same_in_batches_of_any_size(train_split, tokenizer):
    wanted = rows(take(load(train_split, tokenizer, batch_size=20), 6))
    for settings in ({"batch_size": 1}, {"batch_size": 7, "num_threads": 1}, {"batch_size": 60}, {"batch_size": 50}):
        count = -(-120 // settings["batch_size"])
        assert rows(take(load(train_split, tokenizer, **settings), count))[:120] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_every_global_batch(train_split, tokenizer, world_size):
    """All ranks together see the samples of a single rank, across the end of an epoch."""
    wanted = rows(take(load(train_split, tokenizer), 16))
    shares = [
        [rows([pair]) for pair in take(load(train_split, tokenizer, rank=rank, world_size=world_size), 16)]
        for rank in range(world_size)
    ]
    assert [row for step in range(16) for share in shares for row in share[step]] == wanted


def test_a_batch_larger_than_the_data_set_wraps_around(train_split, tokenizer):
    batch, _ = take(load(train_split, tokenizer, batch_size=130), 1)[0]
    assert Counter(Counter(batch.sample_id.tolist()).values()) == {2: 50, 3: 10}


def test_epochs_and_seeds_give_other_draws(train_split, tokenizer):
    first, second = np.split(np.array(rows(take(load(train_split, tokenizer, batch_size=60), 2))), 2)
    other = rows(take(load(train_split, tokenizer, batch_size=60, seed=6), 1))
    by_sample = [{row["sample"]: row for row in part} for part in (first, second, other)]
    for one, two in itertools.combinations(by_sample, 2):
        for what in ("pixels", "patches"):
            changed = sum(one[i][what] != two[i][what] for i in range(60))
            assert changed > 40
        assert (
            10 < sum(one[i]["tokens"] != two[i]["tokens"] for i in range(60)) < 60
        )  # a third of them has one caption only


def test_a_pass_in_order_yields_whole_images_and_first_captions(train_split, tokenizer):
    loader = load(train_split, tokenizer, batch_size=25, train=False)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.images) for batch, _ in batches] == [25, 25, 10]
        found = rows(batches)
        assert [row["sample"] for row in found] == list(range(60))
        for i, row in enumerate(found):
            assert row["tokens"] == tokenizer.encode(train_split.captions(i)[:1], 12)[0].tolist()
    other_seed = rows(load(train_split, tokenizer, batch_size=60, train=False, seed=99))
    assert [row["pixels"] for row in other_seed] == [row["pixels"] for row in found]
    assert len(list(load(train_split, tokenizer, batch_size=100, train=False))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("batches", [0, 1, 3, 7, 8, 15])
def test_resume_is_bitwise(train_split, tokenizer, batches):
    """Positions before, at (7.5 batches of 8 are an epoch) and after the end of an epoch."""
    whole = rows(take(load(train_split, tokenizer), 20))
    loader = load(train_split, tokenizer)
    take(loader, batches)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["position"]) == divmod(8 * batches, 60)
    resumed = load(train_split, tokenizer, num_threads=1)
    resumed.load_state_dict(state)
    assert (resumed.step, resumed.epoch) == (loader.step, loader.epoch)
    assert rows(take(resumed, 20 - batches)) == whole[8 * batches :]
    assert resumed.step == 20


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 12, 60])
def test_resume_continues_at_another_batch_size(train_split, tokenizer, batch_size):
    whole = rows(take(load(train_split, tokenizer, batch_size=6), 40))
    loader = load(train_split, tokenizer, batch_size=6)
    take(loader, 9)
    resumed = load(train_split, tokenizer, batch_size=batch_size)
    resumed.load_state_dict(loader.state_dict())
    assert rows(take(resumed, 120 // batch_size)) == whole[54 : 54 + 120]


def test_resume_in_the_same_loader_and_at_an_exact_epoch_end(train_split, tokenizer):
    loader = load(train_split, tokenizer, batch_size=20)
    take(loader, 3)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)
    wanted = rows(take(loader, 3))
    loader.load_state_dict(state)
    assert rows(take(loader, 3)) == wanted


def test_the_seed_of_the_state_replaces_the_loaders(train_split, tokenizer, caplog):
    loader = load(train_split, tokenizer)
    take(loader, 2)
    wanted = loader.state_dict()
    resumed = load(train_split, tokenizer, seed=77)
    resumed.load_state_dict(wanted)
    assert "keeps the seed 5" in caplog.text
    assert rows(take(resumed, 3)) == rows(take(loader, 3))


def test_a_loader_state_of_other_data_is_refused(train_split, waves, tokenizer):
    state = load(open_dataset(waves, "test"), tokenizer).state_dict()
    with pytest.raises(
        DataError, match=r"wanted the data of the state, fingerprint .* resume with that data or start a new run"
    ):
        load(train_split, tokenizer).load_state_dict(state)


@pytest.mark.slow
def test_batches_do_not_depend_on_the_segment_length(train_split, tokenizer, monkeypatch):
    wanted = rows(take(load(train_split, tokenizer), 20))
    monkeypatch.setattr(reader_module, "FIRST_SEGMENT_BATCHES", 3)
    assert rows(take(load(train_split, tokenizer), 20)) == wanted
    one_pass = [row["sample"] for row in rows(load(train_split, tokenizer, train=False))]
    assert one_pass == list(range(60))


def test_a_reader_that_delivers_other_samples_is_noticed(train_split, tokenizer, monkeypatch):
    def write_reversed(folder, dataset, ids):
        return write_index_views(folder, dataset, np.concatenate([ids[:8], ids[8:16][::-1], ids[16:]]))

    monkeypatch.setattr("mvlm_dataloading.loader.segment.write_index_views", write_reversed)
    loader = load(train_split, tokenizer, prefetch_batches=0)
    take(loader, 1)
    with pytest.raises(AssertionError, match=r"wanted .* from DALI's reader, got"):
        take(loader, 1)


def test_loader_reads_folders_with_blanks_and_non_ascii_names(tmp_path, tokenizer, monkeypatch):
    write_dataset(tmp_path / "mein Ördner: 猫", 6)
    assert len(rows(take(load(open_dataset(tmp_path / "mein Ördner: 猫", "train"), tokenizer), 3))) == 24
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("relative"), 6)
    assert len(rows(take(load(open_dataset("relative", "train"), tokenizer), 3))) == 24


def test_loader_leaves_no_index_views_behind(train_split, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    loader = load(train_split, tokenizer)
    take(loader, 3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 0}, "wanted batch_size of at least 1, got 0"),
        ({"num_threads": 0}, "wanted num_threads of at least 1, got 0"),
        ({"prefetch_batches": -1}, "wanted prefetch_batches of at least 0, got -1"),
        ({"image_size": 100}, "mask_block must divide image_size"),
        ({"patch_size": 24}, "patch_size must divide mask_block"),
        ({"crop_scale": (0, 1)}, "wanted crop_scale"),
        ({"max_bad_fraction": 1.0}, r"wanted max_bad_fraction in \[0, 1\), got 1.0"),
        ({"text_mask_ratio": 2.0}, "text_mask_ratio"),
        ({"text_length": 2}, "wanted a text length of at least 3"),
        ({"world_size": 3}, "wanted a global batch_size divisible by world_size, got 8 for 3 ranks"),
        ({"rank": 2, "world_size": 2}, "wanted a rank from 0 to world_size - 1, got rank 2 of 2"),
        ({"world_size": 2, "train": False}, "wanted world_size 1 with train=False, got 2"),
    ],
)
def test_loader_arguments_that_do_not_fit_are_refused(train_split, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        load(train_split, tokenizer, **settings)


def test_a_caption_without_a_token_is_refused(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({"[CLS]": 0, "[SEP]": 1, "[MASK]": 2, "[PAD]": 3}, []))
    dataset = open_dataset(write_dataset(tmp_path / "d", 2), "train")
    with pytest.raises(DataError, match=r"wanted a caption with at least one token, found '(picture|the)"):
        take(load(dataset, Tokenizer(inner)), 1)
