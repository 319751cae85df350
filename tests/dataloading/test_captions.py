"""Captions: cleaning, and the script they are written in."""

import pytest

from mvlm_dataloading.captions import clean_captions, script_of


@pytest.mark.parametrize("text, script", [
    ("a word", "LATIN"), ("слово b", "CYRILLIC"), ("كلمة", "ARABIC"), ("猫猫猫猫 cat", "CJK"), ("12 !", "NONE"),
    ("ひらがな", "HIRAGANA"),
])  # fmt: skip
def test_script_of_a_caption(text, script):
    assert script_of(text) == script


INVISIBLE = ["\u200b", "\u0301", "\u00ad", "\ufe0f \u200d", "\ue000", "\ufffd\ufffd \ufffd"]


@pytest.mark.parametrize("caption", INVISIBLE)
def test_captions_in_which_nothing_can_be_seen_are_dropped(caption):
    """A build must not depend on the version of Python: U+1FAE8, a shaking face, is of Unicode 15, U+1FADF of 16."""
    seen = ["a cat", "?", "e\u0301t\u00e9", "\u2764\ufe0f", "\U0001fae8", "\U0001fadf"]
    assert clean_captions([caption, *seen], 100) == seen
    assert clean_captions([caption], 100) == "no caption"
