"""Captions: cleaning, and the script they are written in."""

import pytest

from mvlm_dataloading.captions import clean_captions, script_of

INVISIBLE = ["\u200b", "\u0301", "\u00ad", "\ufe0f \u200d", "\ue000", "\ufffd\ufffd \ufffd"]


def test_script_of_a_caption():
    wanted = {
        "a word": "LATIN",
        "слово b": "CYRILLIC",
        "كلمة": "ARABIC",
        "猫猫猫猫 cat": "CJK",
        "12 !": "NONE",
        "ひらがな": "HIRAGANA",
    }
    assert {text: script_of(text) for text in wanted} == wanted


@pytest.mark.parametrize("caption", INVISIBLE)
def test_captions_in_which_nothing_can_be_seen_are_dropped(caption):
    assert clean_captions([caption, "a cat", "?", "e\u0301t\u00e9", "\u2764\ufe0f"], 100) == [
        "a cat",
        "?",
        "e\u0301t\u00e9",
        "\u2764\ufe0f",
    ]
    assert clean_captions([caption], 100) == "no caption"


def test_a_character_newer_than_this_python_is_visible():
    """A build must not depend on the version of Python: U+1FAE8, a shaking face, is of Unicode 15, U+1FADF of 16."""
    assert clean_captions(["\U0001fae8", "\U0001fadf"], 100) == ["\U0001fae8", "\U0001fadf"]
