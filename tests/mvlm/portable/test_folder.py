"""Files beside exported programs: another runtime makes the same ids and masks from them."""

import pytest
import tokenizers

from mvlm.errors import RunError
from mvlm.portable import programs as module
from mvlm.portable.programs import write_tokenizer
from mvlm.runs.load import load_model

TEXTS = ["a red square", "a", "a blue square on a white ground, and then some more words", "[MASK] naïve"]


def test_tokenizer_json_gives_the_models_ids_and_masks(tokenizer, tmp_path):
    write_tokenizer(tokenizer, 12, tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.encode_special_tokens = True  # as ours does; the file cannot say so
    found = inner.encode_batch(TEXTS)
    assert {len(encoding.ids) for encoding in found} == {12}  # padded to the longest, which is truncated
    for text, encoding in zip(TEXTS, found, strict=True):
        ids = tokenizer.encode([text], 12)[0].tolist()
        assert encoding.ids == ids + [tokenizer.pad_id] * (12 - len(ids))
        assert encoding.attention_mask == [1] * len(ids) + [0] * (12 - len(ids))
    assert len(inner.encode_batch(["a"])[0].ids) == 3  # no longer than the longest text


def test_nothing_is_left_after_an_error(small, tmp_path, monkeypatch):
    def fail(*_):
        (tmp_path / "seen").write_text(str([path.name for path in tmp_path.iterdir()]))
        raise RunError("broken")

    monkeypatch.setattr(module, "write_programs", fail)
    with pytest.raises(RunError, match="broken"):
        load_model(small, "cpu").export(tmp_path / "out", "pt2")
    assert ".partial" in (tmp_path / "seen").read_text()  # it had begun to write
    assert [path.name for path in tmp_path.iterdir()] == ["seen"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(RunError, match="full: wanted a new or empty folder, found other files; choose another one"):
        load_model(small, "cpu").export(tmp_path / "full", "pt2")
