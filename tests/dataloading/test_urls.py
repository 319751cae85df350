"""Forms of URLs of remote folders, and texts without their credentials."""

import pytest

from mvlm_dataloading import DataError
from mvlm_dataloading.urls import hidden, is_remote, normal_url, shown, with_credentials, without_credentials


@pytest.mark.parametrize("place", ["s3://b/x", "s3:/b/x", "gs://b/x", "hf://datasets/o/n", "https://h/x", "http://h/x"])
def test_urls_are_recognised_as_remote(place):
    assert is_remote(place)
    assert not any(is_remote(local) for local in ("data", "/data/s3", "./s3:", "c:/data"))


@pytest.mark.parametrize(
    "given, wanted, full",
    [
        ("s3:/bucket/folder/", "s3://bucket/folder", "s3://bucket/folder"),
        ("hf://datasets/o/n@branch/x", "hf://datasets/o/n@branch/x", "hf://datasets/o/n@branch/x"),
        ("https://h/x/", "https://h/x", "https://h/x"),
        ("https://a:b@h/x", "https://h/x", "https://a:b@h/x"),
        ("http:/a:b@h:80/y/?t=1&u=2", "http://h:80/y", "http://a:b@h:80/y?t=1&u=2"),
        ("https://a:b@c@h/z", "https://h/z", "https://a:b@c@h/z"),
        ("https://[::1]:80/w?t", "https://[::1]:80/w", "https://[::1]:80/w?t"),
        ("https://h/at@x", "https://h/at@x", "https://h/at@x"),
    ],
)
def test_a_url_is_written_in_one_way_without_credentials_which_are_kept(given, wanted, full):
    url = normal_url(given)
    assert url == normal_url(url) == wanted
    assert with_credentials(url) == full


@pytest.mark.parametrize(
    "url",
    [
        "s3:///x", "gs:///x", "hf:///x", "https:///x", "s3://", "gs:/x", "https://", "https://?t=secret",
        "https://:80/x", "https://h:port/x", "https://a:secret/b@h/x", "https://a:secret?b@h/x", "https://h:99999/x",
        "https://secret@/x", "https://a:secret@h\n/x", "s3://key:secret@bucket/x", "https://h\\b/x", "https://[::1/x",
    ],
)  # fmt: skip
def test_a_malformed_url_is_refused_and_not_repeated(url):
    assert is_remote(url)
    with pytest.raises(DataError, match=r"^\w+://\.\.\.: wanted [^\n]*$") as caught:
        normal_url(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("at https://a:secret@h/x?t=secret#y, that", "at https://h/x that"),
        ("url='http://h/x?X-Amz-Signature=secret'", "url='http://h/x'"),
        ("<https:/a@h/x> and ftp://u:secret@h", "<https:/h/x> and ftp://h"),
        ("hf://datasets/o/n@branch, a@b.c: no URL?", "hf://datasets/o/n@branch, a@b.c: no URL?"),
        ("x" * 10_000, "x" * 10_000),
    ],
)
def test_texts_lose_the_credentials_of_urls(text, wanted):
    assert hidden(text) == wanted


def test_texts_lose_passwords_that_stand_alone():
    normal_url("https://someone:pass%2Fword@host/kept?token=some-signature&x=1")
    assert hidden("pass/word, pass%2Fword and some-signature, x=1") == "..., ... and ..., x=1"


def test_a_text_of_a_server_is_one_short_line_that_no_terminal_obeys():
    assert shown("\x1b[2J a\r\nb\x07 \u202e c") == "[2J a b c"
    assert len(shown("long " * 1000)) < 600


def test_words_of_a_command_line_lose_credentials_if_they_are_urls():
    for word in ("--text", "a cat? https://h/?x=1", "runs/x?y", "https://h/x/", "s3://b/x?y", "--data=https://h/x"):
        assert without_credentials(word) == word
    assert without_credentials("--data=https://a:b@h/x") == "--data=https://h/x"
    assert without_credentials("https://h/x?token=1") == "https://h/x"
    with pytest.raises(DataError):
        without_credentials("s3:///x")
