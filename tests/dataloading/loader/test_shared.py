"""Batches that have each image and each caption once: the samples are those of batches that have them all."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from mvlm_dataloading import Augment, DataError, Dataset, Loader, ShardWriter, Tokenizer, open_dataset, tokenizer_for
from mvlm_dataloading.loader import kept as kept_module
from mvlm_dataloading.loader import reader as reader_module
from mvlm_dataloading.loader.resume import merge_states
from support.data import damage_images, make_image
from support.loaders import make_loader

IMAGES, QUESTIONS = 9, 5


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Dataset:
    """Five questions about each of nine images, four of which have the same words for all images."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    with ShardWriter(folder, name="set", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(IMAGES):
            for k in range(QUESTIONS):
                text = f"question {k} about it" if k else f"what is number {i}?"
                assert writer.add(f"q{i}-{k}", make_image(i, size=(40, 44)), [text], {"image_id": i}) is None
    return open_dataset(folder, "train")


@pytest.fixture(scope="module")
def tokenizer(split) -> Tokenizer:
    return tokenizer_for(split, 300)


def load(split: Dataset, tokenizer: Tokenizer, **settings: Any) -> Loader:
    options: dict[str, Any] = {"batch_size": 12, "image_size": 32, "text_length": 12, "seed": 5, "mask_block": 16}
    return make_loader(split, tokenizer, augment=Augment(flip=0.5), **options | settings)


def samples(batches) -> list[tuple[int, bytes, list[int]]]:
    """Id, pixels and tokens of each sample of batches, in order."""
    found = []
    for batch, _ in batches:
        images, captions = batch.pairs()
        parts = [part.tolist() for part in batch.tokens.tensor_split(batch.cu_seqlens[1:-1].tolist())]
        for row, sample in enumerate(batch.sample_id.tolist()):
            pixels = batch.images[int(images[row])].numpy().tobytes()
            found.append((sample, pixels, parts[int(captions[row])]))
    return found


def take(loader: Loader, count: int) -> list:
    return list(itertools.islice(loader, count))


@pytest.mark.slow
@pytest.mark.parametrize("keep_mb", [0, 10])
def test_samples_are_those_of_the_first_question_of_their_image(split, tokenizer, keep_mb):
    """A loader that reads each sample alone has, for an image's first sample, the crop that all of them get here."""
    first = split.first_of_image()
    assert first.tolist() == [QUESTIONS * i for i in range(IMAGES) for _ in range(QUESTIONS)]
    alone = take(load(split, tokenizer, batch_size=45), 2)
    crops = [{i: pixels for i, pixels, _ in samples([batch])} for batch in alone]
    texts = {i: tokens for i, _, tokens in samples(alone)}
    together = take(load(split, tokenizer, batch_size=15, per_image=3, keep_mb=keep_mb), 6)
    for number, one in enumerate(together):
        batch, masks = one
        assert len(batch.images) < len(batch.sample_id) == 15
        assert len({image.numpy().tobytes() for image in batch.images}) == len(batch.images) == len(masks.patch_ids)
        assert len(batch.cu_seqlens) - 1 == len(set(batch.text_id.tolist()))
        assert masks.token_ids.max() < len(batch.tokens)
        assert batch.sample_tokens == sum(len(tokens) for *_, tokens in samples([one]))
        for i, pixels, tokens in samples([one]):
            assert pixels == crops[number // 3][int(first[i])]
            assert tokens == texts[i]
    assert sorted(i for i, *_ in samples(together[:3])) == list(range(45))


@pytest.mark.slow
def test_a_kept_image_is_kept_and_resized_once_for_its_questions(split, tokenizer, monkeypatch):
    resized, kept, resize, keep = [], [], kept_module.Resize.__call__, reader_module.keep_split
    monkeypatch.setattr(
        kept_module.Resize, "__call__", lambda self, crops: resized.append(len(crops)) or resize(self, crops)
    )
    monkeypatch.setattr(reader_module, "keep_split", lambda *args: kept.append(keep(*args)) or kept[-1])
    found = take(load(split, tokenizer, batch_size=45, per_image=QUESTIONS, keep_mb=1, prefetch_batches=0), 2)
    assert [len(batch.images) for batch, _ in found] == [IMAGES, IMAGES]
    assert resized == [IMAGES, IMAGES]
    assert len(kept[0].images) == IMAGES * QUESTIONS
    assert len({id(image) for image in kept[0].images}) == IMAGES


@pytest.mark.slow
def test_an_image_has_another_crop_in_another_epoch(split, tokenizer):
    """The batch begins in one epoch and ends in the next."""
    batch, _ = take(load(split, tokenizer, batch_size=90, per_image=QUESTIONS), 1)[0]
    assert len(batch.images) == 2 * IMAGES


@pytest.mark.slow
def test_ranks_share_every_batch_and_a_resume_is_bitwise(split, tokenizer):
    settings: dict[str, Any] = {"per_image": 2}
    whole = samples(take(load(split, tokenizer, **settings), 8))
    ranks = [take(load(split, tokenizer, rank=r, world_size=2, **settings), 8) for r in (0, 1)]
    assert [x for both in zip(*ranks, strict=True) for x in samples(both)] == whole
    loader, resumed = (load(split, tokenizer, **settings) for _ in range(2))
    take(loader, 5)
    resumed.load_state_dict(merge_states([loader.state_dict()], len(split)))
    assert resumed.resumed is not None
    assert resumed.resumed.exact_pixels
    assert samples(take(resumed, 3)) == whole[60:]
    with pytest.raises(DataError, match="with 3 samples of an image together, found 2"):
        load(split, tokenizer, per_image=3).load_state_dict(loader.state_dict())
    other = load(split, tokenizer)
    with pytest.raises(DataError, match="with 1 samples of an image together, found 2"):
        other.load_state_dict(loader.state_dict())
    other.load_state_dict(load(split, tokenizer, per_image=1).state_dict())
    assert other.resumed is not None
    assert not other.resumed.exact_pixels


def masks_of(batches) -> dict[tuple[str, int, int], list[int]]:
    """Masked patches of each image and tokens of each caption, by id, at its first place in the batches."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for batch, masks in batches:
        images, captions = batch.pairs()
        starts = batch.cu_seqlens.tolist()
        for row in range(len(batch.sample_id)):
            i, c = int(images[row]), int(captions[row])
            tokens = masks.token_ids[(masks.token_ids >= starts[c]) & (masks.token_ids < starts[c + 1])] - starts[c]
            found.setdefault(("image", int(batch.image_id[row]), 0), masks.patch_ids[i].sort()[0].tolist())
            found.setdefault(("text", int(batch.text_id[row]), 0), tokens.tolist())
    return found


@pytest.mark.slow
def test_masks_of_images_and_captions_depend_on_neither_ranks_nor_batch(split, tokenizer):
    settings: dict[str, Any] = {"per_image": 1, "text_length": 24}
    epoch = len(split)
    whole = masks_of(take(load(split, tokenizer, batch_size=9, **settings), epoch // 9))
    assert len(whole) == IMAGES + IMAGES + QUESTIONS - 1
    assert len({tuple(patches) for (kind, *_), patches in whole.items() if kind == "image"}) > 3
    assert masks_of(take(load(split, tokenizer, batch_size=15, **settings), epoch // 15)) == whole
    ranks = [take(load(split, tokenizer, batch_size=30, rank=r, world_size=3, **settings), 1) for r in range(3)]
    some = masks_of(itertools.chain(*ranks))
    assert len(some) > IMAGES
    assert some == {place: whole[place] for place in some}


def test_a_pass_in_order_has_every_sample(split, tokenizer):
    plain, shared = (samples(load(split, tokenizer, train=False, per_image=k)) for k in (None, 1))
    assert plain == shared
    assert [i for i, *_ in plain] == list(range(45))


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_replaced_in_all_its_samples(tokenizer, tmp_path):
    with ShardWriter(tmp_path / "data", name="set", source="", licence="", attribution="", recipe={}) as writer:
        for i in range(IMAGES):
            for k in range(2):
                writer.add(f"q{i}-{k}", make_image(i, size=(40, 44)), [f"question {k}"], {"image_id": i})
    damaged = open_dataset(tmp_path / "data", "train")
    damage_images(damaged, [8])
    loader = load(damaged, tokenizer, batch_size=18, per_image=2, max_bad_fraction=0.5)
    for batch, _ in take(loader, 2):
        assert not {8, 9} & set(batch.sample_id.tolist())
        first, images = damaged.first_of_image()[batch.sample_id.numpy()], batch.pairs()[0].numpy()
        assert len(np.unique(images)) == len(batch.images) == len(np.unique(first))
    assert loader.skipped == 2


@pytest.mark.slow
def test_samples_of_an_image_are_at_least_one(split, tokenizer):
    with pytest.raises(ValueError, match="per_image"):
        load(split, tokenizer, per_image=0)
    assert torch.equal(*(take(load(split, tokenizer), 1)[0][0].images for _ in range(2)))
