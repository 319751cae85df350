"""Captions as tokens stored with the data."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
import torch

from mvlm_dataloading import DataError, Dataset, Loader, Tokenizer, open_dataset, rebuild_indices
from mvlm_dataloading.dataset.dataset import split_stored_tokens
from mvlm_dataloading.loader import text as text_module
from mvlm_dataloading.randomness import Purpose, hash64, text_hash
from support.data import make_captions, make_image, write_shard_by_hand, write_tar
from support.loaders import rows

LENGTH = 12


def component(tokenizer, captions: list[str], length: int = LENGTH) -> bytes:
    """A `.tok` component by its definition: for each caption a count and its ids, int32."""
    words = []
    for caption in captions:
        ids = tokenizer.encode([caption], length)[0].tolist()
        words += [len(ids), *ids]
    return np.array(words, "<i4").tobytes()


@pytest.fixture
def write(tmp_path, waves_tokenizer):
    def write(stored, described: dict | None, name: str = "data"):
        """Writes 20 samples. `stored(i)` is the `.tok` component of sample i, or None."""
        folder = tmp_path / name
        folder.mkdir()
        members = []
        for i in range(20):
            parts = {"png": make_image(i), "txt": "\n".join(make_captions(i)).encode(), "tok": stored(i)}
            members += [(f"{i}.{kind}", content) for kind, content in parts.items() if content is not None]
        write_shard_by_hand(folder, members)
        if described:
            file = folder / "dataset.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"tokens": described}))
        return open_dataset(folder, "train")

    return write


def batches(dataset, tokenizer, count: int = 5, length: int = LENGTH):
    loader = Loader(dataset, tokenizer, batch_size=8, image_size=32, text_length=length, seed=2)
    return list(itertools.islice(loader, count))


def test_stored_tokens_equal_those_made_while_loading(write, waves_tokenizer, monkeypatch):
    described = {"fingerprint": waves_tokenizer.fingerprint, "max_length": LENGTH}
    dataset = write(lambda i: component(waves_tokenizer, make_captions(i)), described)
    plain = write(lambda i: None, None, "plain")
    wanted = {length: batches(plain, waves_tokenizer, length=length) for length in (LENGTH, 7)}
    monkeypatch.setattr(type(waves_tokenizer), "encode", None)  # must not be called
    for length, expected in wanted.items():
        for ours, others in zip(batches(dataset, waves_tokenizer, length=length), expected, strict=True):
            assert rows([ours]) == rows([others])


@pytest.mark.slow
def test_captions_of_a_small_split_are_tokenized_once(write, waves_tokenizer, monkeypatch):
    seen, encode = Counter(), waves_tokenizer.encode
    monkeypatch.setattr(waves_tokenizer, "encode", lambda texts, length: seen.update(texts) or encode(texts, length))
    batches(write(lambda i: None, None), waves_tokenizer, 13)  # five epochs
    assert set(seen.values()) == {1}


@pytest.mark.parametrize("changed", [{"fingerprint": "other"}, {"max_length": LENGTH - 1}])
def test_stored_tokens_of_another_tokenizer_or_length_are_not_used(write, waves_tokenizer, changed):
    described = {"fingerprint": waves_tokenizer.fingerprint, "max_length": LENGTH} | changed
    assert len(batches(write(lambda i: b"no tokens at all", described), waves_tokenizer)) == 5


@pytest.mark.parametrize(
    "stored, word",
    [
        ([3, 2, 400, 3], "vocabulary"),
        ([3, 2, -1, 3], "vocabulary"),
        ([3, 9, 10, 3], r"\[CLS\]"),
        ([2, 2, 3], "token"),  # a caption without one
        ([9, 2, 10, 3], "of 1 captions"),
        ([3, 2, 10, 3, 3, 2, 10, 3], "of 1 captions"),
        ([], "of 1 captions"),
        (None, "of 1 captions"),
    ],
)
def test_malformed_stored_tokens_are_refused_with_the_sample(write, waves_tokenizer, stored, word):
    described = {"fingerprint": waves_tokenizer.fingerprint, "max_length": LENGTH}
    content = None if stored is None else np.array(stored, "<i4").tobytes()
    dataset = write(lambda i: content if i == 3 else component(waves_tokenizer, make_captions(i)), described)
    assert (waves_tokenizer.vocab_size, waves_tokenizer.cls_id, waves_tokenizer.sep_id) == (400, 2, 3)
    with pytest.raises(DataError, match=f"train-000000.tar offset .* key 3: .*{word}"):
        batches(dataset, waves_tokenizer)


def test_a_truncated_token_component_is_refused():
    stored = np.array([1, 7, 0, 2, 8, 9], "<i4").tobytes()
    assert [part.tolist() for part in split_stored_tokens(stored, 3, "x")] == [[7], [], [8, 9]]
    with pytest.raises(DataError, match="x: wanted"):
        split_stored_tokens(stored[:7], 1, "x")


UNSEEN = "\ufffd\u200b"
ODD_CAPTIONS = [
    ["red", UNSEEN, "blue"],
    [UNSEEN, "green"],
    ["dog", "cat", "bird"],
    ["sun", UNSEEN, UNSEEN + UNSEEN, "moon", "star"],
    ["tree"],
    [UNSEEN, UNSEEN + " ", "sea"],
    ["boat", UNSEEN],
    ["house", "home"],
]


def bert_without() -> Tokenizer:
    """A tokenizer that drops what cannot be seen, as BERT's does. It knows the words above."""
    words = [text for captions in ODD_CAPTIONS for text in captions if UNSEEN not in text]
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    inner = tokenizers.Tokenizer(tokenizers.models.WordPiece({name: i for i, name in enumerate(names)}))
    drop, bert = tokenizers.normalizers.Replace(UNSEEN, ""), tokenizers.normalizers.BertNormalizer()
    inner.normalizer = tokenizers.normalizers.Sequence([drop, bert])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(inner)


def odd_dataset(folder, captions: list[list[str]]) -> Dataset:
    parts = [[(f"{i}.png", make_image(i)), (f"{i}.txt", "\n".join(texts).encode())] for i, texts in enumerate(captions)]
    write_tar(folder / "train-0.tar", list(itertools.chain(*parts)))
    rebuild_indices(folder)
    return open_dataset(folder, "train")


@pytest.mark.slow
@pytest.mark.parametrize("remembered", [0, 65536])
def test_a_caption_without_tokens_gives_its_turn_to_the_next(tmp_path, monkeypatch, remembered):
    """By a rotation of the list, in six epochs, on one rank or two, resumed or not."""
    monkeypatch.setattr(text_module, "MAX_REMEMBERED", remembered)
    dataset, bert, replaced = odd_dataset(tmp_path, ODD_CAPTIONS), bert_without(), 0

    def load(rank: int = 0, world_size: int = 1) -> Loader:
        return Loader(dataset, bert, batch_size=4, image_size=32, text_length=8, seed=3, rank=rank,
                      world_size=world_size)  # fmt: skip

    loader, halves = load(), [load(rank, 2) for rank in (0, 1)]
    state, rest = {}, []
    for step in range(12):
        batch, _ = next(iter(loader))
        shares = [next(iter(half))[0] for half in halves]
        assert torch.equal(batch.tokens, torch.cat([share.tokens for share in shares]))
        for row, i in enumerate(batch.sample_id.tolist()):
            first = int(hash64(Purpose.CAPTION, 3, np.array([step // 2]), np.array([i]))[0]) % len(ODD_CAPTIONS[i])
            turned = ODD_CAPTIONS[i][first:] + ODD_CAPTIONS[i][:first]
            seen = next(text for text in turned if UNSEEN not in text)
            replaced += UNSEEN in turned[0]
            own = batch.tokens.view(4, 3)[row].tolist()
            assert own == bert.encode([seen], 8)[0].tolist()
            assert int(batch.text_id[row]) == text_hash(seen)
        if step == 4:
            state = loader.state_dict()
        if step > 4:
            rest.append(batch)
    assert replaced > 3
    resumed = load()
    resumed.load_state_dict(state)
    for batch, (same, _) in zip(rest, resumed, strict=False):
        assert torch.equal(batch.tokens, same.tokens)
        assert torch.equal(batch.text_id, same.text_id)


def test_a_stored_caption_without_tokens_gives_its_turn_to_the_next(write, waves_tokenizer):
    """In a pass in order, which takes each image's first caption."""
    described = {"fingerprint": waves_tokenizer.fingerprint, "max_length": LENGTH}
    empty = np.array([2, waves_tokenizer.cls_id, waves_tokenizer.sep_id], "<i4").tobytes()
    several = [i for i in range(20) if len(make_captions(i)) > 1]
    dataset = write(
        lambda i: empty * (i in several) + component(waves_tokenizer, make_captions(i)[1 if i in several else 0 :]),
        described,
    )
    loader = Loader(dataset, waves_tokenizer, batch_size=20, image_size=32, text_length=LENGTH, seed=2, train=False)
    ((batch, _),) = list(loader)
    wanted = [make_captions(i)[1 if i in several else 0] for i in range(20)]
    assert batch.tokens.tolist() == waves_tokenizer.encode(wanted, LENGTH)[0].tolist()
    assert batch.text_id.tolist() == [text_hash(caption) for caption in wanted]
