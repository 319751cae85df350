"""The gate before Gradio: routes, hosts, sizes and times of requests are checked, then Gradio sees them.

A question is checked part by part, and written anew with nothing else in it. It waits here for its turn.
"""

import asyncio
import hashlib
import ipaddress
import json
import logging
import math
import re
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvlm.app.shares import Busy, Line, Shares, Visitor, place, visitor_of
from mvlm.app.uploads import MAX_BYTES, SUFFIXES, Uploads
from mvlm.errors import RunError

API = "/gradio_api"
ASK = f"{API}/run/predict"
"""Route to which the page's JavaScript sends a question. The answer is that request's."""
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", f"{API}/app_id")
"""Routes of Gradio that the page needs, with GET and HEAD. They get no query."""
FILES = re.compile(r"/(assets|static)/[A-Za-z0-9_@~+-][A-Za-z0-9_@~+./-]{0,199}")
"""Files of Gradio's package that are served."""
MAX_QUESTION = 500_000
"""Bytes of a question: two fields of 100 lines of 1,000 characters are less, in most languages."""
MAX_FORM = MAX_BYTES + 100_000
"""Bytes of a form with an image in it."""
QUESTION_SECONDS, FORM_SECONDS = 20.0, 120.0
"""Longest time that a question or an upload takes to arrive."""
MAX_UPLOADS, MAX_QUESTIONS = 8, 32
"""Uploads that are received at once, and questions that are; as many questions wait for their turn."""
MAX_WAIT = 60.0
"""Seconds that a request waits for its turn."""
MAX_OPENING = 256
"""Requests for PAGES and FILES that wait for their turn."""
KEPT_HEADERS = (
    b"accept", b"accept-encoding", b"content-type", b"host", b"if-modified-since", b"if-none-match", b"user-agent",
)  # fmt: skip
"""Headers that Gradio sees."""
SENT_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"same-origin"),
    (b"content-security-policy",
     b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none'; form-action 'self'; "
     b"frame-ancestors 'none'"),
)  # fmt: skip
"""Headers of every answer: no other page shows this one in a frame, and this one loads nothing from elsewhere."""
LOCAL = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
MAX_NUMBER = 10**6
"""Largest number of a part of the page, and largest coordinate of a click."""
log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered, with the status and the sentence that the visitor gets."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Question(NamedTuple):
    """Inputs of an event of the page, such as a click on a button, that the server answers."""

    inputs: tuple[str | tuple[str, ...], ...]
    """For each input `image`, `text`, or the choices of a radio button."""
    is_click: bool
    """True if it needs the place of a click on an image."""


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


def check_question(body: bytes, questions: dict[int, Question], find: Callable[[object], Path]) -> bytes:
    """The body, JSON as Gradio takes it, of a question as the page's own JavaScript asks it.

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
    number, values = sent.get("fn_index"), sent.get("data")
    if type(number) is not int or number not in questions:
        raise RunError("question: wanted one of this page's, found another; load the page again")
    question = questions[number]
    if not isinstance(values, list) or len(values) != len(question.inputs):
        raise RunError(f"question: wanted {len(question.inputs)} values, found others; load the page again")
    trigger = sent.get("trigger_id")
    checked: dict[str, Any] = {
        "data": [_check(value, kind, find) for value, kind in zip(values, question.inputs, strict=True)],
        "fn_index": number,
        "trigger_id": trigger if type(trigger) is int and 0 <= trigger <= MAX_NUMBER else None,
    }
    if question.is_click:
        checked["event_data"] = {"index": _point(sent.get("event_data")), "value": None}
    return json.dumps(checked).encode()


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


class Gate:
    """An ASGI app around Gradio's. It lets through what the page itself sends, and nothing else.

    It answers uploads and requests for images itself, so that a path is a key into what the page stored.

    Args:
        app: Gradio's.
        questions: the page's.
        host: the address that is listened on.
        names: further names of this machine.
        behind_proxy: believe X-Forwarded-For, -Host and -Proto, which a proxy sets.
    """

    def __init__(
        self,
        app: ASGIApp,
        questions: dict[int, Question],
        uploads: Uploads,
        host: str,
        names: Sequence[str] = (),
        behind_proxy: bool = False,
    ) -> None:
        self._app, self._questions, self._uploads, self._behind_proxy = app, questions, uploads, behind_proxy
        self._names = {_plain(name) for name in (*LOCAL, host, *names)}
        self._is_local = is_local(host)
        if not self._is_local:
            self._names.add(_plain(socket.gethostname()))
        self._uploads_received: Shares[asyncio.Timeout] = Shares(MAX_UPLOADS)
        self._questions_received: Shares[asyncio.Timeout] = Shares(MAX_QUESTIONS)
        self._asking, self._opening = Line(MAX_QUESTIONS, MAX_WAIT), Line(MAX_OPENING, MAX_WAIT)
        self._cookie = f"mvlm-{hashlib.sha256(str(uploads.folder).encode()).hexdigest()[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a web socket: Gradio has none
            await send({"type": "websocket.close", "code": 1008})
            return
        sent = _Sent(send)
        try:
            await self._answer(scope, receive, sent)
        except Refused as refusal:
            await self._refuse(scope, receive, sent, refusal)
        except RunError as error:
            await self._refuse(scope, receive, sent, Refused(400, str(error)))
        except Busy:
            busy = "the page is busy with other requests, or this one took too long; try again"
            await self._refuse(scope, receive, sent, Refused(503, busy))
        except ClientDisconnect:
            pass
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.warning("%s %s: %s", scope["method"], ascii(scope["path"][:80]), said)
            await self._refuse(scope, receive, sent, Refused(500, "the page could not answer that; load it again"))

    async def _refuse(self, scope: Scope, receive: Receive, sent: "_Sent", refusal: Refused) -> None:
        if sent.started:
            await sent.end()
            return
        if scope["path"] == ASK:  # shown by the page's script
            answer: Response = JSONResponse({"error": refusal.sentence}, refusal.status)
        else:
            answer = PlainTextResponse(refusal.sentence, refusal.status)
        await answer(scope, receive, sent)

    async def _answer(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        headers = Headers(scope=scope)
        self._check_host(scope, headers)
        self._check_origin(headers)
        method, path = scope["method"], scope["path"]
        if method == "POST" and path == ASK:
            await self._ask(scope, receive, send, headers)
        elif method == "POST" and path == f"{API}/upload":
            await self._store(scope, receive, send, headers)
        elif method in ("GET", "HEAD"):
            if headers.get("content-length", "0") != "0":
                raise Refused(400, "wanted a request without a body")
            if path.startswith(f"{API}/file="):
                await self._show(scope, receive, send)
            elif path == f"{API}/upload_progress":
                # The page stores an upload in one go, so that there is no progress to tell.
                await Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
            elif path in PAGES or (FILES.fullmatch(path) and ".." not in path):
                await self._open(scope, receive, send)
            else:
                raise Refused(404, "this page has no such address")
        else:
            raise Refused(404, "this page has no such address")

    def _check_host(self, scope: Scope, headers: Headers) -> None:
        """Answer requests for this machine's names alone: another site may give its own name this machine's address."""
        found = HOST.fullmatch(headers.get("host", ""))
        allowed = self._names
        if not self._is_local and scope.get("server"):
            allowed = {*allowed, _plain(scope["server"][0])}
        if len(headers.getlist("host")) != 1 or not found or _plain(found[1]) not in allowed:
            raise Refused(400, "this page has another name; whoever runs it can add one with --allow-host")

    def _forwarded_host(self, headers: Headers) -> str | None:
        """X-Forwarded-Host, the name under which a browser reached the proxy. No page of another site can set it."""
        host = headers.get("x-forwarded-host", "")
        return host if self._behind_proxy and HOST.fullmatch(host) else None

    def _check_origin(self, headers: Headers) -> None:
        """Refuse what a page of another site sends. A browser sends it without asking, and hides only the answer."""
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in (headers["host"], self._forwarded_host(headers)):
            raise Refused(403, "a page of another site may not send here")

    def _for_gradio(self, scope: Scope, given: Sequence[tuple[bytes, bytes]] = ()) -> Scope:
        """ASGI scope of a request for Gradio: with the headers that Gradio needs alone, and without a query."""
        headers = Headers(scope=scope)
        kept = [(name, value) for name, value in scope["headers"] if name in KEPT_HEADERS]
        if host := self._forwarded_host(headers):
            kept = [(name, value) for name, value in kept if name != b"host"] + [(b"host", host.encode())]
        own = {"headers": [*kept, *given], "query_string": b"", "root_path": ""}
        if self._behind_proxy and headers.get("x-forwarded-proto") in ("http", "https"):
            own["scheme"] = headers["x-forwarded-proto"]
        return {**scope, **own}

    def visitor(self, scope: Scope) -> Visitor:
        """Identify the sender of a request by the IP address and the page's cookie, whose value nobody else knows."""
        headers = Headers(scope=scope)
        address = scope["client"][0] if scope.get("client") else ""
        forwarded = ",".join(headers.getlist("x-forwarded-for"))
        if self._behind_proxy and forwarded:
            address = forwarded.rpartition(",")[2].strip()  # the proxy's own word; others come from the visitor
        found = re.search(rf"(?:^|;) *{self._cookie}=([A-Za-z0-9_-]{{22,64}}) *(?:;|$)", headers.get("cookie", ""))
        return visitor_of(address, found[1] if found else "")

    def _named(self, scope: Scope) -> Visitor:
        """Identify the sender of a request as `visitor` does. Refused without a cookie: the page was never opened."""
        visitor = self.visitor(scope)
        if not visitor.cookie:
            raise Refused(403, "wanted this page's cookie, found none; allow cookies and load the page again")
        return visitor

    async def _open(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        visitor = self.visitor(scope)
        if scope["path"] == "/" and not visitor.cookie:
            cookie = f"{self._cookie}={secrets.token_urlsafe(24)}; Path=/; HttpOnly; SameSite=Strict"
            send.headers.append((b"set-cookie", cookie.encode()))
        async with AsyncExitStack() as turn:

            async def begun(message: Message) -> None:
                await turn.aclose()  # no turn lasts until a slow visitor has taken an answer
                await send(message)

            await turn.enter_async_context(self._opening.turn(visitor))
            await self._app(self._for_gradio(scope), receive, begun)

    async def _ask(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        visitor = self._named(scope)
        _check_length(headers, MAX_QUESTION, "question: wanted less text; shorten it")
        request = Request(scope, receive)
        async with place(self._questions_received, visitor, QUESTION_SECONDS):
            sent = await request.body()
        async with self._asking.turn(visitor):
            if await request.is_disconnected():
                raise ClientDisconnect
            body = check_question(sent, self._questions, lambda path: self._uploads.find(path, visitor.cookie))
            given = [(b"content-length", str(len(body)).encode())]
            first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

            async def written() -> Message:
                return first.pop() if first else await receive()

            answer: list[Message] = []

            async def keep(message: Message) -> None:
                answer.append(message)

            await self._app(self._for_gradio(scope, given), written, keep)
        if answer[0]["status"] != 200:
            said = json.loads(b"".join(message.get("body", b"") for message in answer)).get("error")
            raise Refused(422, said or "the page could not answer that; try another image or text")
        for message in answer:
            await send(message)

    async def _store(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        visitor = self._named(scope)
        if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refused(400, _NO_FORM)
        _check_length(headers, MAX_FORM, _TOO_LARGE)
        async with place(self._uploads_received, visitor, FORM_SECONDS):
            path = await self._received(Request(scope, receive), visitor)
        await JSONResponse([str(path)])(scope, receive, send)

    async def _received(self, request: Request, visitor: Visitor) -> Path:
        """Receive a form with one image in it, and store the image."""
        try:
            form = await request.form(max_files=1, max_fields=8, max_part_size=10_000)
        except ClientDisconnect:
            raise
        except Exception:  # of starlette and python_multipart, with words for programmers
            raise Refused(400, _NO_FORM) from None
        try:
            files = [value for value in form.getlist("files") if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise Refused(400, _NO_FORM)
            if (files[0].size or 0) > MAX_BYTES:
                raise Refused(413, _TOO_LARGE)
            return await run_in_threadpool(self._uploads.add, visitor, files[0].filename or "", files[0].file)
        finally:
            await form.close()

    async def _show(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        path = scope["path"].removeprefix(f"{API}/file=")
        try:
            file = await run_in_threadpool(self._uploads.find_shown, path, self._named(scope).cookie)
        except RunError:
            raise Refused(404, "this page has no such image") from None
        # Gradio writes WebP; an upload without an image's suffix is sent as bytes to be saved.
        is_image = file.suffix in SUFFIXES
        answer = FileResponse(
            file,
            media_type=None if is_image else "application/octet-stream",
            filename=file.name,
            content_disposition_type="inline" if is_image else "attachment",
            headers={"cache-control": "private, max-age=3600"},
        )
        kept = [(name, value) for name, value in scope["headers"] if name not in (b"range", b"if-range")]
        try:
            await answer({**scope, "headers": kept, "extensions": {}}, receive, send)
        except (RuntimeError, OSError):
            if send.started:
                raise
            raise Refused(404, "this page has no such image") from None


def is_local(host: str) -> bool:
    """True if no other machine reaches this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _plain(name: str) -> str:
    """Normalise a host name or address for comparison: lower case, no brackets, IPv4 inside IPv6 as IPv4."""
    name = name.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


_TOO_LARGE = f"image: wanted at most {MAX_BYTES // 10**6} MB, got more; choose a smaller file"


_NO_FORM = "upload: wanted a form with one image in it; choose an image"


def _check_length(headers: Headers, limit: int, sentence: str) -> None:
    """Refuse a request whose Content-Length exceeds `limit`; the server reads no more than that length.

    sentence: the answer to the visitor.
    """
    if int(headers.get("content-length", "0")) > limit:
        raise Refused(413, sentence)


class _Sent:
    """ASGI `send` that adds the page's headers to every answer, and knows whether the answer has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started = self.ended = False
        self.headers: list[tuple[bytes, bytes]] = list(SENT_HEADERS)

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            own = {name for name, _ in self.headers}
            kept = [
                (name, value)
                for name, value in message.get("headers", ())
                if name.lower() not in own and not name.lower().startswith(b"access-control-")
            ]
            message = {**message, "headers": [*kept, *self.headers]}
        elif message["type"] == "http.response.body":
            self.ended = not message.get("more_body", False)
        await self._send(message)

    async def end(self) -> None:
        """End an answer that has begun."""
        if self.started and not self.ended:
            await self({"type": "http.response.body", "body": b"", "more_body": False})
