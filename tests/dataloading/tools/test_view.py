"""Views: data sets of indices alone."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from mvlm_dataloading import BuildOptions, DataError, ViewOptions, build_shards, make_view, open_dataset
from mvlm_dataloading.sources.record import ListedPiece, Record, Source
from support import published
from support.data import keys_of
from support.questions import write_questions


def write(out: Path, numbers, splits=None, each: int = 6, captions=published.captions, **settings) -> Path:
    """A data set of the images `numbers`, in tars of `each`."""
    split_of = splits or (lambda i: "train")
    records: dict[str, list[Record]] = {}
    for i in numbers:
        image = published.encoded(published.make_image(i, (60 + i, 50)), "PNG")
        records.setdefault(split_of(i), []).append(Record(f"{out.name}{i:03d}", image, captions(i), str(i)))
    pieces = [ListedPiece(s, known[k : k + each]) for s, known in records.items() for k in range(0, len(known), each)]
    return build_shards(Source(out.name, "tests", "CC0", {}, pieces), out, BuildOptions(**settings), workers=0)


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """20 images for training in four tars, 3 for a test."""
    return write(tmp_path_factory.mktemp("views") / "one", range(23), lambda i: "test" if i >= 20 else "train")


@pytest.fixture(scope="module")
def two(one) -> Path:
    """10 other images, and one that is in the test split of `one`."""
    return write(one.parent / "two", [*range(100, 110), 20])


def named(dataset: str, numbers) -> list[str]:
    return [f"{dataset}{i:03d}" for i in numbers]


def test_a_view_selects_by_size_words_and_patterns(one, tmp_path):
    choices = [
        ("side", ViewOptions(max_aspect=1.4), named("one", range(11))),  # (60 + i) / 50
        ("match", ViewOptions(match="number [5-7]$"), named("one", [5, 6, 7])),
        ("without", ViewOptions(without="number 1"), named("one", [0, *range(2, 10)])),
        ("words", ViewOptions(max_words=4), named("one", range(0, 20, 2))),  # odd numbers have a caption of five
        ("both", ViewOptions(min_words=4, match="the 1"), named("one", [1, 11, 13, 15, 17, 19])),
    ]  # fmt: skip
    for name, choice, wanted in choices:
        description = make_view(tmp_path / name, [one], choice)
        assert keys_of(tmp_path / name) == wanted, name
        train = description["splits"]["train"]
        assert train["samples"] == len(wanted)
        opened = open_dataset(tmp_path / name, "train")
        assert train["captions"] == sum(len(opened.captions(i)) for i in range(len(wanted)))
        total = sum(part["samples"] for part in description["splits"].values())
        assert total + sum(description["rejected"].values()) == 23
    make_view(tmp_path / "split", [one], ViewOptions(splits=("test",)))
    assert keys_of(tmp_path / "split", "test") == named("one", [20, 21, 22])
    with pytest.raises(DataError, match="wanted the split train, found test"):
        open_dataset(tmp_path / "split", "train")


def test_a_smaller_fraction_of_a_view_is_part_of_a_larger(one, tmp_path):
    found = []
    for fraction in (0.3, 0.6, 1.0):
        make_view(tmp_path / str(fraction), [one], ViewOptions(fraction=fraction))
        found.append(set(keys_of(tmp_path / str(fraction))))
        assert len(keys_of(tmp_path / str(fraction), "test")) == 3  # evaluation splits are kept whole
    assert found[0] < found[1] < found[2]
    for name, seed in (("again", 0), ("seed", 1)):
        make_view(tmp_path / name, [one], ViewOptions(fraction=0.6, seed=seed))
        assert (set(keys_of(tmp_path / name)) == found[1]) == (seed == 0)
    prints = {name: open_dataset(tmp_path / name, "train").fingerprint for name in ("0.6", "again", "seed")}
    assert prints["0.6"] == prints["again"] != prints["seed"]  # other samples of the same tars


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fraction", "weight"])
def test_a_fraction_of_a_fraction_is_drawn_independently(tmp_path, kind):
    """Halves of halves: about 60, 30 and 15 of 120."""
    source = write(tmp_path / "whole", range(120), each=200, captions=lambda i: ["words"])
    share = ViewOptions(fraction=0.5 if kind == "fraction" else 1)
    found = [set(keys_of(source))]
    for turn in range(3):
        make_view(tmp_path / str(turn), [source], share, weights=[1.0 if kind == "fraction" else 0.5])
        source = tmp_path / str(turn)
        found.append(set(keys_of(source)))
        mean = 60 / 2**turn
        assert found[-1] < found[-2]
        assert abs(len(found[-1]) - mean) < 4 * (mean / 2) ** 0.5


@pytest.mark.slow
def test_a_view_mixes_data_sets_by_weight(one, two, tmp_path):
    description = make_view(tmp_path / "view", [one, two], weights=[0.5, 2.5])
    found = keys_of(tmp_path / "view")
    counts = {key: found.count(key) for key in found}
    ones = [counts.get(key, 0) for key in named("one", range(20))]
    twos = [counts.get(key, 0) for key in named("two", range(100, 110))]
    assert set(ones) == {0, 1}
    assert 4 <= sum(ones) <= 16
    assert set(twos) == {2, 3}
    assert 21 <= sum(twos) <= 29
    # An image of `one`'s test split is dropped from train, from whichever source it comes.
    assert "two020" not in counts
    assert description["rejected"] == {"image is in an evaluation split": 1}
    assert keys_of(tmp_path / "view", "test") == named("one", [20, 21, 22])


def test_evaluation_images_stay_out_of_a_views_train_split(one, two, tmp_path):
    """Image 20 of `two` is in `one`'s test split, which these views leave out."""
    leaked = {"image is in an evaluation split": 1}
    train = make_view(tmp_path / "train", [one, two], ViewOptions(splits=("train",)))
    assert keys_of(tmp_path / "train") == named("one", range(20)) + named("two", range(100, 110))
    assert (train["splits"].keys(), train["rejected"]) == ({"train"}, leaked)
    kept = make_view(tmp_path / "kept", [one, two], ViewOptions(leaks="keep"))
    assert keys_of(tmp_path / "kept") == named("one", range(20)) + named("two", [*range(100, 110), 20])
    assert kept["rejected"] == {}
    # Image 20 of the test split is filtered out; the same image in train is not.
    again = write(tmp_path / "again", [20, 21], captions=lambda i: ["chosen words"])
    filtered = make_view(tmp_path / "filtered", [one, again, two], ViewOptions(without="number 2[02]$"))
    assert keys_of(tmp_path / "filtered") == named("one", range(20)) + named("two", range(100, 110))
    assert keys_of(tmp_path / "filtered", "test") == named("one", [21])
    assert filtered["rejected"] == {"image is in an evaluation split": 2, "a caption matches --without": 3}


def test_a_view_drops_duplicates_on_request(tmp_path):
    def captions(i: int) -> list[str]:
        return ["one caption"]

    first = write(tmp_path / "a", range(4), captions=captions)
    second = write(tmp_path / "b", range(2, 6), captions=captions, quality=60)
    for choice, wanted in (
        (ViewOptions(), 8),
        (ViewOptions(duplicates="exact"), 6),
        (ViewOptions(duplicates="near"), 6),
    ):
        make_view(tmp_path / choice.duplicates, [first, second], choice)
        assert len(keys_of(tmp_path / choice.duplicates)) == wanted
    assert keys_of(tmp_path / "exact") == [*named("a", range(4)), *named("b", [4, 5])]


def test_questions_about_one_image_are_no_duplicates(tmp_path):
    """The build refuses the same wish."""
    questions = write_questions(tmp_path / "questions", {"train": 32})
    make_view(tmp_path / "all", [questions])
    assert len(open_dataset(tmp_path / "all", "train")) == len(open_dataset(questions, "train"))
    for choice in ("exact", "near"):
        for source in (questions, tmp_path / "all"):
            with pytest.raises(
                DataError, match="duplicates: wanted data sets with a sample per image, got one of quest"
            ):
                make_view(tmp_path / "view", [source], ViewOptions(duplicates=choice))


def test_views_of_views_and_of_moved_folders(one, two, tmp_path):
    make_view(tmp_path / "all" / "first", [one], ViewOptions(without="number 1"))
    make_view(tmp_path / "all" / "second", [tmp_path / "all" / "first", two], ViewOptions(match="number .*[37]"))
    wanted = named("one", [3, 7]) + named("two", [103, 107])
    assert keys_of(tmp_path / "all" / "second") == wanted
    # Paths are relative, so a tree can be moved as a whole.
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.copytree(one, tree / "one")
    make_view(tree / "view", [tree / "one"], ViewOptions(match="number 3"))
    tree.rename(tmp_path / "moved")
    assert keys_of(tmp_path / "moved" / "view") == ["one003"]
    assert all(not shard["tar"].startswith("/") for part in
               json.loads((tmp_path / "moved/view/dataset.json").read_text())["splits"].values()
               for shard in part["shards"])  # fmt: skip


def test_a_view_keeps_stored_tokens_if_all_sources_agree(tmp_path, waves_tokenizer):
    waves_tokenizer.save(tmp_path / "tokenizer.json")
    sets = [
        write(tmp_path / name, numbers, tokenizer=tmp_path / "tokenizer.json", text_length=length)
        for name, numbers, length in (("a", range(3), 8), ("b", range(3, 6), 8), ("c", range(6, 9), 9))
    ]
    agreed = make_view(tmp_path / "agreed", sets[:2])
    assert agreed["tokens"] == {"fingerprint": waves_tokenizer.fingerprint, "max_length": 8}
    digest = hashlib.sha256((tmp_path / "agreed" / "tokenizer.json").read_bytes()).hexdigest()
    assert agreed["tokenizer"] == digest
    assert " tok " in (tmp_path / "agreed" / "train-000000.idx").read_text()
    assert "tokens" not in make_view(tmp_path / "others", sets)


def rebuild(source: Path) -> None:
    shutil.rmtree(source)
    write(source, range(40, 60))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda source, view: (source / "train-000000.tar").unlink(), r"source/train-000000\.tar: wanted a shard"),
        (lambda source, view: shutil.copy(source / "train-000001.idx", view / "train-000000.idx"),
         r"train-000000\.idx: wanted the index that dataset\.json names"),
        (lambda source, view: rebuild(source), r"train-000000\.tar: wanted \d+ bytes as in dataset\.json"),
    ],
)  # fmt: skip
def test_a_view_that_does_not_fit_its_source_is_refused(one, tmp_path, damage, message):
    source, view = tmp_path / "source", tmp_path / "view"
    shutil.copytree(one, source)
    make_view(view, [source], ViewOptions(match="number [0-5]$"))
    (view / "train.index").unlink()
    damage(source, view)
    with pytest.raises(DataError, match=message):
        open_dataset(view, "train")


def test_malformed_views_are_refused(one, tmp_path):
    (tmp_path / "link").symlink_to(one)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter").write_text("dear")
    for choice, settings, message in (
        (ViewOptions(match="["), {}, "match: wanted a regular expression"),
        (ViewOptions(fraction=0), {}, "fraction: wanted more than 0 and at most 1, got 0"),
        (ViewOptions(splits=("dev",)), {}, "splits: wanted some of test, train, got dev"),
        (ViewOptions(), {"weights": (1.0, 2.0)}, "weights: wanted a number above 0 for each of 1 sources"),
        *(
            (ViewOptions(), {"weights": (float(w),)}, "weights: wanted a number above 0")
            for w in ("0", "-1", "nan", "inf")
        ),
        (
            ViewOptions(),
            {"sources": [one, tmp_path / "link"]},
            "sources: wanted each data set once",
        ),  # test images twice
        (ViewOptions(min_side=1000), {}, "wanted at least one sample in the view"),
        (ViewOptions(), {"out": tmp_path / "used"}, "wanted a new or an empty folder"),
    ):
        with pytest.raises(DataError, match=message):
            make_view(**{"out": tmp_path / "view", "sources": [one], **settings}, options=choice)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "used"]
