"""Shares: what the page has little of is divided between its visitors, and they take turns."""

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Thing = TypeVar("Thing", bound=Hashable)


class Visitor(NamedTuple):
    """Visitor of the page, by IP address and cookie. All cookies of an address share what one address may have."""

    address: str
    cookie: str
    """The name that the page gave to the visitor's browser; empty without one."""


def visitor_of(address: str, cookie: str = "") -> Visitor:
    """The visitor with a cookie at an IP address. Of IPv6 its first half counts: a home has all of the second."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return Visitor("", cookie)
    found = getattr(found, "ipv4_mapped", None) or found
    return Visitor(f"{int(found) >> 64:x}::" if found.version == 6 else str(found), cookie)


class Shares(Generic[Thing]):
    """Things such as files or connections that visitors hold, with a limit on the sum of their sizes.

    An address may hold at most half of the limit. Beyond these limits the oldest thing is dropped of the address that
    holds most, and there of the cookie that holds most. Others lose nothing to an address that holds as much as they
    do. Only one thread at a time may use it.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Thing, tuple[Visitor, int]] = {}
        self._sizes: Counter[str | Visitor | None] = Counter()
        """Sum of the sizes that an address holds, that a visitor holds, and, under None, that all hold."""

    def __iter__(self) -> Iterator[Thing]:
        """Iterate over the held things, the oldest first."""
        return iter(self._held)

    def add(self, thing: Thing, visitor: Visitor, size: int = 1) -> list[Thing]:
        """Note that a visitor holds a thing, the newest one. Returns the things that had to be dropped for it."""
        self.remove(thing)
        self._held[thing] = visitor, size
        self._count(visitor, size)

        def greed(thing: Thing) -> tuple[int, bool, int]:
            holder, _ = self._held[thing]
            return self._sizes[holder.address], holder.address == visitor.address, self._sizes[holder]

        gone = []
        while self._sizes[visitor.address] > self._limit // 2 or self._sizes[None] > self._limit:
            gone.append(max(self, key=greed))  # of several the first
            self.remove(gone[-1])
        return gone

    def remove(self, thing: Thing) -> None:
        """Note that a thing is held no more, if it was."""
        if thing in self._held:
            visitor, size = self._held.pop(thing)
            self._count(visitor, -size)

    def _count(self, visitor: Visitor, size: int) -> None:
        for holder in (None, visitor.address, visitor):
            self._sizes[holder] += size
            if not self._sizes[holder]:
                del self._sizes[holder]


class Busy(Exception):
    """A request has lost its place to others, or has taken too long."""


@contextlib.asynccontextmanager
async def place(places: Shares[asyncio.Timeout], visitor: Visitor, seconds: float) -> AsyncIterator[None]:
    """Context in which a visitor has one of a limited number of places.

    Raises Busy if others need the place, or after `seconds`.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            for other in places.add(limit, visitor):
                other.reschedule(0)  # now
            try:
                yield
            finally:
                places.remove(limit)
    except TimeoutError:
        raise Busy from None


@dataclass(eq=False)
class _Request:
    visitor: Visitor
    asked: float
    called: asyncio.Future[bool]
    """True once it has its turn, False once it has lost its place. An exception would keep its frames in memory."""


class Line:
    """Queue of requests of which one at a time is served.

    Turns go round the addresses, and for each address round its cookies, so that visitors with many requests wait
    behind those with few.

    Args:
        places: requests that wait at most.
        seconds: longest time that one waits.
    """

    def __init__(self, places: int, seconds: float) -> None:
        self._seconds = seconds
        self._waiting: Shares[_Request] = Shares(places)
        self._served: _Request | None = None
        self._ended: dict[str | Visitor, float] = {}
        """Time (`time.monotonic`) at which the last turn of an address, or of a visitor, ended."""

    @contextlib.asynccontextmanager
    async def turn(self, visitor: Visitor) -> AsyncIterator[None]:
        """Context that waits for this visitor's turn and holds it. Busy if the turn does not come in time."""
        request = _Request(visitor, time.monotonic(), asyncio.get_running_loop().create_future())
        for other in self._waiting.add(request, visitor):
            if not other.called.done():
                other.called.set_result(False)
        try:
            self._call()
            try:
                async with asyncio.timeout(self._seconds):
                    has_turn = await request.called
            except TimeoutError:
                raise Busy from None
            if not has_turn:
                raise Busy
            yield
        finally:
            self._waiting.remove(request)
            if self._served is request:
                self._served = None
                self._ended[visitor] = self._ended[visitor.address] = time.monotonic()
                self._call()

    def _call(self) -> None:
        """Give the next request its turn, unless another has it."""
        waiting = [request for request in self._waiting if not request.called.done()]
        if self._served is not None or not waiting:
            return
        self._ended = {holder: ended for holder, ended in self._ended.items() if ended > waiting[0].asked}
        self._served = min(waiting, key=self._since)
        self._waiting.remove(self._served)
        self._served.called.set_result(True)

    def _since(self, request: _Request) -> list[float]:
        """Times since which a request's address, and its visitor, wait for a turn; the earliest is served next."""
        holders = (request.visitor.address, request.visitor)
        return [max(request.asked, self._ended.get(holder, 0.0)) for holder in holders]
