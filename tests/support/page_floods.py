"""Floods of requests to the page of `mvlm app`, during which others are served as if there were none."""

import contextlib
import json
import secrets
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from support.page_attacks import Target, png
from support.visitor import API, ASK, Visitor

PATIENCE = 5.0
"""Seconds that a visitor may have to wait because of others."""
HELD = 400
"""Connections that a flood keeps open at most."""
Flood = Callable[[Visitor], bytes]
"""Function of a greedy visitor: the bytes that this visitor sends on one connection."""


def posted(path: str, form: str, missing: bool, new_cookies: bool, body: Callable[[Visitor], bytes]) -> Flood:
    """Flood of POST requests. missing: their last byte is not sent, so that they never end.

    new_cookies: each request has a cookie of its own, as of another visitor. form: content type.
    """

    def content(greedy: Visitor) -> bytes:
        cookie = f"{greedy.cookie.partition('=')[0]}={secrets.token_urlsafe(24)}" if new_cookies else greedy.cookie
        sent = body(greedy)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {greedy.host}:{greedy.port}\r\nCookie: {cookie}\r\nContent-Type: {form}\r\n"
        )
        return f"{head}Content-Length: {len(sent)}\r\n\r\n".encode() + sent[: len(sent) - missing]

    return content


def asked(missing: bool = False, new_cookies: bool = False, more: int = 0) -> Flood:
    """Flood of good questions (searches), each with `more` numbers that mean nothing. Flags: see :func:`posted`."""

    def body(greedy: Visitor) -> bytes:
        question = {"data": ["a", None], "fn_index": greedy.event("Search")["id"], "x": [1] * more}
        return json.dumps(question).encode()

    return posted(ASK, "application/json", missing, new_cookies, body)


def asked_much(greedy: Visitor) -> bytes:
    """Body of the longest question that the page answers: a classification by 1,000 texts."""
    labels, templates = "\n".join(str(i) for i in range(100)), "\n".join(["a {}"] * 10)
    image = {"path": greedy.examples[0]}
    return json.dumps({"data": [image, labels, templates], "fn_index": greedy.event("Classify")["id"]}).encode()


def uploaded(missing: bool = False, new_cookies: bool = False) -> Flood:
    """Flood of uploads of an image. Flags: see :func:`posted`."""
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + png() + b"\r\n--x--\r\n"
    return posted(f"{API}/upload", "multipart/form-data; boundary=x", missing, new_cookies, lambda _: form)


def opened(path: str, times: int = 1) -> Flood:
    """Flood of GET requests of a path, `times` on each connection."""
    return lambda greedy: f"GET {path} HTTP/1.1\r\nHost: {greedy.host}:{greedy.port}\r\n\r\n".encode() * times


FLOODS: dict[str, Flood] = {
    "questions": asked(),
    "questions of many cookies": asked(new_cookies=True),
    "questions that never end": asked(missing=True),
    "questions of many cookies that never end": asked(missing=True, new_cookies=True),
    "questions of 480 kB": asked(more=160_000),
    "questions of 1,000 texts": posted(ASK, "application/json", False, False, asked_much),
    "uploads": uploaded(),
    "uploads of many cookies": uploaded(new_cookies=True),
    "uploads that never end": uploaded(missing=True),
    "the page": opened("/"),
    "the page, in a pipe": opened("/config", 20),
    "streams of events": opened(f"{API}/queue/data?session_hash=a"),
    "nothing": lambda _: b"",
    "letters": lambda _: b"GET / HTTP/1.1\r\nX: a",
}
ALONE = [name for name in FLOODS if "many cookies" not in name]
"""Floods that delay nobody else at the same address either."""


def flood(
    target: Target, visitor: Visitor, address: str, names: Sequence[str], count: int
) -> tuple[list[str], dict[str, float]]:
    """Flood the page from `address`, and tell how a visitor fares meanwhile.

    Args:
        names: keys of FLOODS, whose requests are sent in turn, one on each connection.
        count: number of connections.

    Returns:
        Problems of the visitor, and the longest seconds that each of the visitor's acts took.
    """
    greedy, problems, longest, ended = target.visitor(address), [], dict[str, float](), False
    lines: deque[socket.socket] = deque()
    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(_send, greedy, [FLOODS[name] for name in names], count, lines)
        while not ended:
            ended = flooding.done()  # and once more behind it
            for name, problem, seconds in _acts(visitor):
                longest[name] = max(longest.get(name, 0.0), seconds)
                problems += [f"{name}: {problem}"] if problem else []
        refused = flooding.result()
    for line in lines:
        line.close()
    return [*problems, *([f"{refused} connections refused"] if refused else [])], longest


def _send(greedy: Visitor, floods: Sequence[Flood], count: int, lines: deque[socket.socket]) -> int:
    """Open connections and keep the last ones. Returns how many could not be opened."""
    refused = 0
    for number in range(count):
        try:
            line = greedy.connect(PATIENCE)
        except OSError:
            refused += 1
            continue
        lines.append(line)
        with contextlib.suppress(OSError):
            line.sendall(floods[number % len(floods)](greedy))
        if len(lines) > HELD:
            lines.popleft().close()
    return refused


def _acts(visitor: Visitor) -> Iterator[tuple[str, str, float]]:
    """A question, an upload and the page: the name, what went wrong, and the seconds that it took."""
    for name, act in (
        ("question", lambda: visitor.ask("Search", ["a circle", None], 4 * PATIENCE)),
        ("upload", lambda: (visitor.upload("x.png", png()).status == 200, "refused")),
        ("page", lambda: (visitor.request("GET", "/").status == 200, "refused")),
    ):
        began = time.monotonic()
        served, said = act()
        yield name, "" if served else said[:100] or "no answer", time.monotonic() - began
