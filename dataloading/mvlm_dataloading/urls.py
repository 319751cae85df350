"""URLs of remote folders: one form for each, without the credentials, which stay in this process alone.

A user may give a URL with a user, a password or a signature in it. `normal_url` keeps those, and returns the URL
without them. So no message, log or file that is made of that URL can hold them; `RemoteFolder` alone asks for them, by
`with_credentials`. Texts of other packages, which may repeat a whole URL, go through `shown`.
"""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .errors import DataError

WEB = ("http", "https")
"""Schemes whose URLs have a host and may have a user, a password and a query."""
_URL = re.compile(r"(s3|gs|hf|https?):(/+)(.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"\b(s3|gs|hf|https?):/(?=[^/\s])")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9]+:/")
_HOST = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?")
_BUCKET = {"s3": 3, "gs": 3, "hf": 1}
"""Least number of characters of a bucket's name, the first part of the path, by scheme."""
_WORD = re.compile(r"(--[\w.-]+=)?(\S+)")
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,20}:/+)(?:[^\s/?#'\"<>]*@)?([^\s?'\"`<>]*)(?:\?[^\s'\"`<>]*)?")
_SHORTEST = 6
"""A shorter password or signature is not looked for by itself in texts: any text may hold it by chance."""
_LONGEST = 500
"""Most characters of a text of another package or server that a message shows."""
_READ = 10_000
"""Characters that are looked at of such a text."""

_kept: dict[str, tuple[str, str]] = {}
"""URL without credentials -> (user and password with the @ behind them, query with the ? before it)."""


def is_remote(place: Path | str) -> bool:
    """True if a folder is given by its URL. Also true of a `Path` made from a URL, which has lost a slash."""
    return _URL.fullmatch(str(place)) is not None


def normal_url(place: Path | str) -> str:
    """The URL of a remote folder, with both slashes and without one at its end, without user, password and query.

    This process keeps what was left out for `with_credentials`.

    Raises:
        DataError: it names no host or bucket, or has a password where no store reads one.
    """
    found = _URL.fullmatch(str(place))
    assert found is not None
    scheme, slashes, rest = found.groups()
    if len(slashes) > 2 or not rest.isprintable():
        raise _malformed(scheme)
    return _normal_web_url(scheme, rest) if scheme in WEB else _normal_store_url(scheme, rest)


def _normal_web_url(scheme: str, rest: str) -> str:
    try:
        parts = urlsplit(f"{scheme}://{rest}")
        user, sign, host = parts.netloc.rpartition("@")
        if not _HOST.fullmatch(host) or (parts.port or 1) < 1:
            raise ValueError
    except ValueError:  # of an invalid port or address
        raise _malformed(scheme) from None
    url = f"{scheme}://{host}{parts.path.rstrip('/')}"
    if user or parts.query:
        _kept[url] = (f"{user}{sign}", f"?{parts.query}" if parts.query else "")
    return url


def _normal_store_url(scheme: str, rest: str) -> str:
    bucket = rest.split("/")[0]
    if len(bucket) < _BUCKET[scheme]:
        raise _malformed(scheme)
    if "@" in bucket:
        raise DataError(
            f"{scheme}://...: wanted a URL without a password, found one; give it by the environment or by fsspec's "
            "configuration"
        )
    return f"{scheme}://{rest.rstrip('/')}"


def _malformed(scheme: str) -> DataError:
    form = "HOST/PATH" if scheme in WEB else "OWNER/NAME" if scheme == "hf" else "BUCKET/PATH"
    hint = "; write @, / and : of a password as %40, %2F and %3A" if scheme in WEB else ""
    return DataError(f"{scheme}://...: wanted {scheme}://{form}, found none or another form; correct the URL{hint}")


def intact(text: object) -> str:
    """Restore the slashes of URLs in a text: s3:/bucket, which a `Path` makes of s3://bucket, becomes s3://bucket."""
    return _ONE_SLASH.sub(r"\1://", str(text))


def require_local(place: Path) -> None:
    """Raise DataError if `place` is a URL, for files and folders that are read from a disk alone."""
    if _SCHEME.match(str(place)):
        raise DataError(
            f"{intact(place)}: wanted a folder on this machine, found a URL, which this command does not read; "
            f"copy the data here"
        )


def with_credentials(place: Path | str) -> str:
    """The URL as it was last given to `normal_url`, with user, password and query.

    Other words are returned unchanged.
    """
    before, after = _kept.get(str(place), ("", ""))
    return re.sub("(?<=://)", lambda _: before, str(place), count=1) + after


def without_credentials(word: str) -> str:
    """Remove user, password and query from the URL in a word of a command line, such as `--data=URL`.

    DataError for a URL without a host or bucket.
    """
    found = _WORD.fullmatch(word)
    if found is None or not (url := _URL.fullmatch(found[2])):
        return word
    secret = "@" in url[3].split("/")[0] or (url[1] in WEB and ("@" in url[3] or "?" in url[3]))
    return f"{found[1] or ''}{normal_url(found[2])}" if secret or len(url[2]) > 2 else word


def shown(text: object) -> str:
    """A text of another package or of a server, to be shown: one line that no terminal obeys, and not too long.

    URLs in it have neither user nor password nor query, and known passwords and signatures are left out.
    """
    line = " ".join("".join(sign if sign.isprintable() else " " for sign in hidden(str(text)[:_READ])).split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def hidden(text: str) -> str:
    """Remove users, passwords and queries from all URLs in a text, and known passwords and signatures from the rest."""
    text = _IN_TEXT.sub(r"\1\2", text)
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, "...")
    return text


def _secrets() -> set[str]:
    found = set()
    for user, query in _kept.values():
        values = [part.partition("=")[2] for part in query[1:].split("&")]
        found |= {user[:-1], user[:-1].partition(":")[2], query[1:], *values}
    return {form for one in found for form in (one, unquote(one)) if len(form) >= _SHORTEST}
