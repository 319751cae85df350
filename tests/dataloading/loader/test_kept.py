"""Splits kept in memory give the batches of a loader that decodes every image in every epoch."""

import io
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mvlm_dataloading import Augment, Loader, ShardWriter, open_dataset
from mvlm_dataloading.loader import kept as kept_module
from mvlm_dataloading.loader import reader as reader_module
from support.data import damage_images, make_captions, write_dataset
from support.loaders import make_loader


def load(dataset, tokenizer, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 8, "image_size": 64, "text_length": 12, "seed": 5}
    return make_loader(dataset, tokenizer, **(defaults | settings))


def tensors(pair) -> list[torch.Tensor]:
    batch, masks = pair
    return [
        *(batch.images, batch.tokens, batch.cu_seqlens, batch.image_id, batch.text_id, batch.sample_id),
        *(masks.patch_ids, masks.token_ids),
    ]


def assert_same(ours, others, count: int) -> None:
    pairs = list(zip(itertools.islice(ours, count), others, strict=False))
    assert len(pairs) == count
    for mine, other in pairs:
        assert all(torch.equal(a, b) for a, b in zip(tensors(mine), tensors(other), strict=True))


@pytest.fixture
def segments(monkeypatch) -> list[str]:
    """Kinds of the segments that a reader opens."""
    opened = []

    def recorded(kind):
        def make(*args, **settings):
            opened.append(kind.__name__)
            return kind(*args, **settings)

        return make

    for kind in (reader_module.Segment, reader_module.KeptSegment):
        monkeypatch.setattr(reader_module, kind.__name__, recorded(kind))
    return opened


@pytest.mark.slow
@pytest.mark.parametrize(
    "augment", [None, Augment(operations=3, flip=0.5), Augment(flip=0.5)], ids=["crop", "all", "flip"]
)
@pytest.mark.parametrize("settings", [{}, {"world_size": 2, "rank": 1}, {"num_threads": 1, "prefetch_batches": 0}])
def test_batches_are_the_same(train_split, tokenizer, segments, augment, settings):
    """PNG, JPEG and WebP images of several sizes, for two and a half epochs."""
    ours = load(train_split, tokenizer, keep_mb=10, augment=augment, **settings)
    others = load(train_split, tokenizer, augment=augment, **settings)
    assert_same(ours, others, 19)
    assert {"KeptSegment", "Segment"} == set(segments)


def test_a_kept_split_needs_no_decoder_after_the_first_pass(train_split, tokenizer, monkeypatch):
    built, build = [], kept_module.build_pipeline
    monkeypatch.setattr(kept_module, "build_pipeline", lambda *a, **k: built.append(k) or build(*a, **k))
    monkeypatch.setattr("mvlm_dataloading.loader.segment.build_pipeline", lambda *a, **k: pytest.fail("decodes again"))
    assert len(list(itertools.islice(load(train_split, tokenizer, keep_mb=10), 40))) == 40
    assert len(built) == 1


def test_rotated_and_odd_images_are_kept_as_they_are_decoded(tmp_path, tokenizer):
    """EXIF orientations, transparency, palettes, grey, CMYK: the decoder's rules hold for crops and whole images."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "data", name="odd", source="", licence="", attribution="", recipe={}) as writer:
        for i, (mode, kind) in enumerate(
            [*[("RGB", "JPEG")] * 9, ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("CMYK", "JPEG")]
        ):
            noise = rng.integers(0, 256, (50 + i, 70, 4 if mode in ("RGBA", "CMYK") else 3), dtype=np.uint8)
            image = Image.fromarray(noise, mode) if mode in ("RGBA", "CMYK") else Image.fromarray(noise).convert(mode)
            exif = Image.Exif()
            if i < 9:
                exif[0x0112] = i  # the orientation
            file = io.BytesIO()
            image.save(file, kind, **({"exif": exif} if kind == "JPEG" else {}))
            assert writer.add(f"{i:03d}", file.getvalue(), make_captions(i)) is None
    dataset = open_dataset(tmp_path / "data", "train")
    assert_same(load(dataset, tokenizer, keep_mb=10), load(dataset, tokenizer), 10)


@pytest.mark.slow
def test_resume_may_change_the_memory_for_images(train_split, tokenizer):
    for first, then in ((10, 0), (0, 10)):
        begun = load(train_split, tokenizer, keep_mb=first)
        list(itertools.islice(begun, 9))
        resumed = load(train_split, tokenizer, keep_mb=then)
        resumed.load_state_dict(json.loads(json.dumps(begun.state_dict())))
        assert resumed.resumed is not None
        assert resumed.resumed.exact_pixels
        assert not resumed.resumed.changed
        assert_same(resumed, itertools.islice(load(train_split, tokenizer), 9, None), 12)


@pytest.mark.slow
def test_a_split_beyond_the_limit_is_decoded_in_every_epoch(tmp_path, tokenizer, segments):
    """100 images of 300 x 300: 27 MB."""
    dataset = open_dataset(write_dataset(tmp_path / "data", 100, kinds=("JPEG",), size=(300, 300)), "train")
    for limit, kind in ((28, "KeptSegment"), (26, "Segment"), (0, "Segment")):
        segments.clear()
        assert_same(load(dataset, tokenizer, keep_mb=limit), load(dataset, tokenizer), 2)
        assert segments[0] == kind


@pytest.mark.slow
def test_a_large_split_is_kept_in_parts_and_given_up_after_one_batch(tmp_path, tokenizer, segments, monkeypatch):
    dataset = open_dataset(write_dataset(tmp_path / "data", 150, size=(40, 50), kinds=("JPEG",)), "train")
    built, write = [], kept_module.write_index_views
    monkeypatch.setattr(
        kept_module, "write_index_views", lambda folder, data, ids: built.append(len(ids)) or write(folder, data, ids)
    )
    monkeypatch.setattr(kept_module, "CHUNK_SAMPLES", 70)
    assert_same(load(dataset, tokenizer, keep_mb=1), load(dataset, tokenizer), 20)
    assert built == [64, 70, 16]
    segments.clear()
    built.clear()
    larger = open_dataset(write_dataset(tmp_path / "more", 200, size=(40, 50), kinds=("JPEG",)), "train")
    assert len(list(itertools.islice(load(larger, tokenizer, keep_mb=1), 1))) == 1
    assert (built, set(segments)) == ([64], {"Segment"})


@pytest.mark.slow
def test_a_split_with_an_undecodable_image_is_not_kept(tmp_path, tokenizer, segments):
    data = write_dataset(tmp_path / "data", 40)
    damage_images(open_dataset(data, "train"), [7])
    dataset = open_dataset(data, "train")
    ours, others = (load(dataset, tokenizer, keep_mb=keep, max_bad_fraction=0.1) for keep in (10, 0))
    assert_same(ours, others, 10)
    assert ours.skipped == others.skipped == 1
    assert set(segments) == {"Segment"}


def test_a_pass_in_order_keeps_nothing(train_split, tokenizer, segments):
    assert len(list(load(train_split, tokenizer, keep_mb=10, train=False))) == 8
    assert set(segments) == {"Segment"}


def test_a_negative_limit_is_refused(train_split, tokenizer):
    with pytest.raises(ValueError, match="wanted keep_mb of at least 0, got -1"):
        load(train_split, tokenizer, keep_mb=-1)
