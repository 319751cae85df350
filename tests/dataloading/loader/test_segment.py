"""Segments: splits kept in memory, strips of images, images of several samples, and the memory that segments free."""

import io
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm_dataloading import Augment, DataError, Dataset, Loader, Tokenizer, open_dataset, tokenizer_for
from mvlm_dataloading.loader import segment as segment_module
from mvlm_dataloading.loader.resume import merge_states
from support.data import damage_images, damaged_dataset, make_captions, make_image, shard_writer, write_dataset
from support.loaders import make_loader, rows, take

IMAGES, QUESTIONS = 9, 5


def assert_same(ours: Loader, others, count: int) -> None:
    """Assert that two loaders give equal batches and masks, tensor for tensor."""
    pairs = list(zip(islice(ours, count), others, strict=False))
    assert len(pairs) == count
    for one, other in pairs:
        for mine, theirs in zip(one, other, strict=True):
            for name in mine.__slots__:
                value, wanted = getattr(mine, name), getattr(theirs, name)
                assert torch.equal(value, wanted) if isinstance(value, torch.Tensor) else value == wanted


@pytest.fixture
def kept(monkeypatch) -> list[bool]:
    """True for each split that a reader tried to keep and keeps."""
    found, keep = [], segment_module.keep_split

    def recorded(*arguments):
        split = keep(*arguments)
        found.append(split is not None)
        return split

    monkeypatch.setattr("mvlm_dataloading.loader.reader.keep_split", recorded)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment, settings",
    [
        (Augment(), {}),
        (Augment(operations=3, flip=0.5), {"world_size": 2, "rank": 1}),
        (Augment(flip=0.5), {"num_threads": 1, "prefetch_batches": 0}),
    ],
    ids=str,
)
def test_a_kept_split_gives_the_batches_of_one_decoded_in_every_epoch(
    waves_train, waves_tokenizer, kept, augment, settings
):
    """PNG, JPEG and WebP images of several sizes, for two and a half epochs."""
    ours = make_loader(waves_train, waves_tokenizer, keep_mb=10, augment=augment, **settings)
    assert_same(ours, make_loader(waves_train, waves_tokenizer, augment=augment, **settings), 19)
    assert kept == [True]


def test_a_kept_split_is_read_once(tmp_path, waves_tokenizer):
    folder = write_dataset(tmp_path / "data", 12)
    loader = make_loader(open_dataset(folder, "train"), waves_tokenizer, keep_mb=10)
    take(loader, 2)  # all samples, whose images are known by their bytes
    for tar in folder.glob("*.tar"):
        tar.unlink()
    assert len(take(loader, 40)) == 40


@pytest.mark.slow
def test_rotated_and_odd_images_are_kept_as_they_are_decoded(tmp_path, waves_tokenizer, kept):
    """EXIF orientations, transparency, palettes, grey, CMYK: the decoder's rules hold for crops and whole images."""
    rng = np.random.default_rng(0)
    with shard_writer(tmp_path / "data") as writer:
        for i, (mode, kind) in enumerate(
            [*[("RGB", "JPEG")] * 9, ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("CMYK", "JPEG")]
        ):
            noise = rng.integers(0, 256, (50 + i, 70, 4 if mode in ("RGBA", "CMYK") else 3), dtype=np.uint8)
            image = Image.fromarray(noise, mode) if mode in ("RGBA", "CMYK") else Image.fromarray(noise).convert(mode)
            exif, file = Image.Exif(), io.BytesIO()
            if i < 9:
                exif[0x0112] = i  # the orientation
            image.save(file, kind, **({"exif": exif} if kind == "JPEG" else {}))
            assert writer.add(f"{i:03d}", file.getvalue(), make_captions(i)) is None
    dataset = open_dataset(tmp_path / "data", "train")
    assert_same(make_loader(dataset, waves_tokenizer, keep_mb=10), make_loader(dataset, waves_tokenizer), 10)
    assert kept == [True]


@pytest.mark.slow
def test_a_split_is_kept_in_chunks_if_it_fits(tmp_path, waves_tokenizer, monkeypatch, kept):
    """150 images of 40 x 50 x 3 bytes are 0.9 MB, 200 are 1.2 MB."""
    monkeypatch.setattr(segment_module, "CHUNK_SAMPLES", 70)
    for count, fits in ((150, True), (200, False)):
        folder = write_dataset(tmp_path / f"{count}", count, size=(40, 50), kinds=("JPEG",))
        dataset = open_dataset(folder, "train")
        assert_same(make_loader(dataset, waves_tokenizer, keep_mb=1), make_loader(dataset, waves_tokenizer), 20)
        assert kept.pop() == fits


@pytest.mark.slow
def test_a_split_with_an_undecodable_image_is_not_kept(tmp_path, waves_tokenizer, kept):
    dataset = damaged_dataset(tmp_path / "data", 40, [7])
    ours, others = (make_loader(dataset, waves_tokenizer, keep_mb=keep, max_bad_fraction=0.1) for keep in (10, 0))
    assert_same(ours, others, 10)
    assert (ours.skipped, others.skipped, kept) == (1, 1, [False])


# Strips


@pytest.fixture(scope="module")
def strips(tmp_path_factory) -> list[Dataset]:
    """A data set of strips of three images, and one of the first images, of the second and of the third."""
    tiles = np.random.default_rng(0).integers(0, 256, (12, 3, 40, 40, 3), dtype=np.uint8)
    datasets = []
    for k, images in enumerate([np.concatenate([tiles[:, k] for k in range(3)], axis=2), *tiles.swapaxes(0, 1)]):
        folder = tmp_path_factory.mktemp("strips") / f"{k}"
        with shard_writer(folder) as writer:
            for i, pixels in enumerate(images):
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                assert writer.add(f"{i:03d}", file.getvalue(), [f"number {i}"], {"image_id": i}) is None
        datasets.append(open_dataset(folder, "train"))
    return datasets


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"train": False}, {"keep_mb": 10, "num_threads": 1}])
def test_each_image_of_a_strip_is_loaded_as_if_it_were_alone(strips, settings):
    settings |= {"batch_size": 5, "image_size": 32, "mask_block": 16}
    count, tokenizer = 3 if "train" in settings else 6, tokenizer_for(strips[0], 300)  # two and a half epochs
    found = take(make_loader(strips[0], tokenizer, augment=Augment(strip=3), **settings), count)
    for k, dataset in enumerate(strips[1:]):
        others = take(make_loader(dataset, tokenizer, **settings), count)
        for (batch, masks), (other, other_masks) in zip(found, others, strict=True):
            assert batch.images.shape[1:] == (3, 32, 3 * 32)
            assert torch.equal(batch.images[..., 32 * k : 32 * (k + 1)], other.images)
            assert torch.equal(batch.tokens, other.tokens)
            assert torch.equal(masks.patch_ids, other_masks.patch_ids)


@pytest.mark.parametrize("keep_mb", [0, 10])
def test_images_that_are_no_strips_are_refused(strips, waves_tokenizer, keep_mb):
    with pytest.raises(DataError, match="strip of 2"):
        take(make_loader(strips[0], waves_tokenizer, augment=Augment(strip=2), keep_mb=keep_mb), 1)


# Images of several samples


def write_questions(folder, questions: int) -> Dataset:
    """Questions about each of nine images. All but the first have the same words for all images."""
    with shard_writer(folder) as writer:
        for i in range(IMAGES):
            for k in range(questions):
                text = f"question {k} about it" if k else f"what is number {i}?"
                assert writer.add(f"q{i}-{k}", make_image(i, size=(40, 44)), [text], {"image_id": i}) is None
    return open_dataset(folder, "train")


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Dataset:
    return write_questions(tmp_path_factory.mktemp("asked") / "data", QUESTIONS)


@pytest.fixture(scope="module")
def words(asked) -> Tokenizer:
    return tokenizer_for(asked, 300)


def load(dataset: Dataset, words: Tokenizer, **settings: Any) -> Loader:
    options: dict[str, Any] = {"batch_size": 12, "image_size": 32, "mask_block": 16, "augment": Augment(flip=0.5)}
    return make_loader(dataset, words, **options | settings)


def content(batches) -> list[tuple]:
    return [(row["sample"], row["pixels"], row["tokens"]) for row in rows(batches)]


@pytest.mark.slow
@pytest.mark.parametrize("keep_mb", [0, 10])
def test_samples_are_those_of_the_first_question_of_their_image(asked, words, keep_mb):
    """A loader that reads each sample alone has, for an image's first sample, the crop that all of them get here."""
    first = asked.first_of_image()
    assert first.tolist() == [QUESTIONS * i for i in range(IMAGES) for _ in range(QUESTIONS)]
    alone = [content([batch]) for batch in take(load(asked, words, batch_size=45), 2)]
    crops = [{i: pixels for i, pixels, _ in epoch} for epoch in alone]
    texts = {i: tokens for i, _, tokens in chain(*alone)}
    together = take(load(asked, words, batch_size=15, per_image=3, keep_mb=keep_mb), 6)
    for number, one in enumerate(together):
        batch, masks = one
        assert len(batch.images) < len(batch.sample_id) == 15
        assert len({image.numpy().tobytes() for image in batch.images}) == len(batch.images) == len(masks.patch_ids)
        assert len(batch.cu_seqlens) - 1 == len(set(batch.text_id.tolist()))
        assert masks.token_ids.max() < len(batch.tokens)
        assert batch.sample_tokens == sum(len(tokens) for *_, tokens in content([one]))
        for i, pixels, tokens in content([one]):
            assert pixels == crops[number // 3][int(first[i])]
            assert tokens == texts[i]
    assert sorted(i for i, *_ in content(together[:3])) == list(range(45))
    # A batch that begins in one epoch and ends in the next has another crop of each image in each.
    both, _ = take(load(asked, words, batch_size=90, per_image=QUESTIONS, keep_mb=keep_mb), 1)[0]
    assert len(both.images) == 2 * IMAGES


@pytest.mark.slow
def test_ranks_share_batches_of_images_and_a_resume_is_bitwise(asked, words):
    whole = content(take(load(asked, words, per_image=2), 8))
    ranks = [take(load(asked, words, rank=r, world_size=2, per_image=2), 8) for r in (0, 1)]
    assert [x for both in zip(*ranks, strict=True) for x in content(both)] == whole
    loader, resumed = (load(asked, words, per_image=2) for _ in range(2))
    take(loader, 5)
    resumed.load_state_dict(merge_states([loader.state_dict()], len(asked)))
    assert resumed.resumed is not None
    assert resumed.resumed.exact_pixels
    assert content(take(resumed, 3)) == whole[60:]
    for other in (load(asked, words, per_image=3), load(asked, words)):
        with pytest.raises(DataError, match="samples of an image together"):
            other.load_state_dict(loader.state_dict())
    other.load_state_dict(load(asked, words, per_image=1).state_dict())
    assert other.resumed is not None
    assert not other.resumed.exact_pixels


@pytest.mark.slow
def test_masks_of_images_and_captions_depend_on_neither_ranks_nor_batch(asked, words):
    def masks_of(batches) -> dict[tuple[str, int], list[int]]:
        """Masked patches of each image and tokens of each caption."""
        found: dict[tuple[str, int], list[int]] = {}
        for row in rows(batches):
            for name, id, masked in zip(("image", "text"), row["ids"], (row["patches"], row["masked"]), strict=True):
                assert found.setdefault((name, id), masked) == masked
        return found

    settings: dict[str, Any] = {"per_image": 1, "text_length": 24}
    whole = masks_of(take(load(asked, words, batch_size=9, **settings), 5))  # an epoch
    assert len(whole) == IMAGES + IMAGES + QUESTIONS - 1
    assert len({tuple(patches) for (kind, _), patches in whole.items() if kind == "image"}) > 3
    assert masks_of(take(load(asked, words, batch_size=15, **settings), 3)) == whole
    ranks = [take(load(asked, words, batch_size=30, rank=r, world_size=3, **settings), 1) for r in range(3)]
    some = masks_of(chain(*ranks))
    assert len(some) > IMAGES
    assert some == {place: whole[place] for place in some}


def test_a_pass_in_order_has_every_sample_of_an_image(asked, words):
    plain, shared = (content(load(asked, words, train=False, per_image=k)) for k in (None, 1))
    assert plain == shared
    assert [i for i, *_ in plain] == list(range(45))


@pytest.mark.slow
def test_an_image_that_cannot_be_decoded_is_replaced_in_all_its_samples(words, tmp_path):
    damage_images(write_questions(tmp_path / "data", 2), [8])
    damaged = open_dataset(tmp_path / "data", "train")
    loader = load(damaged, words, batch_size=18, per_image=2, max_bad_fraction=0.5)
    for batch, _ in take(loader, 2):
        assert not {8, 9} & set(batch.sample_id.tolist())
        first, images = damaged.first_of_image()[batch.sample_id.numpy()], batch.pairs()[0].numpy()
        assert len(np.unique(images)) == len(batch.images) == len(np.unique(first))
    assert loader.skipped == 2
