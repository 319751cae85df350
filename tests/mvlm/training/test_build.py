"""Tokenizer, loader and model of a run against the configuration."""

import itertools
import json
import logging
from pathlib import Path

import pytest
import torch

from mvlm.distributed.world import World
from mvlm.errors import ConfigError
from mvlm.runs.load import load_model
from mvlm.training.build import make_loader
from mvlm.training.run import open_inputs, pretrain
from mvlm_dataloading import open_dataset, tokenizer_for
from support.models import micro_config, pretrain_config

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, device=CPU)


@pytest.mark.slow
def test_loader_masks_and_truncates_as_configured(scenes, tokenizer):
    """Patches of 4 pixels in blocks of 8, a quarter of the 16 blocks; all ordinary tokens of captions of at most 5."""
    model = micro_config(patch_size=4, mask_block=8, image_mask_ratio=0.25, text_mask_ratio=1.0, text_length=5)
    config = pretrain_config(scenes, Path(), model=model, batch_size=32)
    batch, masks = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
    assert batch.images.shape == (32, 3, 32, 32)
    assert masks.patch_ids.shape == (32, 16)
    for row in masks.patch_ids.tolist():
        blocks = [(patch // 8 // 2, patch % 8 // 2) for patch in row]
        assert sorted(blocks.count(block) for block in set(blocks)) == [4, 4, 4, 4]
    starts = batch.cu_seqlens.tolist()
    assert max(b - a for a, b in itertools.pairwise(starts)) == 5
    special = {*starts[:-1], *(end - 1 for end in starts[1:])}
    assert masks.token_ids.tolist() == [t for t in range(starts[-1]) if t not in special]


def test_loader_masks_whole_words_if_configured(scenes, tokenizer):
    """Of the four words of "a square, COLOUR SHAPE" one is masked with all of its tokens."""
    model = micro_config(whole_word_masking=True, text_mask_ratio=0.1)
    config = pretrain_config(scenes, Path(), model=model, batch_size=32)
    batch, masks = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
    starts, several = batch.cu_seqlens.tolist(), 0
    for start, end in itertools.pairwise(starts):
        tokens = batch.tokens[start:end]
        words = [set(range(start + 1 + a, start + 1 + b)) for _, a, b in tokenizer.words(tokenizer.decode(tokens))]
        hidden = {i for i in masks.token_ids.tolist() if start <= i < end}
        assert hidden in words
        several += len(hidden) > 1
    assert several


def test_loader_order_follows_the_seed(scenes, tokenizer):
    orders = []
    for seed in (0, 0, 1):
        config = pretrain_config(scenes, Path(), batch_size=32, seed=seed)
        batch, _ = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
        orders.append(batch.sample_id.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_a_batch_above_the_split_is_a_warning(scenes, tokenizer, caplog):
    dataset = open_dataset(scenes, "train")
    for batch_size in (len(dataset), len(dataset) + 2):
        make_loader(dataset, tokenizer, pretrain_config(scenes, Path(), batch_size=batch_size), ALONE)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [
        f"batch_size: {len(dataset) + 2} is above the split's {len(dataset)} samples; batches repeat them"
    ]


@pytest.mark.parametrize("scale, flat", [((0.01, 0.02), True), ((0.9, 1.0), False)])
def test_loader_crops_as_configured(scenes, tokenizer, scale, flat):
    """A hundredth of a scene mostly has one colour; nine tenths of it never do."""
    config = pretrain_config(scenes, Path(), batch_size=32, crop_scale=scale)
    batch, _ = next(iter(make_loader(open_dataset(scenes, "train"), tokenizer, config, ALONE)))
    spread = batch.images.flatten(2).float().std(2).amax(1)  # (32,) by image
    assert (spread < 1).float().mean() > 0.5 if flat else (spread > 10).all()


def test_loader_augments_as_configured(scenes, tmp_path):
    """One augmentation changes the pixels, and neither captions nor masks."""
    seen = {}
    for name, changes in {"none": {}, "flip": {"flip": 1.0}, "randaugment": {"randaugment": 2}}.items():
        config = pretrain_config(scenes, tmp_path / name, **changes)
        dataset = open_dataset(scenes, "train")
        batch, masks = next(iter(make_loader(dataset, tokenizer_for(dataset, 300), config, ALONE)))
        seen[name] = batch.images, batch.tokens, masks.patch_ids
    whole, flipped, altered = (seen[name][0] for name in ("none", "flip", "randaugment"))
    assert flipped.equal(whole.flip(-1))
    assert not altered.equal(whole)
    for name in ("flip", "randaugment"):
        assert all(a.equal(b) for a, b in zip(seen[name][1:], seen["none"][1:], strict=True))


@pytest.mark.slow
def test_mask_token_of_the_model_is_the_tokenizers(scenes, tmp_path, without_tensorboard):
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, model=micro_config(mask_token_id=7))
    pretrain(config)
    loaded = load_model(config.out)
    model, tokenizer = loaded.network, loaded.tokenizer
    assert model.config.mask_token_id == tokenizer.mask_id == 4
    assert json.loads((config.out / "config.json").read_text())["model"]["mask_token_id"] == 4


@pytest.mark.slow
def test_tokenizer_can_be_given_by_path(scenes, tmp_path, tokenizer, without_tensorboard):
    tokenizer.save(tmp_path / "words.json")
    config = pretrain_config(scenes, tmp_path / "run", max_steps=1, tokenizer=tmp_path / "words.json")
    pretrain(config)
    assert load_model(config.out).tokenizer.fingerprint == tokenizer.fingerprint


def test_tokenizer_larger_than_the_models_vocabulary_is_refused(scenes, tmp_path, train_split):
    tokenizer_for(train_split, 320).save(tmp_path / "words.json")
    size = tokenizer_for(train_split, 320).vocab_size
    config = pretrain_config(scenes, tmp_path / "run", tokenizer=tmp_path / "words.json")
    with pytest.raises(ConfigError, match=f"model.vocab_size: wanted at least the tokenizer's {size}, got 300"):
        pretrain(config)
    assert not config.out.exists()


def test_vocabulary_too_small_for_all_bytes_is_refused(scenes, tmp_path):
    config = pretrain_config(scenes, tmp_path / "run", model=micro_config(vocab_size=100))
    with pytest.raises(ConfigError, match="wanted a vocabulary of at least 261"):
        pretrain(config)
    assert not config.out.exists()


def test_attention_backend_that_cannot_run_here_leaves_no_folder(scenes, tmp_path):
    config = pretrain_config(scenes, tmp_path / "run", cross_attention="triton", self_attention="flash-attn")
    with pytest.raises(ConfigError, match=r"attention backend flash-attn: .*choose one that can run: sdpa, math"):
        pretrain(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length, share", [(4, "100"), (16, None)])
def test_captions_that_are_cut_are_told_before_pretraining(scenes, tmp_path, caplog, length, share):
    config = pretrain_config(scenes, tmp_path / "run", model=micro_config(text_length=length))
    with caplog.at_level(logging.WARNING):
        open_inputs(config)
    wanted = f"{share} % of the first 1,000 texts have more than {length} tokens and are cut; raise --model.text-length"
    assert (wanted in caplog.text) == (share is not None)
    assert ("are cut" in caplog.text) == (share is not None)
