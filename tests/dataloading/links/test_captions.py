"""`links.captions`: which captions the fields of `--caption` find, and with what probability each is drawn."""

import json

import pytest

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links.captions import parse_captions_option, read_spec

PARTS = {
    "txt": b"A long text.\n\nIts second paragraph.\n",
    "json": json.dumps({"caption": "one", "recaption": ["two", "three"], "deep": {"er": "four"}, "n": 3}).encode(),
    "cls": b"7",
}


@pytest.mark.parametrize(
    "option, lines, wanted",
    [
        ("txt", False, {"A long text. Its second paragraph.": 1}),
        ("txt", True, {"A long text.": 1 / 2, "Its second paragraph.": 1 / 2}),
        ("json:caption", False, {"one": 1}),
        ("json:recaption", False, {"two": 1 / 2, "three": 1 / 2}),
        ("json:deep.er,cls,json:n", False, {"four": 1 / 3, "7": 1 / 3, "3": 1 / 3}),
        ("json:caption=3,json:recaption=1", False, {"one": 3 / 4, "two": 1 / 8, "three": 1 / 8}),
        ("json:caption=3,missing=5,json:absent=9", False, {"one": 1}),  # weights of what a sample lacks go to the rest
        ("json:caption=0.5,json:caption=0.5", False, {"one": 1}),
        ("missing", False, {}),
    ],
)
def test_the_probability_of_each_caption(option: str, lines: bool, wanted: dict[str, float]) -> None:
    spec = parse_captions_option(option, lines)
    for one in (spec, read_spec(json.loads(json.dumps(spec.to_json())), "dataset.json")):
        captions, weights = one.captions(PARTS)
        assert dict(zip(captions, weights, strict=True)) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe", b"", b" \n ", b"\xe2\x80\x8b", b"{", b"[" * 99999, b'{"caption": NaN}', b'{"caption": null}'],
)
def test_what_holds_no_caption(content: bytes) -> None:
    assert parse_captions_option("json:caption").captions({"json": content}) == ([], [])
    if b"c" not in content and b"[" not in content and b"{" not in content:
        assert parse_captions_option("txt").captions({"txt": content}) == ([], [])


def test_columns_of_a_table() -> None:
    spec = parse_captions_option("caption,all,info:text")
    values = {"caption": "one", "all": ["two", None, "three"], "info": {"text": "four"}}
    assert spec.captions(values)[0] == ["one", "two", "three", "four"]
    assert spec.captions({"caption": None, "all": [], "info": None}) == ([], [])


@pytest.mark.parametrize("option", ["", "txt=0", "txt=x", "a b", "json", "txt,,cls", "a,b,c,d,e", "txt=-1", "txt=1e9"])
def test_options_that_are_refused(option: str) -> None:
    with pytest.raises(DataError, match="caption"):
        parse_captions_option(option)


@pytest.mark.parametrize("value", [None, [], {}, {"fields": []}, {"fields": [["txt"]]}, {"fields": [["t", [], 0]]}])
def test_a_description_that_is_refused(value: object) -> None:
    with pytest.raises(DataError, match=r"dataset\.json"):
        read_spec(value, "dataset.json")
