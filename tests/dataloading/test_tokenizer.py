import hashlib
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers

from mvlm_dataloading import (
    DataError,
    Loader,
    build_shards,
    load_tokenizer,
    open_dataset,
    tokenizer_for,
    train_tokenizer,
)
from mvlm_dataloading.options import BuildOptions
from mvlm_dataloading.sources.folder import folder
from support.data import make_captions, make_image, write_dataset

CAPTIONS = ["a cat on a mat", "two cats, one café — 猫", "the mat"] * 3


def test_special_tokens_have_the_first_ids():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    ids = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert ids == (0, 2, 3, 4)
    assert [tokenizer.token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert 261 < tokenizer.vocab_size <= 300


def test_tokenizer_decodes_what_it_encodes():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    for text in (*CAPTIONS, "Ω never seen ☃ 漢字", "x"):
        tokens, lengths = tokenizer.encode([text], 200)
        assert tokenizer.decode(tokens) == text
        assert lengths.tolist() == [len(tokens)]


def test_captions_are_packed_between_cls_and_sep():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokens, lengths = tokenizer.encode(CAPTIONS[:3], 100)
    assert tokens.dtype == lengths.dtype == np.int64
    assert len(tokens) == lengths.sum()
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    for text, part in zip(CAPTIONS, parts, strict=False):
        assert part[0] == tokenizer.cls_id
        assert part[-1] == tokenizer.sep_id
        assert np.array_equal(part, tokenizer.encode([text], 100)[0])


def test_truncation_keeps_the_start_of_a_caption_and_sep():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    long, _ = tokenizer.encode(["a cat on a mat"], 100)
    cut, lengths = tokenizer.encode(["a cat on a mat", "a"], 5)
    assert lengths[0] == 5
    assert cut[:5].tolist() == [*long[:4].tolist(), tokenizer.sep_id]


def test_a_caption_that_spells_a_special_token_is_ordinary_text():
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokens, _ = tokenizer.encode(["a [MASK] and [SEP]"], 100)
    assert np.isin(tokens[1:-1], [0, 1, 2, 3, 4]).sum() == 0
    assert tokenizer.decode(tokens) == "a [MASK] and [SEP]"


def undeclared(folder: Path, kind: str) -> Path:
    """Tokenizer whose special tokens are words of its vocabulary, which no list of added tokens names."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    if kind == "unigram":
        inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
        inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
        inner.train_from_iterator(
            CAPTIONS,
            tokenizers.trainers.UnigramTrainer(
                vocab_size=60, special_tokens=names, unk_token="<unk>", show_progress=False
            ),
        )
    else:
        vocabulary = {word: i for i, word in enumerate([*names, *sorted({w for c in CAPTIONS for w in c.split()})])}
        if kind == "none unknown":
            vocabulary = {word: i for i, word in enumerate([*names[:3], names[4], "cat"])}
        inner = tokenizers.Tokenizer(
            tokenizers.models.WordLevel(vocabulary, **({} if kind == "none unknown" else {"unk_token": "<unk>"}))
        )
        inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    stored = json.loads(inner.to_str()) | {"added_tokens": []}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(stored))
    return path


@pytest.mark.parametrize("kind", ["unigram", "words"])
def test_special_tokens_that_the_file_does_not_declare_are_none_of_the_text(tmp_path, kind):
    tokenizer = load_tokenizer(undeclared(tmp_path, kind))
    special = [tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.pad_id]
    texts = ["<s> cat", "cat </s> cat", "<pad>", "cat <mask>", CAPTIONS[0]]
    for text in texts:
        tokens, lengths = tokenizer.encode([text], 50)
        assert np.isin(tokens[1:-1], special).sum() == 0, text
        assert tokens[[0, -1]].tolist() == special[:2]
        assert sum(stop - start for _, start, stop in tokenizer.words(text)) <= lengths[0] - 2
    masked = tokenizer.encode_masked([f"{CAPTIONS[0]} </s> ", ""])
    assert masked.count(tokenizer.mask_id) == 1
    assert np.isin(masked, [tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id]).sum() == 0
    tokens, _ = tokenizer.encode([CAPTIONS[0]], 50)
    assert tokenizer.decode([*tokens, tokenizer.pad_id, tokenizer.mask_id]) == CAPTIONS[0]


def test_a_tokenizer_that_reads_a_name_as_its_token_warns_if_it_has_no_unknown_token(tmp_path, caplog):
    """Runs that were trained with it go on."""
    tokenizer = load_tokenizer(undeclared(tmp_path, "none unknown"))
    assert "tokenizer.json: wanted an unknown token for names of special tokens" in caplog.text
    assert tokenizer.encode(["cat"], 5)[1].tolist() == [3]


def test_equal_captions_give_an_equal_tokenizer_in_another_process(tmp_path):
    here = train_tokenizer(CAPTIONS, 290)
    code = f"from mvlm_dataloading import train_tokenizer; print(train_tokenizer({CAPTIONS!r}, 290).fingerprint)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert here.fingerprint == there
    assert here.fingerprint != train_tokenizer(CAPTIONS[:2], 290).fingerprint


def test_tokenizer_save_and_load(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert np.array_equal(loaded.encode(CAPTIONS, 9)[0], tokenizer.encode(CAPTIONS, 9)[0])


def test_a_vocabulary_below_the_byte_alphabet_is_refused():
    with pytest.raises(ValueError, match=r"at least 261 .* got 200"):
        train_tokenizer(CAPTIONS, 200)
    with pytest.raises(ValueError, match=r"at least 3 .* got 2"):
        train_tokenizer(CAPTIONS, 300).encode(["a"], 2)


def save_word_level(path, specials) -> None:
    vocabulary = {token: i for i, token in enumerate([*specials, "cat", "mat"])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=specials[0]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(specials)
    inner.enable_truncation(2)
    inner.enable_padding()
    inner.save(str(path))


@pytest.mark.parametrize(
    "specials", [["<unk>", "<s>", "<pad>", "</s>", "<mask>"], ["[UNK]", "[MASK]", "[PAD]", "[SEP]", "[CLS]"]]
)
def test_special_tokens_are_found_by_name(tmp_path, specials):
    save_word_level(tmp_path / "t.json", specials)
    tokenizer = load_tokenizer(tmp_path / "t.json")
    found = [tokenizer.token(i) for i in (tokenizer.cls_id, tokenizer.pad_id, tokenizer.sep_id, tokenizer.mask_id)]
    assert {*found} == {*specials[1:]}
    # Truncation and padding of the file do not count: the caller's length does.
    tokens, lengths = tokenizer.encode(["cat mat cat", "mat"], 10)
    assert lengths.tolist() == [5, 3]
    assert tokens.tolist()[1:4] == [5, 6, 5]


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path):
    save_word_level(tmp_path / "t.json", ["<unk>", "<s>", "<pad>", "</s>"])
    with pytest.raises(DataError, match=r"t\.json: wanted a mask token named \[MASK\] or <mask>, found none"):
        load_tokenizer(tmp_path / "t.json")


def test_special_tokens_that_are_one_token_are_refused(tmp_path):
    save_word_level(tmp_path / "t.json", ["<unk>", "<s>", "<pad>", "</s>", "<mask>"])
    stored = json.loads((tmp_path / "t.json").read_text()) | {"added_tokens": []}
    stored["model"]["vocab"]["</s>"] = stored["model"]["vocab"]["<mask>"]
    (tmp_path / "t.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match=r"t\.json: wanted four special tokens, found two that are one token .*sep 4"):
        load_tokenizer(tmp_path / "t.json")


PANICS = "a" * 28 + "!"
"""A text on which the rule (a+)+$ needs more steps than the package allows."""


def panicking(folder: Path) -> Path:
    """A tokenizer whose rule for texts makes the package panic on some of them."""
    path = folder / "panicking.json"
    train_tokenizer(CAPTIONS, 300).save(path)
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


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, TypeError, MemoryError])
def test_other_errors_of_the_package_stay_what_they_are(monkeypatch, kind):
    def fail(*_, **__):
        raise kind

    tokenizer = train_tokenizer(CAPTIONS, 300)
    inner = SimpleNamespace(encode=fail, encode_batch=fail, decode=fail)
    monkeypatch.setattr(tokenizer, "_inner", inner)
    for ask in (lambda: tokenizer.encode(["a"], 9), lambda: tokenizer.words("a"), lambda: tokenizer.decode([7])):
        with pytest.raises(kind):
            ask()


def test_a_vocabulary_without_a_token_for_a_word_is_an_error_of_one_line(tmp_path):
    path = undeclared(tmp_path, "none unknown")
    with pytest.raises(DataError, match=r"tokenizer\.json: wanted a tokenizer that reads every text"):
        load_tokenizer(path).encode(["mat"], 5)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_build_with_a_tokenizer_that_panics_is_refused_by_name(tmp_path, workers):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(make_image(0))
    (tmp_path / "images/a.txt").write_text(PANICS)
    options = BuildOptions(tokenizer=panicking(tmp_path))
    with pytest.raises(DataError, match=r"panicking\.json: wanted a tokenizer that reads every text"):
        build_shards(folder(tmp_path / "images"), tmp_path / "out", options, workers=workers)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_loader_with_a_tokenizer_that_panics_is_refused_by_name(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(make_image(0))
    (tmp_path / "images/a.txt").write_text(PANICS)
    build_shards(folder(tmp_path / "images"), tmp_path / "out", workers=0)
    tokenizer = load_tokenizer(panicking(tmp_path))
    dataset = open_dataset(tmp_path / "out", "train")
    loader = Loader(dataset, tokenizer, batch_size=1, image_size=32, text_length=8, seed=0)
    with closing(loader), pytest.raises(DataError, match=r"panicking\.json: wanted a tokenizer that reads every text"):
        next(iter(loader))


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match="found no such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match="found a file that is not one"):
        load_tokenizer(tmp_path / "bad.json")


def test_a_data_set_without_train_split_needs_a_tokenizer(tmp_path):
    folder = write_dataset(tmp_path / "data", 4, splits=("test", "validation"))
    message = (
        r"data: wanted a tokenizer\.json, or a train split to train a tokenizer on, found neither "
        r"\(splits: test, validation\); give a tokenizer\.json"
    )
    with pytest.raises(DataError, match=message):
        tokenizer_for(open_dataset(folder, "test"), 300)
    own = train_tokenizer(CAPTIONS, 280)
    own.save(folder / "tokenizer.json")
    description = json.loads((folder / "dataset.json").read_text())
    description["tokenizer"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(description))
    assert tokenizer_for(open_dataset(folder, "test"), 300).fingerprint == own.fingerprint


def test_the_tokenizer_of_the_data_set_is_used(tmp_path):
    folder = write_dataset(tmp_path / "data", 4, splits=("train", "test"))
    trained = tokenizer_for(open_dataset(folder, "test"), 300)
    captions = [caption for i in range(4) for caption in make_captions(i)]
    assert trained.fingerprint == train_tokenizer(captions, 300).fingerprint

    own = train_tokenizer(CAPTIONS, 280)
    own.save(folder / "tokenizer.json")
    description = json.loads((folder / "dataset.json").read_text())
    description["tokenizer"] = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    (folder / "dataset.json").write_text(json.dumps(description))
    dataset = open_dataset(folder, "train")
    assert tokenizer_for(dataset, 300).fingerprint == own.fingerprint
    trained.save(folder / "tokenizer.json")
    with pytest.raises(DataError, match=r"wanted the tokenizer that dataset\.json names, found another"):
        tokenizer_for(dataset, 300)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"that dataset\.json names, found no such file; restore it"):
        tokenizer_for(dataset, 300)


@pytest.mark.parametrize("text", ["a cat", "  grinning  cat-face, éx 😀 x ", "one", " waves,in\tall\n seen", ""])
def test_words_of_a_text_have_their_tokens(tokenizer, text):
    """Each word's tokens spell it, in order; blanks around the text belong to no other word."""
    tokens = tokenizer.encode([text], 1000)[0][1:-1].tolist()
    words = tokenizer.words(text)
    assert [word for word, _, _ in words] == text.split()
    assert [tokenizer.decode(tokens[start:stop]) for _, start, stop in words] == text.split()
    for (_, _, stop), (_, start, _) in pairwise(words):
        assert stop == start


def save_pieces(path, model, pre_tokenizer) -> None:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizer
    inner.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[MASK]"])
    inner.save(str(path))


def grouped(tokenizer, text: str) -> list[str]:
    """The words of a text, as the vocabulary's marks tell them."""
    tokens = tokenizer.encode([text], 1000)[0][1:-1]
    starts = tokenizer.word_starts()[tokens]
    starts[0] = True
    return [tokenizer.decode(word) for word in np.split(tokens, np.flatnonzero(starts)[1:])]


def test_starts_of_words_in_byte_level_bpe():
    tokenizer = train_tokenizer(["a cat on a mat, ## ##b"] * 3, 300)
    assert tokenizer.word_starts().shape == (tokenizer.vocab_size,)
    for text in ("a cat on a mat", "one café, two cats", "x", "## unseen ##b"):
        assert grouped(tokenizer, text) == text.split()


def test_starts_of_words_in_word_pieces(tmp_path):
    pieces = ["[UNK]", "cat", "mat", "on", "##s", "##i", ","]
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.BertPreTokenizer())
    starts = load_tokenizer(tmp_path / "t.json").word_starts()
    assert starts.tolist() == [True, True, True, True, False, False, True, *4 * [True]]
    assert tokens_of(tmp_path / "t.json", "cats on matsi,") == [[1, 4], [3], [2, 4, 5], [6]]


def tokens_of(path, text: str) -> list[list[int]]:
    tokenizer = load_tokenizer(path)
    tokens = tokenizer.encode([text], 100)[0][1:-1]
    return [word.tolist() for word in np.split(tokens, np.flatnonzero(tokenizer.word_starts()[tokens])[1:])]


def test_starts_of_words_in_sentence_pieces(tmp_path):
    pieces = ["<unk>", "\u2581cat", "\u2581mat", "s", "i"]
    model = tokenizers.models.Unigram([(piece, -1.0 - i) for i, piece in enumerate(pieces)], 0)
    save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.Metaspace())
    assert tokens_of(tmp_path / "t.json", "cats mat") == [[1, 3], [2]]


def test_letters_of_scripts_without_blanks_start_units_in_byte_level_bpe(tmp_path):
    """Whole letters, and bytes that begin letters of these scripts alone. Marks beside a letter belong to it."""
    spell = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str

    def spelled(text: str) -> str:
        ((found, _),) = spell(text)
        return found

    starts = [" cat", " mat", "猫", "の外", "カー", "แม", "ລ", "ឆ", "မ", "𠀀"]
    others = ["s", "é", "。", "ー", "\u0e31", "\u1038", "न", "😀"]
    wanted = {spelled(text): text in starts for text in [*starts, *others]}
    wanted |= {spelled("猫")[:1]: True, spelled("猫")[:2]: True, spelled("猫")[1:]: False, spelled("。")[:2]: False}
    wanted |= {spelled("แ")[:2]: True, spelled("แ")[:1]: False, spelled("𠀀")[:2]: True, spelled("😀")[:2]: False}
    model = tokenizers.models.BPE({token: i for i, token in enumerate(wanted)}, [])
    save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.ByteLevel())
    found = load_tokenizer(tmp_path / "t.json").word_starts().tolist()
    assert dict(zip(wanted, found, strict=False)) == wanted


def test_units_of_a_caption_without_blanks_are_its_letters():
    tokenizer = train_tokenizer(["a cat on a mat"] * 3, 270)  # of the other letters it has the bytes
    assert grouped(tokenizer, "猫が窓の外 a cat")[-7:] == [*"猫が窓の外", "a", "cat"]


def test_letters_of_scripts_without_blanks_start_units_in_word_and_sentence_pieces(tmp_path):
    pieces = ["[UNK]", "cat", "猫", "##が", "##る。", "##ー", "##น", "##s", "。"]
    model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.BertPreTokenizer())
    starts = load_tokenizer(tmp_path / "t.json").word_starts()[: len(pieces)]
    assert starts.tolist() == [True, True, True, True, True, False, True, False, True]
    pieces = ["<unk>", "\u2581cat", "\u2581猫", "が", "る。", "ー", "น", "s", "。", "<0xE7>", "<0x8C>"]
    model = tokenizers.models.Unigram([(piece, -1.0 - i) for i, piece in enumerate(pieces)], 0)
    save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.Metaspace())
    starts = load_tokenizer(tmp_path / "t.json").word_starts()[: len(pieces)]
    assert starts.tolist() == [False, True, True, True, True, False, True, False, False, True, False]


def test_a_vocabulary_without_marks_has_no_starts_of_words(tmp_path):
    save_word_level(tmp_path / "t.json", ["<unk>", "<s>", "<pad>", "</s>", "<mask>"])
    with pytest.raises(DataError, match="wanted one that marks the starts of words"):
        load_tokenizer(tmp_path / "t.json").word_starts()


def save_byte_level(path, prefix: bool) -> None:
    """A byte-level BPE that marks blanks; with `prefix`, a text's first word has one too."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    specials = ["<unk>", "<s>", "<pad>", "</s>", "<mask>"]
    letters = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=letters)
    inner.train_from_iterator(MASKED * 50, trainer)
    inner.save(str(path))


MASKED = ["a red heart", "flag of france.", "the cat, a dog", "cat", "two (cat) cat", "cat cat", "it is a cat! dog"]


@pytest.mark.parametrize("kind", ["with prefix", "without", "pieces"])
def test_a_masked_word_leaves_the_other_tokens_as_they_are(tmp_path, kind):
    """Each word that is one token is masked in turn; "cat cat" also twice."""
    if kind == "pieces":
        words = ["[UNK]", *sorted({word for text in MASKED for word in re.findall(r"\w+|[^\w ]", text)})]
        model = tokenizers.models.WordPiece({piece: i for i, piece in enumerate(words)}, unk_token="[UNK]")
        save_pieces(tmp_path / "t.json", model, tokenizers.pre_tokenizers.BertPreTokenizer())
    else:
        save_byte_level(tmp_path / "t.json", kind == "with prefix")
    tokenizer, tried = load_tokenizer(tmp_path / "t.json"), 0
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
        pieces = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
        assert "".join(str(pieces.id_to_token(i)) for i in rest) == "cat"
    assert tokenizer.encode_masked(["", " ", ""]) == tokenizer.encode_masked(["", "", ""]) == 2 * [tokenizer.mask_id]


def test_ids_with_gaps_are_below_the_vocabularys_size(tmp_path):
    words = {token: i for i, token in enumerate(["<unk>", "<s>", "<pad>", "</s>", "<mask>", "cat"])} | {"mat": 99}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.vocab_size == 100
    assert tokenizer.encode(["cat mat"], 10)[0].tolist() == [1, 5, 99, 3]
