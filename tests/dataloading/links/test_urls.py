"""`links.urls`: what braces, wildcards and lists stand for."""

from pathlib import Path

import pytest

from mvlm_dataloading.errors import DataError
from mvlm_dataloading.links.urls import expand
from support.seaweed import Seaweed, reading_from


def test_braces_lists_and_wildcards(tmp_path: Path) -> None:
    assert expand(["s3://bucket/a/{008..011}.tar"]) == [f"s3://bucket/a/{n:03d}.tar" for n in range(8, 12)]
    assert expand(["s3://bucket/{x,y}-{0..1}.tar"]) == [f"s3://bucket/{a}-{n}.tar" for a in "xy" for n in (0, 1)]
    for name in ("b.tar", "a.tar", "c.parquet"):
        (tmp_path / name).touch()
    assert expand([str(tmp_path / "*.tar")]) == [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")]
    (tmp_path / "list.txt").write_text(f"# some\n\n{tmp_path}/a.tar\nhttps://host/{{1..2}}.tar\n")
    wanted = [str(tmp_path / "a.tar"), "https://host/1.tar", "https://host/2.tar"]
    assert expand([str(tmp_path / "list.txt")]) == wanted


def test_a_wildcard_in_a_bucket(seaweed: Seaweed) -> None:
    for name in ("b.tar", "a.tar", "a.json"):
        seaweed.put(f"wild/{name}", b"x")
    with reading_from(seaweed.s3):
        assert expand(["s3://tests/wild/*.tar"]) == ["s3://tests/wild/a.tar", "s3://tests/wild/b.tar"]
        with pytest.raises(DataError, match="match"):
            expand(["s3://tests/wild/*.none"])


@pytest.mark.parametrize(
    "given, word",
    [
        (["a.tar", "a.tar"], "twice"), (["https://u:secret@host/*.tar"], "web server"), (["no/*.tar"], "none"),
        (["s3://bucket/*/a.tar"], "last part"), (["s3://bucket/{0..1000000}.tar"], "at most"),
        (["no.txt"], "file"), ([], "none"),
    ],
)  # fmt: skip
def test_what_is_refused(given: list[str], word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        expand(given)
    assert "secret" not in str(caught.value)


def test_credentials_are_no_part_of_it() -> None:
    assert expand(["https://someone:secret@host/a.tar?signature=secret"]) == ["https://host/a.tar"]
