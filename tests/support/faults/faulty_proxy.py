"""A proxy that stands before a local server and spoils some of its answers."""

import contextlib
import http.client
import http.server
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from urllib.parse import urlsplit

FAULTS = ("error", "delay", "silence", "short", "length", "garbled", "closed")
"""Faults of an answer:

- error: status 500 instead of it
- delay: it comes late, and whole
- silence: nothing comes, and the connection stays open
- short: half of it comes, with the length of the whole
- length: half of it comes, with the length of that half
- garbled: a byte in its middle differs
- closed: the connection is closed at once
"""
ON_WRITES = ("error", "delay", "silence", "closed")
"""Faults that can happen to a request that writes. It does not reach the server, except after a delay."""


class FaultyProxy(http.server.BaseHTTPRequestHandler):
    """Forwards requests to `upstream`. `choose(method, path)` names the fault of an answer, or None."""

    protocol_version = "HTTP/1.1"
    upstream: ClassVar[str]
    choose: ClassVar[Callable[[str, str], str | None]]
    happened: ClassVar[Counter[str]]
    over: ClassVar[threading.Event]

    def forward(self) -> None:
        kind = type(self)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = kind.choose(self.command, urlsplit(self.path).path)
        if fault is not None:
            kind.happened[fault] += 1
        if fault == "closed":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "silence":
            kind.over.wait(60)
            self.close_connection = True
            return
        if fault == "error":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "delay":
            time.sleep(0.05)
        self._answer(content, fault)

    def _answer(self, content: bytes, fault: str | None) -> None:
        address = urlsplit(type(self).upstream)
        upstream = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
        upstream.request(self.command, self.path, content, headers)
        answer = upstream.getresponse()
        body = answer.read()
        upstream.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding", "server", "date"):
                self.send_header(name, value)
        length = len(body) if self.command != "HEAD" else int(answer.getheader("Content-Length") or 0)
        if fault == "garbled" and body:
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if fault in ("short", "length"):
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body) if fault == "length" else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = fault == "short"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that has given up."""


@contextlib.contextmanager
def serve_faulty(upstream: str, choose: Callable[[str, str], str | None]) -> Iterator[tuple[str, Counter[str]]]:
    """Serve `upstream` through a proxy. Yields its address, and a count of the faults that happen."""
    over, happened = threading.Event(), Counter[str]()
    names = {"upstream": upstream, "choose": staticmethod(choose), "happened": happened, "over": over}
    server = _Server(("127.0.0.1", 0), type("Proxy", (FaultyProxy,), names))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", happened
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
