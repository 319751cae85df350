"""A web server of a good data folder, some of whose answers attack the reader.

`ATTACKS` names them. Each is a function of the request's handler and the file's content, which writes the whole answer.
"""

import contextlib
import gzip
import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

PATIENCE_S = 5
"""A client that has not given up by then is let go."""
CHUNK = 1 << 16
BOMB = gzip.compress(bytes(16 << 20), 1)


class Hostile(http.server.BaseHTTPRequestHandler):
    """Serves files of `folder`, but for those that `attacks` names, which it answers by these functions."""

    protocol_version = "HTTP/1.1"
    folder: ClassVar[Path]
    attacks: ClassVar[dict[str, "Attack"]]
    asked: ClassVar[Counter[str]]
    over: ClassVar[threading.Event]
    sent: ClassVar[Counter[str]]
    """Number of bytes of answers that the server has sent, by path."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)[1:]
        self.asked[path] += 1
        file = self.folder / path
        content = file.read_bytes() if file.is_file() else None
        with contextlib.suppress(OSError):  # the client has given up
            if path in self.attacks:
                self.close_connection = True
                self.attacks[path](self, content or b"")
            else:
                self.head(200 if content is not None else 404, {"Content-Length": str(len(content or b""))})
                self.body(content or b"")

    def do_HEAD(self) -> None:
        file = self.folder / unquote(urlsplit(self.path).path)[1:]
        self.head(
            200 if file.is_file() else 404, {"Content-Length": str(file.stat().st_size) if file.is_file() else "0"}
        )

    def head(self, status: int, headers: dict[str, str], reason: str = "Some") -> None:
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def body(self, content: bytes) -> None:
        self.wfile.write(content)
        self.sent[unquote(urlsplit(self.path).path)[1:]] += len(content)

    def until_over(self) -> Iterator[None]:
        """Repeats until the test is over, or for `PATIENCE_S`, which counts as a request for `never`."""
        end = time.monotonic() + PATIENCE_S
        while not self.over.is_set():
            if time.monotonic() > end:
                self.asked["never"] += 1
                return
            yield

    def log_message(self, format: str, *args: object) -> None:
        pass


Attack = Callable[[Hostile, bytes], None]


def endless(web: Hostile, content: bytes) -> None:
    """All of the file, and then more without end."""
    web.head(200, {})
    web.body(content)
    for _ in web.until_over():
        web.body(b" " * CHUNK)


def too_long(web: Hostile, content: bytes) -> None:
    """A stated length above every limit."""
    web.head(200, {"Content-Length": str(1 << 50)})
    for _ in web.until_over():
        web.body(b" " * CHUNK)


def bomb(web: Hostile, content: bytes) -> None:
    """A small body that is large when it is decompressed."""
    web.head(200, {"Content-Length": str(len(BOMB)), "Content-Encoding": "gzip"})
    web.body(BOMB)


def bomb_of_brotli(web: Hostile, content: bytes) -> None:
    web.head(200, {"Content-Length": "9", "Content-Encoding": "br"})
    web.body(b"123456789")


def silent(web: Hostile, content: bytes) -> None:
    for _ in web.until_over():
        web.over.wait(0.05)


def slow(web: Hostile, content: bytes) -> None:
    """A byte at a time, never silent."""
    web.head(200, {"Content-Length": str(len(content))})
    for place, _ in enumerate(web.until_over()):
        web.body(content[place : place + 1] or b" ")
        web.over.wait(0.05)


def slow_head(web: Hostile, content: bytes) -> None:
    web.wfile.write(b"HTTP/1.1 200 Some\r\nX: ")
    for _ in web.until_over():
        web.wfile.write(b"x")
        web.over.wait(0.05)


def endless_head(web: Hostile, content: bytes) -> None:
    web.wfile.write(b"HTTP/1.1 200 Some\r\n")
    for number, _ in enumerate(web.until_over()):
        web.wfile.write(b"X-%d: %s\r\n" % (number, b"x" * 1000))


def endless_wait(web: Hostile, content: bytes) -> None:
    """Answers that ask to go on waiting."""
    for _ in web.until_over():
        web.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
        web.over.wait(0.01)


def short(web: Hostile, content: bytes) -> None:
    web.head(200, {"Content-Length": str(len(content) + 1)})
    web.body(content)


def part(web: Hostile, content: bytes) -> None:
    """A part of the file, for which nobody asked."""
    web.head(206, {"Content-Length": "9", "Content-Range": f"bytes 5-13/{len(content)}"})
    web.body(content[:9])


def escapes(web: Hostile, content: bytes) -> None:
    """A reason that would clear a terminal, and has a password and an address in it."""
    web.head(
        500, {"Content-Length": "0"}, reason="\x1b[2J\x1b]0;x\x07 https://someone:secret-word@h/?token=secret-word"
    )


def away(web: Hostile, content: bytes) -> None:
    """A redirect to another server, which counts whether it is asked."""
    address: Any = web.server.server_address
    web.head(302, {"Content-Length": "0", "Location": f"http://localhost:{address[1]}/away"})


def round_and_round(web: Hostile, content: bytes) -> None:
    web.head(302, {"Content-Length": "0", "Location": web.path})


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        endless, too_long, bomb, bomb_of_brotli, silent, slow, slow_head, endless_head, endless_wait, short, part,
        escapes, away, round_and_round,
    )
}  # fmt: skip


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has given up."""


@contextlib.contextmanager
def serve_hostile(folder: Path, attacks: dict[str, Attack]) -> Iterator[tuple[str, type[Hostile]]]:
    """Serve a folder with attacks in place of some files, by name. Yields the URL, and the handler, which counts."""
    over = threading.Event()
    names = {"folder": folder, "attacks": attacks, "asked": Counter(), "sent": Counter(), "over": over}
    handler = type("Web", (Hostile,), names)
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", handler
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
