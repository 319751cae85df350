"""Captions: cleaning, and the script they are written in."""

from mvlm_dataloading.captions import script_of


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
