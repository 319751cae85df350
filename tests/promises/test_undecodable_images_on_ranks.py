"""Undecodable images on several ranks: limits, substitutes and resuming."""

import itertools
import json
from typing import Any

import pytest

from mvlm_dataloading import DataError, Dataset, Loader, Tokenizer, open_dataset
from support.data import damage_images, wave_tokenizer, write_dataset
from support.loaders import make_loader

BAD = [3, 41, 77, 78]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return wave_tokenizer()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """100 images in a few shards, four of them damaged after they were written."""
    folder = tmp_path_factory.mktemp("damaged") / "data"
    write_dataset(folder, 100, max_shard_bytes=300_000, kinds=("PNG", "JPEG"))
    damage_images(open_dataset(folder, "train"), BAD)
    return open_dataset(folder, "train")


def load(dataset, tokenizer, **settings) -> Loader:
    defaults: dict[str, Any] = {"batch_size": 10, "image_size": 32, "text_length": 12, "seed": 1}
    return make_loader(dataset, tokenizer, **(defaults | settings))


def stream(loader: Loader, count: int) -> list[tuple[int, bytes, bytes]]:
    found = []
    for batch, masks in itertools.islice(loader, count):
        for b, i in enumerate(batch.sample_id.tolist()):
            found.append((i, batch.images[b].numpy().tobytes(), masks.patch_ids[b].numpy().tobytes()))
    return found


@pytest.mark.slow
def test_the_limit_of_undecodable_images_holds_for_each_rank(damaged, tokenizer):
    """A rank has seen half of the samples, so half as many bad ones are too many, plus a margin."""
    loader = load(damaged, tokenizer, rank=1, world_size=2, max_bad_fraction=0.0)
    with pytest.raises(DataError, match="wanted at most 0% undecodable images, found 1 of 50"):
        stream(loader, 10)


@pytest.fixture
def many(tmp_path):
    """400 images, and a function that damages each one whose number modulo 100 is below its argument."""
    folder = write_dataset(tmp_path / "data", 400, kinds=("JPEG",))

    def damaged(percent: int) -> Dataset:
        damage_images(open_dataset(folder, "train"), [i for i in range(400) if i % 100 < percent])
        return open_dataset(folder, "train")

    return damaged


def of_all_ranks(dataset, tokenizer, state: dict[str, Any] | None, batches: int) -> dict[str, Any]:
    """The state that a run of eight ranks saves after some batches: the bad images known to any of them."""
    states = []
    for rank in range(8):
        loader = load(dataset, tokenizer, batch_size=40, rank=rank, world_size=8)
        if state is not None:
            loader.load_state_dict(state)
        stream(loader, batches)
        loader.close()
        states.append(json.loads(json.dumps(loader.state_dict())))
    known = sorted(set().union(*(state["skipped"] for state in states)))
    return states[0] | {"skipped": known, "met": states[0]["epoch"] * len(dataset) + states[0]["position"]}


@pytest.mark.slow
def test_ranks_that_resume_see_what_uninterrupted_ranks_see(many, tokenizer):
    """4 % are bad and 5 % are allowed: a rank must not count what the others found against its own samples."""
    dataset = many(4)
    of_all_ranks(dataset, tokenizer, None, 20)  # two epochs
    half = of_all_ranks(dataset, tokenizer, None, 5)
    assert len(half["skipped"]) > 5
    end = of_all_ranks(dataset, tokenizer, half, 15)
    assert end["skipped"] == [i for i in range(400) if i % 100 < 4]


@pytest.mark.slow
def test_too_many_undecodable_images_stop_ranks_however_often_they_resume(many, tokenizer):
    dataset = many(10)
    assert of_all_ranks(dataset, tokenizer, None, 10)  # one rank alone sees too few of them

    def often() -> None:
        state = None
        for _ in range(10):
            state = of_all_ranks(dataset, tokenizer, state, 1)

    with pytest.raises(DataError, match=r"wanted at most 5% undecodable images, found \d+ of"):
        often()
    known = of_all_ranks(dataset, tokenizer, None, 10)
    with pytest.raises(DataError, match="wanted at most 5% undecodable images, found 40 of 400"):
        of_all_ranks(dataset, tokenizer, known, 1)


@pytest.mark.slow
def test_samples_seen_by_a_rank_continue_from_its_state(many, tokenizer):
    """30 % are bad, which is noticed within the first epoch, whether the run resumes after each batch or never."""
    dataset = many(30)

    def run(each: int) -> None:
        state = None
        for _ in range(10 // each):
            loader = load(dataset, tokenizer, batch_size=40, rank=3, world_size=8)
            if state is not None:
                loader.load_state_dict(state)
            stream(loader, each)
            state = loader.state_dict()
            loader.close()

    found = []
    for each in (10, 1):
        with pytest.raises(DataError, match="wanted at most 5% undecodable images") as error:
            run(each)
        found.append(str(error.value))
    assert found[0] == found[1]
