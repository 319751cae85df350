import pytest

from mvlm_dataloading.sources.emoji import captions_of, merge_bases, named_emoji


@pytest.mark.parametrize(
    "codepoints, name, aliases, captions",
    [
        ("1F951", ":avocado:", [], ["avocado"]),
        ("1F000", ":woman_cartwheeling_medium-dark_skin_tone:", [], ["woman cartwheeling, medium-dark skin tone"]),
        ("1F000", ":man_dark_skin_tone_bald:", [], ["man bald, dark skin tone"]),
        (
            "1F000",
            ":handshake_light_skin_tone_medium-dark_skin_tone:",
            [],
            ["handshake, light skin tone and medium-dark skin tone"],
        ),
        (
            "1F000",
            ":couple_with_heart_woman_man_dark_skin_tone:",
            [],
            ["couple with heart, woman and man, dark skin tone"],
        ),
        ("1F000", ":family_man_woman_girl_boy:", [], ["family, man, woman, girl and boy"]),
        ("1F000", ":kiss_mark:", [":kiss:"], ["kiss mark", "kiss"]),
        ("1F1E9-1F1EA", ":Germany:", [":de:", ":germany:"], ["flag of Germany", "de", "germany"]),
        ("1F3F4-E0067-E0062-E0077-E006C-E0073-E007F", ":Wales:", [":wales:"], ["flag of Wales", "wales"]),
        ("1F44D", ":thumbs_up:", [":+1:", ":thumbsup:", ":thumbs_up:"], ["thumbs up", "thumbsup"]),
        ("1F234", ":Japanese_button:", [":u5408:", ":ideograph_go:"], ["Japanese button", "ideograph go"]),
        ("1F3FB", ":light_skin_tone:", [], ["light skin tone"]),
    ],
)
def test_emoji_captions_are_readable(codepoints, name, aliases, captions):
    assert captions_of(codepoints, name, aliases) == captions


def test_emoji_bases_that_share_an_image_are_merged():
    bases = ["person", "man", "man", "woman", "elf", "man", "boy"]
    images = [b"1", b"1", b"2", b"3", b"4", b"4", b"5"]
    assert merge_bases(bases, images) == ["elf", "elf", "elf", "woman", "elf", "elf", "boy"]


def test_emoji_that_differ_in_skin_tone_alone_have_one_base():
    """Checked over all emoji: equal code points, without tones and variation selectors, have an equal base."""
    dropped = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF", "FE0F"}
    bases: dict[str, set[str]] = {}
    count = 0
    for codepoints, _, captions, metadata in named_emoji():
        count += 1
        bare = "-".join(point for point in codepoints.split("-") if point not in dropped)
        bases.setdefault(bare, set()).add(metadata["base"])
        assert len(captions) == len(set(captions))
        assert "skin tone" not in metadata["base"] or metadata["base"] == "skin tone"
    assert count > 3900
    assert [bare for bare, names in bases.items() if len(names) > 1] == []
    assert 1800 < len(bases) < 2000
