"""What a browser may ask, and what is left of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from mvlm.app.questions import Question, check_question, questions_of
from mvlm.errors import RunError

QUESTIONS = {3: Question(("image", "text", ("left", "right")), False), 4: Question(("text",), True)}
GOOD: dict[str, Any] = {"data": [{"path": "mine"}, "a", "left"], "fn_index": 3, "session_hash": "a1_-"}


def find(path: object) -> Path:
    if path != "mine":
        raise RunError("not yours")
    return Path("/folder/mine")


def check(**changed: Any) -> dict[str, Any]:
    return json.loads(check_question(json.dumps({**GOOD, **changed}).encode(), QUESTIONS, find).body)


def test_a_question_is_written_anew_with_nothing_else_in_it() -> None:
    noise = {"batched": True, "simple_format": True, "event_id": "x", "oauth_token": "x", "request": {}, "x": 1}
    image = {"path": "mine", "url": "http://x", "meta": {"_type": "gradio.FileData"}, "is_stream": True}
    assert check(data=[image, None, "right"], trigger_id=7, event_data={"x": 1}, **noise) == {
        "data": [{"path": "/folder/mine"}, None, "right"],
        "fn_index": 3,
        "session_hash": "a1_-",
        "trigger_id": 7,
    }
    assert check(data=[None, "b", "left"], trigger_id="x")["trigger_id"] is None
    clicked = check(data=["a"], fn_index=4, event_data={"index": [1, 2.5], "value": "x", "target": 5})
    assert clicked["event_data"] == {"index": [1, 2.5], "value": None}


@pytest.mark.parametrize("changed", [
    {"data": None}, {"data": {}}, {"data": []}, {"data": [None, "a"]}, {"data": [None, "a", "left", 1]},
    {"data": [{"path": "yours"}, "a", "left"]}, {"data": [{"path": ["mine"]}, "a", "left"]},
    {"data": ["mine", "a", "left"]},
    {"data": [{}, "a", "left"]}, {"data": [None, 5, "left"]}, {"data": [None, ["a"], "left"]},
    {"data": [None, "\ud800", "left"]}, {"data": [None, "a", "middle"]}, {"data": [None, "a", None]},
    {"data": [None, "a", ["left"]]}, {"fn_index": 5}, {"fn_index": True}, {"fn_index": "3"}, {"fn_index": 3.0},
    {"session_hash": ""}, {"session_hash": "a b"}, {"session_hash": "a\n"}, {"session_hash": "a" * 65},
    {"session_hash": None}, {"fn_index": 4, "data": ["a"]},
    {"fn_index": 4, "data": ["a"], "event_data": {"index": [1]}},
    {"fn_index": 4, "data": ["a"], "event_data": {"index": [1, True]}},
    {"fn_index": 4, "data": ["a"], "event_data": {"index": [1, 1e300]}},
])  # fmt: skip
def test_any_other_question_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(RunError):
        check(**changed)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 200_000, b"9" * 5000])
def test_what_is_no_object_of_json_is_refused(body: bytes) -> None:
    with pytest.raises(RunError, match="question: wanted"):
        check_question(body, QUESTIONS, find)


def test_the_questions_of_a_page_come_from_its_configuration() -> None:
    config = {
        "components": [
            {"id": 1, "type": "image", "props": {}},
            {"id": 2, "type": "textbox", "props": {}},
            {"id": 3, "type": "radio", "props": {"choices": [["Left", "left"], ["Right", "right"]]}},
            {"id": 4, "type": "file", "props": {}},
        ],
        "dependencies": [
            {"id": 0, "inputs": [1, 2, 3], "targets": [[9, "click"]]},
            {"id": 1, "inputs": [2], "targets": [[1, "select"]]},
        ],
    }
    assert questions_of(config) == {
        0: Question(("image", "text", ("left", "right")), False),
        1: Question(("text",), True),
    }
    config["dependencies"].append({"id": 2, "inputs": [4], "targets": []})
    with pytest.raises(TypeError, match=r"inputs \[4\] of the page are of a kind that nobody checks"):
        questions_of(config)
