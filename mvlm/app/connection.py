"""A connection of the page: HTTP in its plainest form, a share of the places, and an end if nothing happens."""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from mvlm.app.shares import Shares, Visitor, visitor_of

MAX_CONNECTIONS = 256
"""Most open connections. Beyond that the oldest connection of the visitor with the most is closed."""
HEADER_SECONDS = 10.0
"""Longest time without a whole request, from the first byte of a connection or the end of the last answer."""
WRITE_SECONDS = 30.0
"""Longest time in which a visitor takes nothing of an answer."""
MAX_HEADERS, MAX_HEAD = 100, 16_384
"""Headers of a request, and bytes of its request line and headers together."""
ODD_LINES = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]|[^\t\r\n -~\x80-\xff]")
"""Pattern of faults in a request's head: line ends other than CR LF, folded header lines, and control characters."""
LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(.*?)[ \t]*\r$")


class StrictHTTP(h11.Connection):
    """Server's side of HTTP/1.0 and 1.1, which refuses requests that a proxy in front of it may parse differently.

    A request has one Content-Length of digits, or no body. Anything else raises RemoteProtocolError, and `status` is
    the HTTP status to answer with.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self.status = HTTPStatus.BAD_REQUEST

    def next_event(self) -> Any:
        """The next event of h11. A request's head is checked first."""
        before = self.trailing_data[0] if self.their_state is h11.IDLE else b""
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_head(before[: len(before) - len(self.trailing_data[0])], event)
        except h11.RemoteProtocolError as error:
            self.status = HTTPStatus(error.error_status_hint)
            raise
        return event


def _check_head(head: bytes, request: h11.Request) -> None:
    """Raise RemoteProtocolError for a request line or headers that h11 accepts but this server refuses.

    head: bytes of the request line and the headers.
    """
    lengths = LENGTH.findall(head)
    names = [name for name, _ in request.headers]
    for is_odd, status in (
        (request.http_version not in (b"1.0", b"1.1"), HTTPStatus.HTTP_VERSION_NOT_SUPPORTED),
        (len(names) > MAX_HEADERS or len(head) > MAX_HEAD, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE),
        (ODD_LINES.search(head), HTTPStatus.BAD_REQUEST),
        (
            len(lengths) > 1 or not all(re.fullmatch(rb"[0-9]{1,12}", length) for length in lengths),
            HTTPStatus.BAD_REQUEST,
        ),
        (b"transfer-encoding" in names, HTTPStatus.BAD_REQUEST if lengths else HTTPStatus.LENGTH_REQUIRED),
    ):
        if is_odd:
            raise h11.RemoteProtocolError("an odd request", error_status_hint=status)


class Connection(H11Protocol):
    """A connection that ends if its visitor sends or takes nothing for long, or if others need its place.

    Args:
        shares: the places of all connections.
        visitor: tells who has sent a request.
    """

    def __init__(
        self, *args: Any, shares: Shares["Connection"], visitor: Callable[[Scope], Visitor], **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self.conn = StrictHTTP()
        self._shares, self._visitor = shares, visitor

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since = self._flowing = self.loop.time()
        self._unsent = 0
        self._watch = self.loop.call_later(1.0, self._look)
        self._take_place(visitor_of(self.client[0] if self.client else ""))

    def connection_lost(self, exc: Exception | None) -> None:
        self._watch.cancel()
        self._shares.remove(self)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:  # a request has come, by which the visitor is known
            self._take_place(self._visitor(dict(self.scope)))

    def send_400_response(self, msg: str) -> None:
        """Refuse a request that is not plain HTTP, and close."""
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
        status = self.conn.status
        for event in (
            h11.Response(status_code=status, headers=headers, reason=status.phrase.encode()),
            h11.Data(data=b"wanted a plain request of HTTP/1.1"),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _take_place(self, visitor: Visitor) -> None:
        for other in self._shares.add(self, visitor):
            other.transport.abort()

    def _look(self) -> None:
        now = self.loop.time()
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0 or unsent != self._unsent:
            self._flowing = now
        self._unsent = unsent
        if self.cycle is not None and not self.cycle.response_complete:
            self._since = now
        if now - self._since > HEADER_SECONDS or now - self._flowing > WRITE_SECONDS:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(1.0, self._look)
