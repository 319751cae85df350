import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from mvlm_dataloading import DataError, Tokenizer, load_tokenizer, open_dataset, tokenizer_for, train_tokenizer
from mvlm_dataloading import tokenizer as tokenizer_module
from support.data import make_captions, write_dataset

CAPTIONS = ["a cat on a mat", "two cats, one café — 猫", "the mat"] * 3
TRAINED = train_tokenizer(CAPTIONS, 300)
ROBERTA = ["<unk>", "<s>", "<pad>", "</s>", "<mask>"]


def stored(path: Path, model: Any, pre_tokenizer: Any, specials: list[str] = ROBERTA) -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizer
    inner.add_special_tokens(specials)
    inner.save(str(path / "t.json"))
    return load_tokenizer(path / "t.json")


def of_words(path: Path, specials: list[str] = ROBERTA) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*specials, "cat", "mat"])}
    return stored(path, models.WordLevel(vocabulary, unk_token=specials[0]), pre_tokenizers.Whitespace(), specials)


def test_special_tokens_come_first_and_equal_captions_agree(tmp_path):
    ids = (TRAINED.pad_id, TRAINED.cls_id, TRAINED.sep_id, TRAINED.mask_id)
    assert ids == (0, 2, 3, 4)
    assert [TRAINED.token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert 261 < TRAINED.vocab_size <= 300
    code = f"from mvlm_dataloading import train_tokenizer; print(train_tokenizer({CAPTIONS!r}, 300).fingerprint)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    TRAINED.save(tmp_path / "tokenizer.json")
    assert TRAINED.fingerprint == there == load_tokenizer(tmp_path / "tokenizer.json").fingerprint
    assert TRAINED.fingerprint != train_tokenizer(CAPTIONS[:2], 290).fingerprint


TEXTS = [*CAPTIONS, "Ω never ☃ 漢字", "x", "[MASK] and [SEP]"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(TEXTS), min_size=1), st.integers(3, 40))
def test_texts_are_packed_cut_and_decoded(texts, max_length):
    """Each alone, between [CLS] and [SEP], without a special token in it, as far as it fits."""
    tokens, lengths = TRAINED.encode(texts, max_length)
    assert tokens.dtype == lengths.dtype == np.int64
    assert len(tokens) == lengths.sum()
    for text, part in zip(texts, np.split(tokens, np.cumsum(lengths)[:-1]), strict=True):
        whole = TRAINED.encode([text], 1000)[0]
        assert TRAINED.decode(whole) == text
        assert not np.isin(whole[1:-1], range(5)).any()
        assert part.tolist() == [*whole[:-1][: max_length - 1].tolist(), TRAINED.sep_id]
        assert part[0] == TRAINED.cls_id


def undeclared(folder: Path, kind: str) -> Path:
    """Tokenizer whose special tokens are words of its vocabulary, which no list of added tokens names."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "unigram":
        inner = tokenizers.Tokenizer(models.Unigram())
        inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.UnigramTrainer(
            vocab_size=60, special_tokens=names, unk_token="<unk>", show_progress=False
        )
        inner.train_from_iterator(CAPTIONS, trainer)
    else:
        known = [*names, *sorted({w for c in CAPTIONS for w in c.split()})]
        known = [*names[:3], names[4], "cat"] if kind == "none unknown" else known
        unknown = {} if kind == "none unknown" else {"unk_token": "<unk>"}
        inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, **unknown))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(inner.to_str()) | {"added_tokens": []}))
    return path


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_special_tokens_that_the_file_does_not_declare_are_not_text(tmp_path, kind):
    tokenizer = load_tokenizer(undeclared(tmp_path, kind))
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id]
    for text in ["<s> cat", "cat </s> cat", "<pad>", "cat <mask>", CAPTIONS[0]]:
        tokens, lengths = tokenizer.encode([text], 50)
        assert np.isin(tokens[1:-1], special).sum() == 0, text
        assert tokens[[0, -1]].tolist() == special[:2]
        assert sum(stop - start for _, start, stop in tokenizer.words(text)) <= lengths[0] - 2
    masked = tokenizer.encode_masked([f"{CAPTIONS[0]} </s> ", ""])
    assert masked.count(tokenizer.mask_id) == 1
    assert np.isin(masked, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]).sum() == 0
    tokens, _ = tokenizer.encode([CAPTIONS[0]], 50)
    assert tokenizer.decode([*tokens, tokenizer.pad_id, tokenizer.mask_id]) == CAPTIONS[0]


def test_a_tokenizer_without_an_unknown_token_reads_what_it_can(tmp_path):
    """Runs that were trained with it go on. A word for which it has no token is an error of one line."""
    tokenizer = load_tokenizer(undeclared(tmp_path, "none unknown"))
    assert tokenizer.encode(["cat"], 5)[1].tolist() == [3]
    with pytest.raises(DataError, match=r"tokenizer\.json: wanted a tokenizer that reads every text"):
        tokenizer.encode(["mat"], 5)


@pytest.mark.parametrize("specials", [ROBERTA, ["[UNK]", "[MASK]", "[PAD]", "[SEP]", "[CLS]"]])
def test_special_tokens_are_found_by_name(tmp_path, specials):
    of_words(tmp_path, specials)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    inner.enable_truncation(2)  # of the file; the caller's length counts
    inner.enable_padding()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    found = [tokenizer.token(i) for i in (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id)]
    assert {*found} == {*specials[1:]}
    tokens, lengths = tokenizer.encode(["cat mat cat", "mat"], 10)
    assert lengths.tolist() == [5, 3]
    assert tokens.tolist()[1:4] == [5, 6, 5]


def test_ids_with_gaps_are_below_the_vocabularys_size(tmp_path):
    words = {token: i for i, token in enumerate([*ROBERTA, "cat"])} | {"mat": 99}
    tokenizer = stored(tmp_path, models.WordLevel(words, unk_token="<unk>"), pre_tokenizers.Whitespace(), [])
    assert tokenizer.vocab_size == 100
    assert tokenizer.encode(["cat mat"], 10)[0].tolist() == [1, 5, 99, 3]


def one_token_twice(path: Path) -> None:
    of_words(path)
    content = json.loads((path / "t.json").read_text()) | {"added_tokens": []}
    content["model"]["vocab"]["</s>"] = content["model"]["vocab"]["<mask>"]
    (path / "t.json").write_text(json.dumps(content))
    load_tokenizer(path / "t.json")


@pytest.mark.parametrize(
    "refused, message",
    [
        (lambda at: train_tokenizer(CAPTIONS, 200), "at least 261 .* got 200"),
        (lambda at: TRAINED.encode(["a"], 2), "at least 3 .* got 2"),
        (lambda at: of_words(at, ROBERTA[:-1]), r"t\.json: wanted a mask token named \[MASK\] or <mask>"),
        (one_token_twice, r"t\.json: wanted four special tokens"),
        (lambda at: load_tokenizer(at / "none.json"), "none.json: wanted a tokenizer.json, found no such file"),
        (lambda at: load_tokenizer(Path(__file__)), "wanted a tokenizer.json, found a file that is not one"),
        (lambda at: of_words(at).word_starts(), "wanted one that marks the starts of words"),
    ],
)
def test_what_no_tokenizer_can_be_is_refused(tmp_path, refused, message):
    with pytest.raises(ValueError, match=message):
        refused(tmp_path)


PANICS = "a" * 28 + "!"
"""A text on which the rule (a+)+$ needs more steps than the package allows."""


def panicking(folder: Path) -> Path:
    """A tokenizer whose rule for texts makes the package panic on some of them."""
    path = folder / "panicking.json"
    TRAINED.save(path)
    rule = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": rule}))
    return path


@pytest.mark.parametrize(
    "ask",
    [
        lambda tokenizer: tokenizer.encode([CAPTIONS[0], PANICS], 9),
        lambda tokenizer: tokenizer.encode_masked(["", PANICS]),
        lambda tokenizer: tokenizer.words(PANICS),
    ],
)
def test_a_panic_is_an_error_in_threads_too(tmp_path, ask):
    """A panic is no Exception in Python, so it would end a thread past its handlers."""
    tokenizer = load_tokenizer(panicking(tmp_path))
    with ThreadPoolExecutor(1) as pool:
        error = pool.submit(ask, tokenizer).exception()
    assert isinstance(error, DataError)
    assert "\n" not in str(error)
    assert str(error).startswith(f"{tmp_path}/panicking.json: wanted a tokenizer that reads every text")
    assert tokenizer.encode([CAPTIONS[0]], 9)[1].tolist()[0] > 2


def give_tokenizer(folder: Path) -> Tokenizer:
    """Put a tokenizer into a data folder."""
    own = train_tokenizer(CAPTIONS, 280)
    own.save(folder / "tokenizer.json")
    description = json.loads((folder / "dataset.json").read_text())
    description["tokenizer"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(description))
    return own


@pytest.mark.parametrize("splits", [("train", "test"), ("test", "validation")])
def test_a_data_sets_tokenizer_is_its_own_or_of_its_training_captions(tmp_path, splits):
    folder = write_dataset(tmp_path / "data", 4, splits=splits)
    if "train" in splits:
        captions = [caption for i in range(4) for caption in make_captions(i)]
        trained = tokenizer_for(open_dataset(folder, "test"), 300)
        assert trained.fingerprint == train_tokenizer(captions, 300).fingerprint
    else:
        with pytest.raises(DataError, match=r"data: wanted a tokenizer\.json, or a train split"):
            tokenizer_for(open_dataset(folder, "test"), 300)
    own = give_tokenizer(folder)
    dataset = open_dataset(folder, "test")
    assert tokenizer_for(dataset, 300).fingerprint == own.fingerprint
    TRAINED.save(folder / "tokenizer.json")
    for _ in range(2):
        with pytest.raises(DataError, match=r"tokenizer\.json: wanted the tokenizer.* that dataset\.json names"):
            tokenizer_for(dataset, 300)
        (folder / "tokenizer.json").unlink(missing_ok=True)


def test_a_tokenizer_is_trained_on_some_runs_of_a_large_split(tmp_path, monkeypatch):
    """With a sample of 6 in 2 runs: of 13 samples, three from the first on and three from number 6 on."""
    monkeypatch.setattr(tokenizer_module, "SAMPLE", 6)
    monkeypatch.setattr(tokenizer_module, "RUNS", 2)
    for count, ids in ((6, range(6)), (13, (0, 1, 2, 6, 7, 8))):
        dataset = open_dataset(write_dataset(tmp_path / str(count), count), "train")
        wanted = train_tokenizer((caption for i in ids for caption in make_captions(i)), 300)
        assert tokenizer_for(dataset, 300).fingerprint == wanted.fingerprint


@pytest.mark.parametrize("text", ["a cat", "  grinning  cat-face, éx 😀 x ", "one", " waves,in\tall\n seen", ""])
def test_words_of_a_text_have_their_tokens(waves_tokenizer, text):
    """Each word's tokens spell it, in order; blanks around the text belong to no other word."""
    tokens = waves_tokenizer.encode([text], 1000)[0][1:-1].tolist()
    words = waves_tokenizer.words(text)
    assert [word for word, _, _ in words] == text.split()
    assert [waves_tokenizer.decode(tokens[start:stop]) for _, start, stop in words] == text.split()
    for (_, _, stop), (_, start, _) in pairwise(words):
        assert stop == start


@pytest.mark.parametrize(
    "captions, text, wanted",
    [
        *((["a cat on a mat, ## ##b"], text, text.split())
          for text in ("a cat on a mat", "one café, two cats", "x", "## unseen ##b")),
        # Of the other letters it has the bytes.
        (["a cat on a mat"], "猫が窓の外 a cat", [*"猫が窓の外", "a", "cat"]),
    ],
)  # fmt: skip
def test_starts_of_words_in_byte_level_bpe(captions, text, wanted):
    tokenizer = train_tokenizer(captions * 3, 300 if len(text) < 20 else 270)
    assert tokenizer.word_starts().shape == (tokenizer.vocab_size,)
    tokens = tokenizer.encode([text], 1000)[0][1:-1]
    starts = tokenizer.word_starts()[tokens]
    starts[0] = True
    found = [tokenizer.decode(word) for word in np.split(tokens, np.flatnonzero(starts)[1:])]
    assert [word for word in found if word] == wanted


@pytest.mark.parametrize("model", ["word pieces", "sentence pieces"])
def test_starts_of_words_and_of_letters_of_scripts_without_blanks(tmp_path, model):
    if model == "word pieces":
        wanted = {
            "[UNK]": True, "cat": True, "mat": True, "on": True, "##s": False, "##i": False, ",": True, "猫": True,
            "##が": True, "##る。": True, "##ー": False, "##น": True, "。": True,
        }  # fmt: skip
        pieces = models.WordPiece({piece: i for i, piece in enumerate(wanted)}, unk_token="[UNK]")
        split, text, groups = pre_tokenizers.BertPreTokenizer(), "cats on matsi,", [[1, 4], [3], [2, 4, 5], [6]]
    else:
        wanted = {
            "<unk>": False, "\u2581cat": True, "\u2581mat": True, "s": False, "i": False, "\u2581猫": True, "が": True,
            "る。": True, "ー": False, "น": True, "。": False, "<0xE7>": True, "<0x8C>": False,
        }  # fmt: skip
        pieces = models.Unigram([(piece, -1.0 - i) for i, piece in enumerate(wanted)], 0)
        split, text, groups = pre_tokenizers.Metaspace(), "cats mat", [[1, 3], [2]]
    tokenizer = stored(tmp_path, pieces, split, ["[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    starts = tokenizer.word_starts()
    assert dict(zip(wanted, starts.tolist(), strict=False)) == wanted
    tokens = tokenizer.encode([text], 100)[0][1:-1]
    assert [word.tolist() for word in np.split(tokens, np.flatnonzero(starts[tokens])[1:])] == groups


MASKED = ["a red heart", "flag of france.", "the cat, a dog", "cat", "two (cat) cat", "cat cat", "it is a cat! dog"]


@pytest.mark.parametrize("kind", ["with prefix", "without", "pieces"])
def test_a_masked_word_leaves_the_other_tokens_as_they_are(tmp_path, kind):
    """Each word that is one token is masked in turn; "cat cat" also twice."""
    if kind == "pieces":
        words = ["[UNK]", *sorted({word for text in MASKED for word in re.findall(r"\w+|[^\w ]", text)})]
        model = models.WordPiece({piece: i for i, piece in enumerate(words)}, unk_token="[UNK]")
        tokenizer = stored(tmp_path, model, pre_tokenizers.BertPreTokenizer(), ["[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    else:  # marks blanks; with the prefix, a text's first word has one too
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "with prefix")
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=ROBERTA, initial_alphabet=letters)
        inner.train_from_iterator(MASKED * 50, trainer)
        inner.save(str(tmp_path / "t.json"))
        tokenizer = load_tokenizer(tmp_path / "t.json")
    tried = 0
    for text in MASKED:
        tokens = tokenizer.encode([text], 40)[0][1:-1].tolist()
        assert tokenizer.encode_masked([text]) == tokens
        for word in re.finditer(r"\w+", text):
            pieces = [text[: word.start()], text[word.end() :]]
            before = len(tokenizer.encode([pieces[0].strip()], 40)[0]) - 2 if pieces[0].strip() else 0
            if len(tokenizer.encode([text[: word.end()]], 40)[0]) - 2 == before + 1:
                wanted = [*tokens[:before], tokenizer.mask_id, *tokens[before + 1 :]]
                assert tokenizer.encode_masked(pieces) == wanted
                tried += 1
    assert tried >= 10
    if kind != "pieces":  # words are made of pieces: here of [MASK] and "cat", without a blank
        (mask, *rest) = tokenizer.encode_masked(["", "cat"])
        assert mask == tokenizer.mask_id
        assert "".join(map(tokenizer.token, rest)) == "cat"
    assert tokenizer.encode_masked(["", " ", ""]) == tokenizer.encode_masked(["", "", ""]) == 2 * [tokenizer.mask_id]
