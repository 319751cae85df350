"""Whose a session is, and for whom a question is still answered."""

import time

import pytest

from mvlm.app import visitors
from mvlm.app.visitors import GRACE, MAX_WAIT, Visitors
from mvlm.errors import RunError


def test_a_session_is_its_first_visitors() -> None:
    known = Visitors()
    known.join("s", "me")
    known.join("s", "me")
    with pytest.raises(RunError, match="session: wanted your own"):
        known.join("s", "you")
    assert known.owns("s", "me")
    assert not known.owns("s", "you")
    assert not known.owns("t", "me")


def test_only_the_newest_sessions_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visitors, "MAX_SESSIONS", 3)
    known = Visitors()
    for session in "abcad":
        known.join(session, "me")
    assert [known.owns(session, "me") for session in "abcd"] == [True, False, True, True]
    assert [known.knows(session) for session in "abcd"] == [True, False, True, True]


def test_a_question_is_answered_while_its_visitor_waits() -> None:
    known, now = Visitors(), time.monotonic()
    known.check_waiting("s", now)  # the browser opens its stream after it has asked
    with pytest.raises(RunError, match="wanted a visitor who waits"):
        known.check_waiting("s", now - GRACE - 0.1)
    with known.listening("s"):
        known.check_waiting("s", now - GRACE - 0.1)
        with known.listening("s"):
            pass
        known.check_waiting("s", now - MAX_WAIT + 5)
        with pytest.raises(RunError, match="the page is busy"):
            known.check_waiting("s", now - MAX_WAIT - 0.1)
    with pytest.raises(RunError, match="wanted a visitor who waits"):
        known.check_waiting("s", now - GRACE - 0.1)
