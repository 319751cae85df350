"""Files that may come from others: links, sizes, JSON, Parquet, and texts for the terminal."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mvlm_dataloading import DataError
from mvlm_dataloading.untrusted import (
    LIMITS,
    check_links,
    followed_links,
    open_parquet,
    open_regular,
    parse_json,
    printable,
    read_regular,
    regular_lines,
    resolve_inside,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with a file, beside a secret one."""
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in/deep").mkdir(parents=True)
    (tmp_path / "in/file").write_text("mine")
    return tmp_path / "in"


@pytest.mark.parametrize("target", ["../secret", "{root}/secret", "..", "deep/../../secret", "/dev/zero", "../none"])
def test_a_link_that_leaves_its_folder_is_refused_unless_asked_for(folder, monkeypatch, target):
    link = folder / "deep/../link"
    (folder / "link").symlink_to(target.format(root=folder.parent))
    for read in (lambda: resolve_inside(link, folder), lambda: check_links(folder)):
        with pytest.raises(DataError, match=r"link: wanted a file in .*; give --follow-links"):
            read()
    before = followed_links()
    monkeypatch.setenv("MVLM_FOLLOW_LINKS", "1")
    check_links(folder)
    assert resolve_inside(link, folder) == Path(os.path.realpath(folder / "link"))
    assert followed_links() == before + 1


def test_links_that_stay_are_followed_and_so_is_one_to_the_folder_itself(folder):
    (folder / "deep/same").symlink_to("../file")
    (folder / "deep/up").symlink_to("..")  # a circle
    (folder.parent / "latest").symlink_to("in")
    for root in (folder, folder.parent / "latest"):
        check_links(root)
        with open_regular(root / "deep/up/deep/same", within=root) as file:
            assert file.read() == b"mine"


def test_files_are_bounded_before_they_are_read(folder):
    assert read_regular(folder / "file", 4) == b"mine"
    with pytest.raises(DataError, match="file: wanted at most 3 bytes, found 4"):
        read_regular(folder / "file", 3)
    with (folder / "hole").open("wb") as hole:
        hole.truncate(max(LIMITS.values()) + 1)
    for kind in LIMITS:
        with pytest.raises(DataError, match="hole: wanted at most"):
            read_regular(folder / "hole", kind)
    (folder / "lines").write_bytes(b"a\r\nb\n" + b"c" * (17 << 20))
    lines = regular_lines(folder / "lines", "metrics")
    assert [next(lines), next(lines)] == [b"a", b"b"]
    with pytest.raises(DataError, match="longer"):
        next(lines)


def test_json_has_finite_numbers_and_reasons_of_a_few_words():
    value = {"a": [1, 2.5, None, "é"], "b": 10**300}
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json('["\\ud83d\\ude00"]') == ["\N{GRINNING FACE}"]
    for text in (
        "NaN",
        '{"a": -Infinity}',
        "[1e999]",
        r'["\ud800"]',
        rb'{"\uDFFF": 1}',
        "[" * 100_000,
        b"\xff",
        "",
        "{",
        "1" * 5000,
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (of any text)
            parse_json(text)
        assert len(str(caught.value)) < 120


def test_parquet_files_have_footers_that_fit(folder):
    table = pa.table({"x": [1, 2]})
    pq.write_table(table, folder / "good")
    assert open_parquet(folder / "good").read().equals(table)
    content = (folder / "good").read_bytes()
    for length in (0, len(content), 2**31 - 1, 2**32 - 1):
        (folder / "bad").write_bytes(content[:-8] + length.to_bytes(4, "little") + b"PAR1")
        with pytest.raises(DataError, match="bad: wanted"):
            open_parquet(folder / "bad")
    for part in (b"", content[:3], content[:-1], b"x" * 100):
        (folder / "bad").write_bytes(part)
        with pytest.raises(DataError, match="bad: wanted a Parquet file"):
            open_parquet(folder / "bad")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a cat, größer 猫 👩‍👩‍👧 x\u00a0y", None),
        ("\x1b[2J\x1b]0;x\x07", r"\x1b[2J\x1b]0;x\x07"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\u202eevil\u2066\x9b\udcff", r"\u202eevil\u2066\x9b\udcff"),
    ],
)
def test_texts_for_the_terminal_have_no_controls(text, shown):
    assert printable(text) == (text if shown is None else shown)
