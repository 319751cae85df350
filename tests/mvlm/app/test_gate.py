"""What the gate lets through to Gradio: a few of its routes, this machine's names, and questions written anew."""

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mvlm.errors import RunError
from support.packages import needs

pytestmark = [
    needs("gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Gradio
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NEEDED = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("GET", "/theme.css"), ("GET", "/favicon.ico"),
    ("GET", "/assets/{path:path}"), ("GET", "/static/{path:path}"), ("GET", "/gradio_api/app_id"),
    ("POST", "/gradio_api/run/{api_name}"),
}  # fmt: skip
"""Routes of Gradio that the gate lets through."""
ASK = "/gradio_api/run/predict"
OWN = {("POST", "/gradio_api/upload"), ("GET", "/gradio_api/file={path_or_url:path}"),
       ("HEAD", "/gradio_api/file={path_or_url:path}"), ("GET", "/gradio_api/upload_progress")}  # fmt: skip
"""Routes that the gate answers in place of Gradio."""


@pytest.fixture(scope="module")
def page(model) -> Any:
    from mvlm.app.page import build_page

    return build_page(model, None, "micro")


def routes_of(app: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Method and path of every route, those of apps inside the app too."""
    for route in app.routes:
        if hasattr(route, "methods"):
            yield from ((method, f"{prefix}{route.path}") for method in route.methods or ())
        elif hasattr(route, "original_router"):  # a newer FastAPI keeps included routers as they are
            yield from routes_of(route.original_router, prefix)
        elif hasattr(route, "routes"):
            yield from routes_of(route, prefix + getattr(route, "path", ""))


def answer_of(gate: Any, method: str, path: str, **headers: str) -> tuple[int, dict[bytes, bytes], str]:
    """Status, headers and text of the answer to a request; status 299 if the gate lets it through."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    target, _, query = path.partition("?")
    given = {"host": "127.0.0.1:1"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {"type": "http", "method": method, "path": target, "query_string": query.encode()}
    scope |= {"headers": [(name.encode(), value.encode()) for name, value in given.items()]}
    asyncio.run(gate({**scope, "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)}, receive, send))
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


def status_of(gate: Any, method: str, path: str, **headers: str) -> int:
    return answer_of(gate, method, path, **headers)[0]


def gate_at(page: Any, *names: Any) -> Any:
    """A gate before a Gradio that lets other sites read, and answers with what it sees."""
    from mvlm.app.gate import Gate, questions_of

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"access-control-allow-origin", b"*"), (b"x-frame-options", b"ALLOW")]
        await send({"type": "http.response.start", "status": 299, "headers": headers})
        seen = {"scheme": scope.get("scheme"), **{name.decode(): value.decode() for name, value in scope["headers"]}}
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})

    return Gate(gradio, questions_of(page.blocks.config), page.uploads, *names)


@pytest.fixture(scope="module")
def gate(page) -> Any:
    return gate_at(page, "127.0.0.1")


@pytest.mark.slow
def test_every_route_of_gradio_is_needed_or_does_not_exist(page, gate) -> None:
    from mvlm.app.server import gradio_app

    found = set(routes_of(gradio_app(page)))
    assert len(found) > 60
    assert found >= NEEDED | OWN
    answered = {}
    for method, path in sorted(found):
        target = re.sub(r"\{[^}]*\}", "x", path)
        target = target.replace("run/x", "run/predict")
        answered[method, path] = status_of(gate, method, target)
    let_through = {route for route, status in answered.items() if status == 299}
    asks = ("POST", "/gradio_api/run/{api_name}")
    assert let_through == NEEDED - {asks}
    assert answered[asks] == answered["POST", "/gradio_api/upload"] == 403  # it has to be a visitor's, with his cookie
    assert {status for route, status in answered.items() if route not in NEEDED | OWN} == {404}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "X"])
def test_pages_are_read_only(gate, method: str) -> None:
    for path in ("/", "/config", "/theme.css", "/assets/x", "/gradio_api/file=x", "/gradio_api/app_id"):
        assert status_of(gate, method, path) == 404


@pytest.mark.parametrize(
    "path",
    ["/assets/", "/static/", "/assets/../x", "/assets//x", "/static/.x/../../y", "/static/a\\b", "/assets/a b",
     "/assets/\0", "/config/", "//config", "/Config", "/assets/%2e%2e/x", "/assets/" + "a" * 4000],
)  # fmt: skip
def test_no_path_leads_out_of_gradios_files(gate, path: str) -> None:
    assert status_of(gate, "GET", path) == 404
    assert status_of(gate, "GET", "/assets/index-B1_x.js") == 299


def test_the_page_answers_to_its_own_names_alone(page, gate) -> None:
    """DNS rebinding: the browser takes the page for a part of the other site, and lets that site read it."""
    for host, status in (
        ("127.0.0.1:1", 299), ("localhost:1", 299), ("LOCALHOST:1", 299), ("[::1]:1", 299), ("[::ffff:127.0.0.1]", 299),
        ("elsewhere.example:1", 400), ("", 400), ("127.0.0.1.elsewhere.example", 400), ("a b", 400), ("10.0.0.1", 400),
        (f"{socket.gethostname()}-:1", 400), ("127.0.0.1:x", 400),
    ):  # fmt: skip
        assert status_of(gate, "GET", "/config", host=host) == status, host
    everywhere = gate_at(page, "0.0.0.0", ["proxy.example"])
    for host, status in (
        ("127.0.0.1:1", 299), (socket.gethostname(), 299), ("proxy.example", 299), ("elsewhere.example", 400),
        ("10.11.12.13", 400), ("169.254.169.254", 400),
    ):  # fmt: skip
        assert status_of(everywhere, "GET", "/config", host=host) == status, host


def test_another_sites_page_may_neither_send_nor_read_nor_show_this_one(gate) -> None:
    """A browser sends a form of another site without asking."""
    for headers, own in (
        ({"origin": "http://127.0.0.1:1"}, True),
        ({"origin": "https://proxy.example", "x_forwarded_host": "proxy.example"}, False),
        ({"origin": "http://elsewhere.example"}, False),
        ({"origin": "null"}, False),
    ):
        _, _, said = answer_of(gate, "POST", ASK, **headers)
        assert ("another site" in said) != own, headers  # of our own, the cookie is asked for next
        status, sent, _ = answer_of(gate, "GET", "/config", **headers)
        assert status == (299 if own else 403)
        assert b"access-control-allow-origin" not in sent
        assert sent[b"x-frame-options"] == b"DENY"
        assert b"frame-ancestors 'none'" in sent[b"content-security-policy"]


FORWARDED = {
    "x_forwarded_for": "203.0.113.5, 192.0.2.1, 192.0.2.2",
    "x_forwarded_host": "proxy.example",
    "x_forwarded_proto": "https",
    "forwarded": "for=203.0.113.5;host=elsewhere.example",
}


def visitor_at(gate: Any, **headers: str) -> Any:
    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return gate.visitor({"type": "http", "headers": given, "client": ("127.0.0.1", 2)})


def test_headers_of_proxies_are_believed_behind_one_alone(page, gate) -> None:
    own = {"scheme": None, "host": "127.0.0.1:1"}
    for headers, seen, address in (
        ({}, own, "127.0.0.1"),
        (FORWARDED, {"scheme": "https", "host": "proxy.example"}, "192.0.2.2"),
        ({"x_forwarded_host": "a b", "x_forwarded_proto": "ftp"}, own, "127.0.0.1"),
        ({"x_forwarded_host": "a.example, b.example", "forwarded": "for=192.0.2.1"}, own, "127.0.0.1"),
        ({"x_forwarded_for": "2001:db8:1:2::3"}, own, "20010db800010002::"),
        ({"x_forwarded_for": "192.0.2.1, unknown"}, own, ""),
    ):
        proxied = gate_at(page, "127.0.0.1", (), True)
        assert json.loads(answer_of(gate, "GET", "/config", **headers)[2]) == own
        assert json.loads(answer_of(proxied, "GET", "/config", **headers)[2]) == seen
        assert visitor_at(gate, **headers).address == "127.0.0.1"
        assert visitor_at(proxied, **headers).address == address
        assert status_of(proxied, "GET", "/config", origin="https://proxy.example", **headers) == (
            299 if seen["host"] == "proxy.example" else 403
        )
        assert status_of(proxied, "GET", "/config", **headers, host="elsewhere.example") == 400


def test_a_visitor_is_known_by_the_pages_own_cookie(gate) -> None:
    _, headers, _ = answer_of(gate, "GET", "/")
    cookie = headers[b"set-cookie"].decode().partition(";")[0]
    name, _, value = cookie.partition("=")
    for sent, found in (
        (cookie, value), (f"a=b; {cookie};c", value), (f"=;;\u00ff {{; {cookie}", value),
        (f"a={'b' * 9000}; {cookie}", value), (f"{name}={value}!", ""), (f"x{cookie}", ""), (f"{name}=short", ""),
        (f"{name}={'a' * 65}", ""), ("", ""),
    ):  # fmt: skip
        assert visitor_at(gate, cookie=sent).cookie == found, sent
        assert (b"set-cookie" in answer_of(gate, "GET", "/", cookie=sent)[1]) == (not found)


@pytest.fixture
def check() -> Any:
    """Checks a good question with parts that are changed; returns what is left of it."""
    from mvlm.app.gate import Question, check_question

    questions = {3: Question(("image", "text", ("left", "right")), False), 4: Question(("text",), True)}

    def checked(body: bytes | None = None, **changed: Any) -> dict[str, Any]:
        sent = json.dumps({**GOOD, **changed}).encode() if body is None else body
        return json.loads(check_question(sent, questions, find))

    return checked


GOOD: dict[str, Any] = {"data": [{"path": "mine"}, "a", "left"], "fn_index": 3}


def find(path: object) -> Path:
    if path != "mine":
        raise RunError("not yours")
    return Path("/folder/mine")


def test_a_question_is_written_anew_with_nothing_else_in_it(check) -> None:
    noise = {"batched": True, "simple_format": True, "event_id": "x", "oauth_token": "x", "request": {}, "x": 1,
             "session_hash": "a1"}  # fmt: skip
    image = {"path": "mine", "url": "http://x", "meta": {"_type": "gradio.FileData"}, "is_stream": True}
    assert check(data=[image, None, "right"], trigger_id=7, event_data={"x": 1}, **noise) == {
        "data": [{"path": "/folder/mine"}, None, "right"],
        "fn_index": 3,
        "trigger_id": 7,
    }
    assert check(data=[None, "b", "left"], trigger_id="x")["trigger_id"] is None
    clicked = check(data=["a"], fn_index=4, event_data={"index": [1, 2.5], "value": "x", "target": 5})
    assert clicked["event_data"] == {"index": [1, 2.5], "value": None}


def test_any_other_question_is_refused(check) -> None:
    refused: list[dict[str, Any]] = [
        {"data": None}, {"data": {}}, {"data": []}, {"data": [None, "a"]}, {"data": [None, "a", "left", 1]},
        {"data": [{"path": "yours"}, "a", "left"]}, {"data": [{"path": ["mine"]}, "a", "left"]},
        {"data": ["mine", "a", "left"]}, {"data": [{}, "a", "left"]}, {"data": [None, 5, "left"]},
        {"data": [None, ["a"], "left"]}, {"data": [None, "\ud800", "left"]}, {"data": [None, "a", "middle"]},
        {"data": [None, "a", None]}, {"data": [None, "a", ["left"]]}, {"fn_index": 5}, {"fn_index": True},
        {"fn_index": "3"}, {"fn_index": 3.0}, {"fn_index": 4, "data": ["a"]},
        {"fn_index": 4, "data": ["a"], "event_data": {"index": [1]}},
        {"fn_index": 4, "data": ["a"], "event_data": {"index": [1, True]}},
        {"fn_index": 4, "data": ["a"], "event_data": {"index": [1, 1e300]}},
        *({"body": body} for body in (b"", b"{", b"[]", b"\xff", b'{"a": NaN}', b"[" * 200_000, b"9" * 5000)),
    ]  # fmt: skip
    for changed in refused:
        with pytest.raises(RunError):
            check(**changed)


def test_the_questions_of_a_page_come_from_its_configuration() -> None:
    from mvlm.app.gate import Question, questions_of

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


class Asker:
    """Somebody who asks the gate a question, and may leave, or take no answer."""

    def __init__(self, gate: Any, letter: str) -> None:
        self.sent: list[Any] = []
        self.left, self.takes = asyncio.Event(), asyncio.Event()
        self.takes.set()
        cookie = answer_of(gate, "GET", "/")[1][b"set-cookie"].partition(b"=")[0] + b"=" + letter.encode() * 30
        self._gate, self._headers = gate, [(b"host", b"127.0.0.1:1"), (b"cookie", cookie)]
        self._body = [{"type": "http.request", "body": b'{"fn_index": 0, "data": []}', "more_body": False}]

    async def ask(self) -> None:
        scope = {"type": "http", "method": "POST", "path": ASK, "query_string": b"", "headers": self._headers}
        await self._gate({**scope, "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)}, self._receive, self._send)

    async def _receive(self) -> Any:
        if self._body:
            return self._body.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        await self.takes.wait()


def gradio_with(asked: list[Any], status: int = 200, body: bytes = b'{"data": []}') -> Any:
    """A Gradio that notes the questions that it gets in a list, and answers all alike."""

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        if scope["method"] == "POST":
            asked.append((await receive())["body"])
            await asyncio.sleep(0.05)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return gradio


def test_a_question_is_computed_while_its_visitor_waits_behind_no_slow_one(page) -> None:
    from mvlm.app.gate import Gate, Question

    computed: list[Any] = []
    gate = Gate(gradio_with(computed), {0: Question((), False)}, page.uploads, "127.0.0.1")
    slow, gone, here = (Asker(gate, letter) for letter in "abc")

    async def main() -> None:
        slow.takes.clear()
        asking = [asyncio.create_task(slow.ask())]
        await asyncio.sleep(0.01)
        asking += [asyncio.create_task(asker.ask()) for asker in (gone, here)]
        await asyncio.sleep(0.01)
        gone.left.set()
        async with asyncio.timeout(5):
            await asyncio.gather(*asking[1:])
        assert [message.get("status") for message in here.sent] == [200, None]
        slow.takes.set()
        await asking[0]

    asyncio.run(main())
    assert len(computed) == 2
    assert gone.sent == []


@pytest.mark.parametrize("body", [b'{"error": "text: wanted one"}', b'{"error": null}', b'{"detail": "Not Found"}'])
def test_a_question_that_is_not_answered_gets_a_sentence_and_ends_its_turn(page, body: bytes) -> None:
    from mvlm.app.gate import Gate, Question

    gate = Gate(gradio_with([], 500, body), {0: Question((), False)}, page.uploads, "127.0.0.1")
    for _ in range(2):
        asker = Asker(gate, "a")
        asyncio.run(asker.ask())
        assert asker.sent[0]["status"] == 422
        said = json.loads(asker.sent[1]["body"])["error"]
        assert said == "text: wanted one" if b"wanted" in body else "could not answer" in said
