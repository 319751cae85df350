"""Batches: their content, and the thread that makes them in advance."""

import gc
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from mvlm_dataloading.loader.masking import draw_patch_masks, draw_token_masks
from mvlm_dataloading.randomness import text_hash
from support.loaders import make_loader, rows, take


def test_batch_shapes_dtypes_and_values(waves_train, waves_tokenizer):
    batch, masks = take(make_loader(waves_train, waves_tokenizer), 1)[0]
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 64, 64))
    assert batch.tokens.dtype == batch.image_id.dtype == batch.text_id.dtype == batch.sample_id.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, len(batch.tokens))
    assert batch.max_length == batch.cu_seqlens.diff().max() <= 12
    # round(0.6 * 4) blocks of 4 patches
    assert (masks.patch_ids.dtype, masks.patch_ids.shape) == (torch.int64, (8, 2 * 4))
    for row in rows([(batch, masks)]):
        i, (image_id, text_id) = row["sample"], row["ids"]
        known = {tuple(waves_tokenizer.encode([c], 12)[0].tolist()): text_hash(c) for c in waves_train.captions(i)}
        assert known[tuple(row["tokens"])] == text_id
        assert image_id == waves_train.image_id(i)


@pytest.mark.parametrize("ratio", [0.3, None])
def test_masks_are_those_of_the_mask_functions(waves_train, waves_tokenizer, ratio):
    for batch, masks in take(make_loader(waves_train, waves_tokenizer, text_mask_ratio=ratio), 3):
        of = (5, 0, batch.sample_id.numpy())
        assert np.array_equal(masks.token_ids, draw_token_masks(*of, batch.cu_seqlens.diff().numpy(), ratio=ratio))
        assert np.array_equal(masks.patch_ids, draw_patch_masks(*of, image_size=64))


@pytest.mark.parametrize("per_image", [None, 1])
def test_whole_words_of_captions_are_masked(waves_train, waves_tokenizer, per_image):
    """Words are told from the captions, not from tokens."""
    several = 0
    for row in rows(take(make_loader(waves_train, waves_tokenizer, whole_word_masking=True, per_image=per_image), 5)):
        spans = [range(1 + a, 1 + b) for _, a, b in waves_tokenizer.words(waves_tokenizer.decode(row["tokens"]))]
        chosen = [span for span in spans if set(row["masked"]) & set(span)]
        assert row["masked"] == [i for span in chosen for i in span]
        assert len(chosen) == max(1, round(0.3 * len(spans)))
        several += any(len(span) > 1 for span in chosen)
    assert several


@pytest.mark.slow
def test_captions_are_drawn_evenly(waves_train, waves_tokenizer):
    i = 2  # has three captions
    texts = [text_hash(caption) for caption in waves_train.captions(i)]
    found = rows(take(make_loader(waves_train, waves_tokenizer, batch_size=60, image_size=32), 60))
    drawn = Counter(texts.index(row["ids"][1]) for row in found if row["sample"] == i)
    assert min(drawn[k] for k in range(3)) > 8  # 20 expected, standard deviation 3.7


def test_batches_do_not_change_while_the_loader_continues(waves_train, waves_tokenizer):
    loader = make_loader(waves_train, waves_tokenizer)
    held = take(loader, 10)
    copies = [batch.images.clone() for batch, _ in held]
    take(loader, 30)
    del loader
    assert all(torch.equal(batch.images, copy) for (batch, _), copy in zip(held, copies, strict=True))


def threads() -> int:
    return sum(thread.name == "mvlm-loader" for thread in threading.enumerate())


@pytest.mark.slow
def test_loader_threads_end_with_close_collection_and_the_last_batch(waves_train, waves_tokenizer):
    loader = make_loader(waves_train, waves_tokenizer)
    first = rows(take(loader, 1))
    assert threads() == 1
    loader.close()
    assert threads() == 0
    assert rows(take(loader, 1)) != first  # the loader continues
    assert threads() == 1
    del loader
    gc.collect()
    assert threads() == 0
    assert len(list(make_loader(waves_train, waves_tokenizer, batch_size=32, train=False))) == 2
    assert threads() == 0
