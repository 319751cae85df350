"""Attacks on a running `mvlm app`, through sockets: every one gets one sentence, and the page lives on."""

import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.packages import needs
from support.page_attacks import ATTACKS, KINDS, Attack, png
from support.page_floods import ALONE, FLOODS, PATIENCE, flood
from support.page_process import Page

pytestmark = needs("gradio")
GROWTH = 100
"""MB by which a kind of attacks may let the page's memory grow."""


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory) -> Iterator[Page]:
    page = Page(trained, tmp_path_factory.mktemp("attacked"))
    yield page
    page.kill()


def problems(page: Page, attacks: list[Attack]) -> list[str]:
    """What happened that must not, an attack a line. Slow attacks run at once, others one after another."""

    def attempt(attack: Attack) -> str | None:
        try:
            problem = attack.act(page.target, page.target.visitor())
        except (OSError, ValueError, KeyError, IndexError, StopIteration) as error:
            problem = f"the attack had no answer: {error!r}"
        return problem and f"{attack.kind}: {attack.name}: {problem}"

    slow = [attack for attack in attacks if attack.kind == "slow connections"]
    with ThreadPoolExecutor(len(slow) + 1) as pool:
        found = list(pool.map(attempt, slow))
    for attack in attacks:
        if attack not in slow:
            before = len(page.log.read_text("utf-8", "replace").splitlines())
            problem = attempt(attack)
            lines = page.log.read_text("utf-8", "replace").splitlines()[before:]
            if problem is None and len(lines) > 1:
                problem = f"{attack.kind}: {attack.name}: {len(lines)} lines on the terminal: {lines[-1][:200]}"
            found.append(problem)
    return [problem for problem in found if problem is not None]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_attacks_of_a_kind_fail(page, kind: str) -> None:
    visitor = page.target.visitor()
    assert visitor.ask("Search", ["a circle", None])[0]
    before = page.target.memory()
    assert problems(page, [attack for attack in ATTACKS if attack.kind == kind]) == []
    assert page.target.memory() - before < GROWTH
    began = time.monotonic()
    assert visitor.ask("Search", ["a circle", None])[0]
    assert time.monotonic() - began < 10


def check_floods(page: Page, count: int, *floods: tuple[str, Sequence[str]]) -> None:
    """A visitor at 127.0.0.1 is served while others at an address send floods of some names."""
    visitor, lines = page.target.visitor(), len(page.log.read_text().splitlines())
    before = page.target.memory()
    assert visitor.ask("Search", ["a circle", None])[0]
    for address, names in floods:
        problems, longest = flood(page.target, visitor, address, names, count)
        print(f"{count} connections from {address}:", {name: f"{seconds:.2f} s" for name, seconds in longest.items()})
        assert problems == []
        assert max(longest.values()) < PATIENCE
    assert len(page.log.read_text().splitlines()) == lines
    assert page.target.memory() - before < GROWTH


@pytest.mark.slow
def test_a_flood_keeps_nobody_else_waiting(page) -> None:
    """Of another address, whatever its cookies are; of the same address, with one cookie or none."""
    never_ending = "questions of many cookies that never end"
    check_floods(page, 400, ("127.0.0.2", ["questions of many cookies", never_ending]), ("127.0.0.1", ALONE))


@pytest.mark.extended
@pytest.mark.slow
def test_a_flood_of_5000_keeps_nobody_else_waiting(page) -> None:
    check_floods(page, 5000, ("127.0.0.2", list(FLOODS)), ("127.0.0.1", ALONE))


@pytest.mark.slow
def test_a_page_that_is_ended_leaves_no_upload(trained, tmp_path) -> None:
    page = Page(trained, tmp_path)
    assert page.target.visitor().upload("x.png", png()).status == 200
    assert list(page.uploads.rglob("*.png"))
    assert page.end(signal.SIGTERM) == 0
    assert list(page.uploads.iterdir()) == []
    assert page.log.read_text() == ""


@pytest.mark.extended
@pytest.mark.slow
def test_a_page_for_the_network_has_the_names_that_it_is_given(trained, tmp_path) -> None:
    page = Page(trained, tmp_path, "--host", "0.0.0.0", "--allow-host", "proxy.example")
    try:
        visitor = page.target.visitor()
        for host, status in (("127.0.0.1", 200), ("proxy.example", 200), ("elsewhere.example", 400)):
            assert visitor.request("GET", "/config", headers={"Host": f"{host}:{visitor.port}"}).status == status, host
    finally:
        page.end(signal.SIGTERM)
