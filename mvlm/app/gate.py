"""What stands before Gradio: routes, hosts, sizes and times of requests are checked, then Gradio sees them."""

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Sequence
from functools import partial
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mvlm.app.questions import SESSION, Question, check_question
from mvlm.app.uploads import MAX_BYTES, SUFFIXES, Uploads
from mvlm.app.visitors import Visitors
from mvlm.errors import RunError

API = "/gradio_api"
PAGES = ("/", "/config", "/theme.css", "/favicon.ico", f"{API}/app_id")
"""Routes of Gradio that the page needs, with GET and HEAD. They get no query."""
FILES = re.compile(r"/(assets|static)/[A-Za-z0-9_@~+-][A-Za-z0-9_@~+./-]*")
"""Files of Gradio's package that are served."""
MAX_QUESTION = 500_000
"""Bytes of a question: two fields of 100 lines of 1,000 characters are less, in most languages."""
MAX_FORM = MAX_BYTES + 100_000
"""Bytes of a form with an image in it."""
QUESTION_SECONDS, FORM_SECONDS, STREAM_SECONDS = 20.0, 120.0, 600.0
"""Longest time that a question or an upload takes to arrive, and that a stream of answers is open."""
MAX_UPLOADS = 8
"""Uploads that are received at once."""
ASKED = "x-mvlm-asked"
"""Header, for the page alone, that says when a question was asked, by `time.monotonic`."""
KEPT_HEADERS = (
    b"accept", b"accept-encoding", b"content-type", b"host", b"if-modified-since", b"if-none-match", b"user-agent",
    b"x-forwarded-host", b"x-forwarded-proto",
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
log = logging.getLogger(__name__)


class Refused(Exception):
    """A request that is not answered, with the status and the sentence that the visitor gets."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status, self.sentence = status, sentence


class Gate:
    """An ASGI app around Gradio's. It lets through what the page itself sends, and nothing else.

    It answers uploads and requests for images itself, so that a path is a key into what the page stored.

    Args:
        app: Gradio's.
        questions: the page's.
        host: the address that is listened on.
        names: further names of this machine.
    """

    def __init__(
        self,
        app: ASGIApp,
        questions: dict[int, Question],
        uploads: Uploads,
        visitors: Visitors,
        host: str,
        names: Sequence[str] = (),
    ) -> None:
        self._app, self._questions, self._uploads, self._visitors = app, questions, uploads, visitors
        self._names = {_plain(name) for name in (*LOCAL, host, *names)}
        self._is_local = is_local(host)
        if not self._is_local:
            self._names.add(_plain(socket.gethostname()))
        self._uploading = 0
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
        except _Gone:
            pass
        except Exception as error:
            log.warning("%s %s: %s", scope["method"], ascii(scope["path"][:80]), _line(error))
            await self._refuse(scope, receive, sent, Refused(500, "the page could not answer that; load it again"))

    async def _refuse(self, scope: Scope, receive: Receive, sent: "_Sent", refusal: Refused) -> None:
        if sent.started:
            await sent.end()
            return
        if scope["path"] == f"{API}/queue/join":  # shown by Gradio's JavaScript
            answer: Response = JSONResponse({"detail": refusal.sentence}, refusal.status)
        else:
            answer = PlainTextResponse(refusal.sentence, refusal.status)
        await answer(scope, receive, sent)

    async def _answer(self, scope: Scope, receive: Receive, send: "_Sent") -> None:
        headers = Headers(scope=scope)
        self._check_host(scope, headers)
        _check_origin(headers)
        method, path = scope["method"], scope["path"]
        if method == "POST" and path == f"{API}/queue/join":
            await self._ask(scope, receive, send, headers)
        elif method == "POST" and path == f"{API}/upload":
            await self._store(scope, receive, send, headers)
        elif method in ("GET", "HEAD"):
            if headers.get("transfer-encoding") or headers.get("content-length", "0") != "0":
                raise Refused(400, "wanted a request without a body")
            if path.startswith(f"{API}/file="):
                await self._show(scope, receive, send, headers)
            elif path == f"{API}/upload_progress":
                # The page stores an upload in one go, so that there is no progress to tell.
                await Response('data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
            elif path == f"{API}/queue/data":
                await self._stream(scope, receive, send, headers)
            elif path in PAGES or (FILES.fullmatch(path) and ".." not in path):
                if path == "/":
                    self._greet(send, headers)
                await self._app(_for_gradio(scope), receive, send)
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

    def _visitor(self, headers: Headers) -> str:
        """The name that the page gave to the visitor's browser, in a cookie. Nobody else knows it."""
        cookies: SimpleCookie = SimpleCookie()
        with contextlib.suppress(CookieError):
            cookies.load(headers.get("cookie", "")[:4000])
        found = cookies.get(self._cookie)
        if found is None or not re.fullmatch(r"[A-Za-z0-9_-]{22,64}", found.value):
            raise Refused(403, "wanted this page's cookie, found none; allow cookies and load the page again")
        return found.value

    def _greet(self, send: "_Sent", headers: Headers) -> None:
        """Name a visitor who has no name yet."""
        try:
            self._visitor(headers)
        except Refused:
            cookie = f"{self._cookie}={secrets.token_urlsafe(24)}; Path=/; HttpOnly; SameSite=Strict"
            send.headers.append((b"set-cookie", cookie.encode()))

    async def _ask(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        visitor = self._visitor(headers)
        body = await _body(receive, headers, MAX_QUESTION, QUESTION_SECONDS)
        asked = check_question(body, self._questions, lambda path: self._uploads.find(path, visitor))
        self._visitors.join(asked.session, visitor)
        given = [(b"content-length", str(len(asked.body)).encode()), (ASKED.encode(), str(time.monotonic()).encode())]
        await self._app(_for_gradio(scope, given), _once(asked.body, receive), send)

    async def _stream(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        """Answers of a session, until they are given, the visitor leaves, or time is over."""
        query = parse_qsl(scope["query_string"].decode("latin-1"), max_num_fields=20)
        sessions = [value for name, value in query if name == "session_hash"]
        if len(sessions) != 1 or not SESSION.fullmatch(sessions[0]):
            raise Refused(404, "this page has no such session; load it again")
        if not self._visitors.owns(sessions[0], self._visitor(headers)):
            raise Refused(404, "this page has no such session; load it again")
        own = {**_for_gradio(scope), "query_string": f"session_hash={sessions[0]}".encode()}
        with self._visitors.listening(sessions[0]):
            try:
                async with asyncio.timeout(STREAM_SECONDS):
                    await self._app(own, receive, send)
            except TimeoutError:
                await send.end()

    async def _store(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        visitor = self._visitor(headers)
        if not headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refused(400, "upload: wanted a form with one image in it; choose an image")
        if self._uploading >= MAX_UPLOADS:
            raise Refused(503, "upload: the page is busy; try again")
        _check_length(headers, MAX_FORM)
        self._uploading += 1
        try:
            async with asyncio.timeout(FORM_SECONDS):
                limited = _Limited(receive, MAX_FORM)
                try:
                    form = await Request(scope, limited).form(max_files=1, max_fields=8, max_part_size=10_000)
                except (Refused, _Gone, asyncio.CancelledError):
                    raise
                except Exception:  # of starlette and python_multipart, with words for programmers
                    raise Refused(400, "upload: wanted a form with one image in it; choose an image") from None
                try:
                    files = [value for value in form.getlist("files") if isinstance(value, UploadFile)]
                    if len(files) != 1:
                        raise Refused(400, "upload: wanted a form with one image in it; choose an image")
                    if (files[0].size or 0) > MAX_BYTES:
                        raise Refused(413, _TOO_LARGE)
                    store = partial(self._uploads.add, visitor, files[0].filename or "", files[0].file)
                    path = await run_in_threadpool(store)
                finally:
                    await form.close()
        except TimeoutError:
            raise Refused(408, "upload: wanted it sooner; try again") from None
        finally:
            self._uploading -= 1
        await JSONResponse([str(path)])(scope, receive, send)

    async def _show(self, scope: Scope, receive: Receive, send: "_Sent", headers: Headers) -> None:
        path = scope["path"].removeprefix(f"{API}/file=")
        try:
            file = await run_in_threadpool(self._uploads.find_shown, path, self._visitor(headers))
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
    """A host as it is compared: lower case, no brackets, IPv4 inside IPv6 as IPv4."""
    name = name.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return name
    return str(getattr(address, "ipv4_mapped", None) or address)


def _check_origin(headers: Headers) -> None:
    """Refuse what a page of another site sends here. A browser sends it without asking, and hides only the answer."""
    origin = headers.get("origin")
    # Behind a proxy, as in an editor in the browser, the page has the proxy's name. No page can forge that header.
    own = [headers.get("host"), headers.get("x-forwarded-host")]
    if origin is not None and origin.partition("://")[2] not in own:
        raise Refused(403, "a page of another site may not send here")


def _for_gradio(scope: Scope, headers: Sequence[tuple[bytes, bytes]] = ()) -> Scope:
    """The scope with the headers that Gradio needs, and without a query."""
    kept = [
        (name, value)
        for name, value in scope["headers"]
        if name in KEPT_HEADERS and (not name.startswith(b"x-") or HOST.fullmatch(value.decode("latin-1")))
    ]
    return {**scope, "headers": [*kept, *headers], "query_string": b"", "root_path": ""}


_TOO_LARGE = f"image: wanted at most {MAX_BYTES // 10**6} MB, got more; choose a smaller file"


def _check_length(headers: Headers, limit: int) -> None:
    length = headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit() or len(length) > 12:
        raise Refused(400, "wanted a length in bytes; load the page again")
    if int(length) > limit:
        raise Refused(413, _TOO_LARGE if limit == MAX_FORM else "question: wanted less text; shorten it")


async def _body(receive: Receive, headers: Headers, limit: int, seconds: float) -> bytes:
    """The whole body of a request, in bounded memory and time, whatever length it claims."""
    _check_length(headers, limit)
    limited, body = _Limited(receive, limit), bytearray()
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await limited()
                if message["type"] == "http.disconnect":
                    raise _Gone
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise Refused(408, "question: wanted it sooner; ask again") from None


class _Gone(Exception):
    """The visitor closed the connection."""


class _Limited:
    """A `receive` that counts the bytes of a body, and refuses more than the limit."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit, self._left = receive, limit, limit

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise Refused(413, _TOO_LARGE if self._limit == MAX_FORM else "question: wanted less text; shorten it")
        return message


def _once(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, then what comes after it."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


class _Sent:
    """A `send` that adds the page's headers, and knows whether an answer has begun."""

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


def _line(error: BaseException) -> str:
    """An error in one line, for the terminal."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
