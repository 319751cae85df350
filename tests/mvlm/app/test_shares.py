"""Whose things go when there are too many, and whose turn it is."""

import asyncio
import gc
import random
import weakref
from collections import Counter

import pytest

from mvlm.app.shares import Busy, Line, Shares, Visitor, visitor_of


def test_a_visitor_is_an_address_and_a_cookie() -> None:
    assert visitor_of("192.0.2.7", "a") == Visitor("192.0.2.7", "a")
    assert visitor_of("::ffff:192.0.2.7") == visitor_of("192.0.2.7")
    assert visitor_of("2001:db8:1:2::3") == visitor_of("2001:db8:1:2:ffff::9") != visitor_of("2001:db8:1:3::3")
    assert visitor_of("unknown", "a") == visitor_of("", "a") == Visitor("", "a")


@pytest.mark.parametrize(
    "visitors, going",
    [
        ("a a b c a", "- - - - 0"),
        ("a a a a", "- - 0 1"),
        ("a a b b c d", "- - - - 0 2"),
        ("a b c d e", "- - - - 4"),  # nobody is greedier than the last one
        ("a a b b c c", "- - - - 0 4"),
        ("ax ay ax", "- - 0"),
        ("ay ax ax", "- - 1"),
        ("ax ay az", "- - 0"),  # cookies cost nothing
        ("ax ax b b ay", "- - - - 0"),
    ],
)
def test_the_oldest_of_the_greediest_goes(visitors: str, going: str) -> None:
    """Of 4 places, 2 at most for an address. A visitor is a letter for the address and one for the cookie."""
    shares: Shares[int] = Shares(4)
    gone = [shares.add(i, Visitor(name[0], name[1:])) for i, name in enumerate(visitors.split())]
    assert [" ".join(str(i) for i in each) or "-" for each in gone] == going.split()


def test_shares_keep_to_their_limit_and_spare_the_modest() -> None:
    draw, shares, held = random.Random(0), Shares[int](1000), {}
    for i in range(2000):
        visitor, size = Visitor(draw.choice("aaaaaaabbc"), draw.choice("xyz")), draw.randrange(1, 200)
        gone = shares.add(i, visitor, size)
        held[i] = visitor, size
        sizes = Counter[str]()
        for holder, amount in held.values():
            sizes[holder.address] += amount
        for thing in gone:
            holder, amount = held.pop(thing)
            assert holder.address == visitor.address or sizes[holder.address] > sizes[visitor.address]
            assert sizes.total() > 1000 or sizes[visitor.address] > 500
            sizes[holder.address] -= amount
        assert sizes.total() <= 1000
        assert max(sizes.values()) <= 500
        assert list(shares) == list(held)
        if i % 7 == 0:
            thing = draw.choice(list(held))
            shares.remove(thing)
            shares.remove(thing)
            del held[thing]


def served(asked: str, places: int = 32, late: str = "") -> tuple[str, str]:
    """Names of visitors in the order of their turns, and of those who lose their place, or wait for too long.

    A visitor is a letter, and its capital is another cookie of the same address. All of `asked` ask while somebody
    else is served; all of `late` in the first of their turns.
    """
    turns, lost, asking = [], [], []

    async def main() -> None:
        line = Line(places, 1.0)

        async def ask(name: str, then: str) -> None:
            try:
                async with line.turn(Visitor(name.lower(), name)):
                    turns.append(name)
                    for other in then:
                        asking.append(asyncio.create_task(ask(other, late if len(asking) == 0 else "")))
                        await asyncio.sleep(0.001)
            except Busy:
                lost.append(name)

        await ask("-", asked)
        while asking:
            await asking.pop(0)

    asyncio.run(main())
    return "".join(turns[1:]), "".join(lost)


@pytest.mark.parametrize(
    "asked, late, turns",
    [
        ("aaaaab", "", "abaaaa"),
        ("aaabbcab", "", "abcababa"),
        ("ababab", "", "ababab"),
        ("aaaaa", "b", "abaaaa"),  # whoever comes late waits for one turn
        ("aaaaa", "bbb", "abababaa"),
        ("aaaaA", "", "aAaaa"),
        ("aaaaAbb", "", "abAbaaa"),
        ("aaaaa", "A", "aAaaaa"),
    ],
)
def test_visitors_take_turns(asked: str, late: str, turns: str) -> None:
    assert served(asked, late=late) == (turns, "")


def test_a_full_line_loses_what_the_greediest_asked_first() -> None:
    assert served("aaaabbc", places=4) == ("abcb", "aaa")


def test_a_lost_request_leaves_nothing_for_the_garbage_collector() -> None:
    """It rarely runs through everything in a process with torch, and half a megabyte may hang on each request."""

    class Body:
        pass

    left: list[weakref.ref[Body]] = []

    async def main() -> None:
        line = Line(4, 1.0)

        async def ask() -> None:
            body = Body()
            left.append(weakref.ref(body))
            async with line.turn(Visitor("a", "")):
                await asyncio.sleep(0.01)

        found = await asyncio.gather(*(ask() for _ in range(8)), return_exceptions=True)
        assert sum(isinstance(each, Busy) for each in found) == 5

    gc.disable()
    try:
        asyncio.run(main())
        assert [body() for body in left] == [None] * 8
    finally:
        gc.enable()


def test_a_turn_ends_with_its_block_and_a_wait_with_its_time() -> None:
    async def main() -> None:
        line, visitor = Line(4, 0.05), Visitor("a", "")
        for _ in range(3):
            with pytest.raises(KeyError):
                async with line.turn(visitor):
                    raise KeyError
        async with line.turn(visitor):
            with pytest.raises(Busy):
                async with line.turn(visitor):
                    raise AssertionError
            left = asyncio.create_task(line.turn(visitor).__aenter__())
            await asyncio.sleep(0)
            left.cancel()  # its visitor has left
        async with asyncio.timeout(1), line.turn(visitor):
            pass

    asyncio.run(main())
