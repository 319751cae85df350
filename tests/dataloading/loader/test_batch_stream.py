"""Stream of batches: their content, and the thread that prefetches them."""

import gc
import itertools
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from mvlm_dataloading import Loader, Masking
from mvlm_dataloading.loader import reader as reader_module
from mvlm_dataloading.loader.masking import (
    draw_patch_masks,
    draw_token_masks,
    draw_variable_patch_masks,
    draw_weighted_token_masks,
)
from mvlm_dataloading.randomness import text_hash
from support.loaders import make_loader


def load(dataset, tokenizer, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 64, "text_length": 12, "seed": 5}
    return make_loader(dataset, tokenizer, **(defaults | settings))


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def test_batch_shapes_dtypes_and_values(train_split, tokenizer):
    batch, masks = take(load(train_split, tokenizer), 1)[0]
    assert (batch.images.dtype, batch.images.shape) == (torch.uint8, (8, 3, 64, 64))
    assert batch.tokens.dtype == batch.image_id.dtype == batch.text_id.dtype == batch.sample_id.dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    lengths = batch.cu_seqlens.diff()
    assert batch.cu_seqlens.tolist()[0] == 0
    assert batch.cu_seqlens.tolist()[-1] == len(batch.tokens)
    assert batch.max_length == lengths.max() <= 12
    assert (masks.patch_ids.dtype, masks.patch_ids.shape) == (
        torch.int64,
        (8, 2 * 4),
    )  # round(0.6 * 4) blocks of 4 patches
    for b, i in enumerate(batch.sample_id.tolist()):
        tokens = batch.tokens[batch.cu_seqlens[b] : batch.cu_seqlens[b + 1]]
        known = {tuple(tokenizer.encode([c], 12)[0].tolist()): text_hash(c) for c in train_split.captions(i)}
        assert known[tuple(tokens.tolist())] == batch.text_id[b]
        assert batch.image_id[b] == train_split.image_id(i)
    special = torch.tensor([tokenizer.cls_id, tokenizer.sep_id])
    assert not torch.isin(batch.tokens[masks.token_ids], special).any()


def test_loader_masks_equal_the_public_mask_functions(train_split, tokenizer):
    loader = load(train_split, tokenizer)
    for batch, masks in take(loader, 7):
        ids, lengths = batch.sample_id.numpy(), batch.cu_seqlens.diff().numpy()
        assert np.array_equal(masks.patch_ids, draw_patch_masks(5, 0, ids, image_size=64))
        assert np.array_equal(masks.token_ids, draw_token_masks(5, 0, ids, lengths))


@pytest.mark.parametrize("per_image", [None, 1])
def test_whole_words_of_captions_are_masked(train_split, tokenizer, per_image):
    """Words are told from the captions, not from tokens."""
    several = 0
    for batch, masks in take(
        load(train_split, tokenizer, masking=Masking(whole_word_masking=True), per_image=per_image), 5
    ):
        captions = batch.tokens.tensor_split(batch.cu_seqlens[1:-1].long())
        for tokens, start in zip(captions, batch.cu_seqlens.tolist(), strict=False):
            text = tokenizer.decode(tokens)
            spans = [range(start + 1 + a, start + 1 + b) for _, a, b in tokenizer.words(text)]
            inside = {i for i in masks.token_ids.tolist() if start <= i < start + len(tokens)}
            chosen = [span for span in spans if inside & set(span)]
            assert inside == {i for span in chosen for i in span}
            assert len(chosen) == max(1, round(0.3 * len(spans)))
            several += any(len(span) > 1 for span in chosen)
    assert several


def test_variable_masks_equal_the_mask_functions(train_split, tokenizer):
    masking = Masking(image_masking="variable", text_masking="variable")
    loader = load(train_split, tokenizer, masking=masking)
    for batch, masks in take(loader, 3):
        of = (5, 0, batch.sample_id.numpy())
        patches, patch_weights = draw_variable_patch_masks(*of, image_size=64)
        tokens = draw_weighted_token_masks(*of, batch.cu_seqlens.diff().numpy(), ratio=None)
        found = (masks.patch_ids, masks.patch_weights, masks.token_ids, masks.token_weights)
        for tensor, wanted in zip(found, (patches, patch_weights, *tokens), strict=True):
            assert np.array_equal(tensor, wanted)
    _, masks = next(iter(load(train_split, tokenizer)))
    assert masks.token_weights is masks.patch_weights is None


@pytest.mark.slow
def test_captions_are_drawn_evenly(train_split, tokenizer):
    i = 2  # has three captions
    texts = [text_hash(caption) for caption in train_split.captions(i)]
    drawn = Counter()
    for batch, _ in take(load(train_split, tokenizer, batch_size=60, image_size=32), 60):
        drawn[texts.index(int(batch.text_id[batch.sample_id == i][0]))] += 1
    assert set(drawn) == {0, 1, 2}
    assert min(drawn.values()) > 8  # 20 expected, standard deviation 3.7


def test_batches_do_not_change_while_the_loader_continues(train_split, tokenizer):
    loader = load(train_split, tokenizer)
    held = take(loader, 10)
    copies = [batch.images.clone() for batch, _ in held]
    take(loader, 30)
    del loader
    assert all(torch.equal(batch.images, copy) for (batch, _), copy in zip(held, copies, strict=True))


def samples(batches) -> list[tuple[int, bytes]]:
    return [
        (int(i), image.numpy().tobytes())
        for batch, _ in batches
        for i, image in zip(batch.sample_id, batch.images, strict=True)
    ]


def threads() -> int:
    return sum(thread.name == "mvlm-loader" for thread in threading.enumerate())


@pytest.mark.slow
def test_loader_threads_end_with_close_collection_and_the_last_batch(train_split, tokenizer):
    assert threads() == 0
    loader = load(train_split, tokenizer, batch_size=8)
    first = samples(take(loader, 1))
    assert threads() == 1
    loader.close()
    assert threads() == 0
    assert samples(take(loader, 1)) != first  # the loader continues
    assert threads() == 1
    del loader
    gc.collect()
    assert threads() == 0
    assert len(list(load(train_split, tokenizer, batch_size=32, train=False))) == 2
    assert threads() == 0


def test_an_error_in_the_loader_thread_is_raised_by_next(train_split, tokenizer, monkeypatch):
    loader = load(train_split, tokenizer, batch_size=8)
    take(loader, 2)
    monkeypatch.setattr(reader_module.Segment, "next", lambda _: (_ for _ in ()).throw(OSError("the disk is gone")))
    with pytest.raises(OSError, match="the disk is gone"):
        take(loader, 20)
    assert loader.step < 20
