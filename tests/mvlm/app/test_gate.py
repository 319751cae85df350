"""Every route that Gradio serves: the page needs a few, the others do not exist."""

import asyncio
import re
from collections.abc import Iterator
from typing import Any

import pytest

from support.packages import needs

pytestmark = [
    needs("gradio"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Gradio
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NEEDED = {
    ("GET", "/"), ("HEAD", "/"), ("GET", "/config"), ("GET", "/theme.css"), ("GET", "/favicon.ico"),
    ("GET", "/assets/{path:path}"), ("GET", "/static/{path:path}"), ("GET", "/gradio_api/app_id"),
    ("GET", "/gradio_api/queue/data"), ("POST", "/gradio_api/queue/join"),
}  # fmt: skip
"""Routes of Gradio that the gate lets through."""
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


def status_of(gate: Any, method: str, path: str) -> int:
    """The status that answers a request, 299 if the gate lets it through."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1:1")]
    target, _, query = path.partition("?")
    scope = {"type": "http", "method": method, "path": target, "query_string": query.encode(), "headers": headers}
    asyncio.run(gate({**scope, "server": ("127.0.0.1", 1), "client": ("127.0.0.1", 2)}, receive, send))
    return sent[0]["status"]


@pytest.fixture(scope="module")
def gate(page) -> Any:
    from mvlm.app.gate import Gate
    from mvlm.app.questions import questions_of

    async def gradio(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return Gate(gradio, questions_of(page.blocks.config), page.uploads, page.visitors, "127.0.0.1")


def test_every_route_of_gradio_is_needed_or_does_not_exist(page, gate) -> None:
    from mvlm.app.server import gradio_app

    found = set(routes_of(gradio_app(page)))
    assert len(found) > 60
    assert found >= NEEDED | OWN
    answered = {}
    for method, path in sorted(found):
        target = re.sub(r"\{[^}]*\}", "x", path)
        target = target.replace("queue/data", "queue/data?session_hash=a")
        answered[method, path] = status_of(gate, method, target)
    let_through = {route for route, status in answered.items() if status == 299}
    # A question and a stream of answers have to be a visitor's, with his cookie.
    assert let_through == NEEDED - {("GET", "/gradio_api/queue/data"), ("POST", "/gradio_api/queue/join")}
    assert answered["POST", "/gradio_api/queue/join"] == answered["GET", "/gradio_api/queue/data"] == 403
    assert answered["POST", "/gradio_api/upload"] == 403
    assert {status for route, status in answered.items() if route not in NEEDED | OWN} == {404}


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "X"])
def test_pages_are_read_only(gate, method: str) -> None:
    for path in ("/", "/config", "/theme.css", "/assets/x", "/gradio_api/file=x", "/gradio_api/queue/data"):
        assert status_of(gate, method, path) == 404


@pytest.mark.parametrize(
    "path",
    ["/assets/", "/static/", "/assets/../x", "/assets//x", "/static/.x/../../y", "/static/a\\b", "/assets/a b",
     "/assets/\0", "/config/", "//config", "/Config", "/assets/%2e%2e/x"],
)  # fmt: skip
def test_no_path_leads_out_of_gradios_files(gate, path: str) -> None:
    assert status_of(gate, "GET", path) == 404
    assert status_of(gate, "GET", "/assets/index-B1_x.js") == 299
