"""What a browser sends when a visitor asks: checked part by part, and written anew with nothing else in it."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mvlm.errors import RunError

SESSION = re.compile(r"[A-Za-z0-9_-]{1,64}")
MAX_NUMBER = 10**6
"""Largest number of a part of the page, and largest coordinate of a click."""


class Question(NamedTuple):
    """An event of the page that is answered by the server."""

    inputs: tuple[str | tuple[str, ...], ...]
    """For each input `image`, `text`, or the choices of a radio button."""
    is_click: bool
    """True if it needs the place of a click on an image."""


class Asked(NamedTuple):
    """A checked question."""

    session: str
    body: bytes
    """JSON, as Gradio takes it."""


def questions_of(config: Mapping[str, Any]) -> dict[int, Question]:
    """The questions of a page by their numbers, from Gradio's configuration of it.

    Raises:
        TypeError: an input is of a kind that is not checked here.
    """
    kinds: dict[int, str | tuple[str, ...]] = {}
    for component in config["components"]:
        kind = component["type"]
        if kind in ("image", "textbox"):
            kinds[component["id"]] = {"image": "image", "textbox": "text"}[kind]
        elif kind == "radio":
            kinds[component["id"]] = tuple(value for _, value in component["props"]["choices"])
    found = {}
    for event in config["dependencies"]:
        unknown = [number for number in event["inputs"] if number not in kinds]
        if unknown:
            raise TypeError(f"inputs {unknown} of the page are of a kind that nobody checks")
        is_click = any(name == "select" for _, name in event["targets"])
        found[event["id"]] = Question(tuple(kinds[number] for number in event["inputs"]), is_click)
    return found


def check_question(body: bytes, questions: dict[int, Question], find: Callable[[object], Path]) -> Asked:
    """A question as the page's own JavaScript asks it.

    Args:
        find: gives the file of a path that the visitor may name, else raises RunError.

    Raises:
        RunError: it is none, in a sentence that holds nothing of it.
    """
    try:
        sent = json.loads(body, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise RunError("question: wanted JSON, found none; load the page again") from None
    if not isinstance(sent, dict):
        raise RunError("question: wanted an object of JSON, found another value; load the page again")
    number, session, values = sent.get("fn_index"), sent.get("session_hash"), sent.get("data")
    if type(number) is not int or number not in questions:
        raise RunError("question: wanted one of this page's, found another; load the page again")
    if not isinstance(session, str) or not SESSION.fullmatch(session):
        raise RunError("question: wanted the page's session, found none; load the page again")
    question = questions[number]
    if not isinstance(values, list) or len(values) != len(question.inputs):
        raise RunError(f"question: wanted {len(question.inputs)} values, found others; load the page again")
    trigger = sent.get("trigger_id")
    checked: dict[str, Any] = {
        "data": [_check(value, kind, find) for value, kind in zip(values, question.inputs, strict=True)],
        "fn_index": number,
        "session_hash": session,
        "trigger_id": trigger if type(trigger) is int and 0 <= trigger <= MAX_NUMBER else None,
    }
    if question.is_click:
        checked["event_data"] = {"index": _point(sent.get("event_data")), "value": None}
    return Asked(session, json.dumps(checked).encode())


def _check(value: object, kind: str | tuple[str, ...], find: Callable[[object], Path]) -> Any:
    if kind == "image":
        if value is None:
            return None
        # Without Gradio's `meta`, Gradio does nothing with the path but hand it to the page.
        return {"path": str(find(value.get("path") if isinstance(value, dict) else None))}
    if kind == "text":
        if value is not None and not isinstance(value, str):
            raise RunError("text: wanted a text, found another value; write one")
        if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise RunError("text: wanted letters of Unicode, found half of one; write it anew")
        return value
    if not isinstance(value, str) or value not in kind:
        raise RunError("choice: wanted one of the page's, found another; choose one")
    return value


def _point(event: object) -> list[float]:
    """The place (x, y) of a click, in pixels."""
    point = event.get("index") if isinstance(event, dict) else None
    if isinstance(point, list) and len(point) == 2:
        x, y = point
        if all(type(at) in (int, float) and abs(at) <= MAX_NUMBER and math.isfinite(at) for at in (x, y)):
            return [x, y]
    raise RunError("click: wanted a place on the image, found none; click on it")


def _refuse(name: str) -> None:
    raise ValueError(name)
