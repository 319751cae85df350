"""What an attacker may send to the page of `mvlm app`, and what must not happen."""

import io
import json
import os
import re
import secrets
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from support.visitor import API, Answer, Visitor

INNARDS = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|pydantic|site-packages|/(usr|work|tmp|home|root|dev|proc)/|Errno|NoneType"
    r"|has no attribute|subscriptable|[A-Za-z]+Error|[A-Za-z]+Exception|codec"
)
"""What no visitor may see."""
SECONDS = 10.0
"""A refusal takes a second at most on an idle machine."""


class Target(NamedTuple):
    """A running page."""

    url: str
    pid: int
    folder: Path
    """A folder of this machine that the page has nothing to do with. It has secret.png, secret.txt and a FIFO, pipe."""

    def visitor(self) -> Visitor:
        """Somebody who opens the page."""
        return Visitor(self.url)

    def memory(self) -> float:
        """Resident MB of the page's process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Attack(NamedTuple):
    """One request, or a few that belong together."""

    kind: str
    name: str
    act: Callable[[Target, Visitor], str | None]
    """Returns what happened that must not, or None."""


def png(side: int = 40) -> bytes:
    """An image of this side, of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def number_of(visitor: Visitor, kind: str, event: str) -> int:
    """Number of the question that this event of the first component of a kind asks."""
    return next(
        e["id"] for e in visitor.events for at, name in e["targets"] if name == event and visitor.types.get(at) == kind
    )


def judge(answered: bool, said: str, seconds: float) -> str | None:
    """What is wrong with the answer to a question that has to be refused."""
    if answered:
        return f"it was answered: {said[:200]}"
    if seconds > SECONDS:
        return f"it took {seconds:.1f} s"
    return judge_sentence(said)


def judge_sentence(said: str) -> str | None:
    """What is wrong with a sentence for a visitor."""
    if found := INNARDS.search(said):
        return f"it shows {found[0]!r}: {said[:300]}"
    if not said.strip() or "\n" in said.strip() or len(said) > 300:
        return f"it is no sentence: {said[:300]!r}"
    return None


def asked(label_or_number: Callable[[Visitor], int], values: Callable[[Target, Visitor], Any], **more: Any) -> Callable:
    """An act: a question that has to be refused."""

    def act(target: Target, visitor: Visitor) -> str | None:
        given = values(target, visitor)
        began = time.monotonic()
        answered, said = visitor.ask_number(label_or_number(visitor), given, 2 * SECONDS, **more)
        return judge(answered, said, time.monotonic() - began)

    return act


def joined(body: Callable[[Visitor], object], statuses: tuple[int, ...] = (400, 413)) -> Callable:
    """An act: the body of a question that has to be refused at once."""

    def act(target: Target, visitor: Visitor) -> str | None:
        answer = visitor.join(body(visitor), 2 * SECONDS)
        return judge_answer(answer, statuses)

    return act


def judge_answer(answer: Answer, statuses: tuple[int, ...]) -> str | None:
    """What is wrong with an answer that has to have one of these states."""
    if answer.status not in statuses:
        return f"status {answer.status}: {answer.text[:200]}"
    if answer.seconds > SECONDS:
        return f"it took {answer.seconds:.1f} s"
    if answer.status == 200:
        return None
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            said = json.loads(answer.body)["detail"]
        except (ValueError, KeyError, TypeError):
            return f"it has no sentence: {answer.text[:200]}"
        return judge_sentence(said if isinstance(said, str) else json.dumps(said, indent=1))
    return judge_sentence(answer.text) if answer.status and answer.body else None


def requested(method: str, path: str, statuses: tuple[int, ...], body: bytes = b"", **headers: str) -> Callable:
    """An act: a request that has to have one of these states."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}

    def act(target: Target, visitor: Visitor) -> str | None:
        said = path.replace("FOLDER", str(target.folder))
        return judge_answer(visitor.request(method, said, body, given, 2 * SECONDS), statuses)

    return act


def choice(visitor: Visitor) -> int:
    """The question of the radio button of Rebuild, which shows an image as the model sees it."""
    return number_of(visitor, "radio", "change")


def button(label: str) -> Callable[[Visitor], int]:
    """The question of a button."""
    return lambda visitor: visitor.event(label)["id"]


def paths_without_meta() -> Iterator[Attack]:
    kinds: dict[str, dict[str, Any]] = {
        "no meta": {},
        "meta of another type": {"meta": {"_type": "x"}},
        "empty meta": {"meta": {}},
        "meta null": {"meta": None},
    }
    for name, meta in kinds.items():
        for path in ("FOLDER/secret.png", "FOLDER/secret.txt", "FOLDER", "FOLDER/none.png"):

            def values(target: Target, visitor: Visitor, path: str = path, meta: dict = meta) -> list[Any]:
                return ["nothing", {"path": path.replace("FOLDER", str(target.folder)), **meta}]

            yield Attack("path without meta", f"{name}, {path}", asked(choice, values))
    for label, before, after in (
        ("Fill", [], ["a [MASK]"]),
        ("Classify", [], ["a\nb", ""]),
        ("Look", [], ["a"]),
        ("Search", ["a"], []),
    ):

        def with_image(target: Target, visitor: Visitor, before: list = before, after: list = after) -> list[Any]:
            return [*before, {"path": f"{target.folder}/secret.png"}, *after]

        yield Attack("path without meta", f"{label}", asked(button(label), with_image))
    yield Attack(
        "path without meta",
        "another visitor's upload",
        asked(
            choice, lambda target, visitor: ["nothing", {"path": target.visitor().uploaded("x.png", png(41))["path"]}]
        ),
    )
    yield Attack(
        "path without meta",
        "a path below an upload",
        asked(
            choice,
            lambda target, visitor: [
                "nothing",
                {"path": f"{visitor.uploaded('x.png', png())['path']}/../../../secret.png"},
            ],
        ),
    )


def files_with_meta() -> Iterator[Attack]:
    for path in (
        "/etc/passwd",
        "FOLDER/secret.png",
        "FOLDER/../secret.png",
        "/proc/self/environ",
        "file:///etc/passwd",
        "data:image/png;base64,AAAA",
        "http://127.0.0.1:1/x.png",
        "ftp://x/y",
        "a\0b",
        "",
        "x" * 100_000,
        5,
        None,
        ["a"],
        {"path": "a"},
        True,
    ):

        def values(target: Target, visitor: Visitor, path: Any = path) -> list[Any]:
            named = path.replace("FOLDER", str(target.folder)) if isinstance(path, str) else path
            return ["nothing", {"path": named, "meta": {"_type": "gradio.FileData"}}]

        yield Attack("FileData with meta", repr(path)[:40], asked(choice, values))
    for name, value in (
        ("a url beside no path", {"path": None, "url": "http://127.0.0.1:1/x.png"}),
        ("a string", "/etc/passwd"),
        ("a list", ["/etc/passwd"]),
        ("a number", 7),
        ("a stream", {"path": "/etc/passwd", "is_stream": True}),
    ):
        meta = {"meta": {"_type": "gradio.FileData"}} if isinstance(value, dict) else {}
        given = {**value, **meta} if isinstance(value, dict) else value
        yield Attack("FileData with meta", name, asked(choice, lambda target, visitor, given=given: ["nothing", given]))


def traversals() -> Iterator[Attack]:
    for path in (
        "/etc/passwd",
        "FOLDER/secret.png",
        "../../../../etc/passwd",
        "%2e%2e/%2e%2e/etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd",
        "/etc/passwd%00.png",
        "%00",
        "/proc/self/mem",
        "/dev/zero",
        "FOLDER/pipe",
        "http://127.0.0.1:1/x",
        "http%3A%2F%2F127.0.0.1%3A1%2Fx",
        "file:///etc/passwd",
        "//etc/passwd",
        ".",
        "/",
        "x" * 5000,
    ):
        yield Attack("traversal", f"file={path[:40]}", requested("GET", f"{API}/file={path}", (404,)))
    for path in (
        "/static/../../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/assets//etc/passwd",
        "/assets/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "/svelte/../../etc/passwd",
        f"{API}/file//etc/passwd",
        "/static/..\\..\\etc\\passwd",
        "/assets/%00",
        "//etc/passwd",
        "/../etc/passwd",
    ):
        yield Attack("traversal", path, requested("GET", path, (400, 403, 404)))


def devices() -> Iterator[Attack]:
    for path in ("FOLDER/pipe", "/dev/zero", "/dev/random", "/dev/stdin", "/proc/kmsg", "/dev/tty"):

        def values(target: Target, visitor: Visitor, path: str = path) -> list[Any]:
            return ["nothing", {"path": path.replace("FOLDER", str(target.folder))}]

        yield Attack("devices", path, asked(choice, values))


def bodies() -> Iterator[Attack]:
    def large(target: Target, visitor: Visitor) -> str | None:
        before = target.memory()
        problem = judge_answer(visitor.join(b'["' + b"a" * 60_000_000 + b'"]', 30), (413, 0))
        grown = target.memory() - before
        return problem or (f"memory grew by {grown:.0f} MB" if grown > 100 else None)

    def chunked(target: Target, visitor: Visitor) -> str | None:
        head = (
            f"POST {API}/queue/join HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\nCookie: {visitor.cookie}\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        chunk = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        return judge_answer(visitor.send(head.encode() + chunk * 40 + b"0\r\n\r\n", 30), (413, 0))

    yield Attack("bodies", "60 MB of JSON", large)
    yield Attack("bodies", "40 MB of JSON in chunks, without a length", chunked)
    for name, body in (
        ("1 MB of brackets", b"[" * 1_000_000),
        ("1 MB of numbers", b"[" + b"1," * 500_000 + b"1]"),
        ("2 MB of digits", b"1" * 2_000_000),
    ):
        yield Attack("bodies", name, joined(lambda visitor, body=body: body, (413, 0)))
    for method, path in (
        ("POST", f"{API}/upload"),
        ("GET", "/"),
        ("GET", "/config"),
        ("POST", "/"),
        ("GET", f"{API}/queue/data?session_hash=a"),
    ):
        yield Attack(
            "bodies",
            f"30 MB to {method} {path}",
            requested(
                method,
                path,
                (400, 404, 413, 0),
                b"a" * 30_000_000,
                Content_Length="30000000",
                Content_Type="multipart/form-data; boundary=x",
            ),
        )
    for name, length in (
        ("negative", "-1"),
        ("not a number", "x"),
        ("huge", "9" * 30),
        ("two", "5\r\nContent-Length: 6"),
    ):
        yield Attack(
            "bodies",
            f"a length that is {name}",
            requested("POST", f"{API}/queue/join", (400, 413), b"{}", Content_Length=length),
        )
    forms = {
        "no boundary": (b"abc", "multipart/form-data"),
        "an empty boundary": (b"--\r\n", "multipart/form-data; boundary="),
        "no file": (b"--x--\r\n", "multipart/form-data; boundary=x"),
        "not multipart": (b"a=b", "application/x-www-form-urlencoded"),
        "a field in place of a file": (
            b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n',
            "multipart/form-data; boundary=x",
        ),
        "3,000 files": (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\na\r\n' * 3000 + b"--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        "3,000 fields": (
            b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\na\r\n' * 3000 + b"--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        "1 MB of headers of a part": (
            b"--x\r\nContent-Disposition: " + b"a" * 1_000_000 + b"\r\n\r\na\r\n--x--\r\n",
            "multipart/form-data; boundary=x",
        ),
        "another charset": (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="\xff\xfe"\r\n\r\na\r\n--x--\r\n',
            "multipart/form-data; boundary=x; charset=nonsense",
        ),
    }
    for name, (body, kind) in forms.items():
        yield Attack(
            "bodies",
            f"a form with {name}",
            requested(
                "POST", f"{API}/upload", (200, 400, 413) if "charset" in name else (400, 413), body, Content_Type=kind
            ),
        )


def images() -> Iterator[Attack]:
    given = {
        "1 x 40,000,000, of which 10 rows are there": thin_png(1, 40_000_000, 1, 10),
        "40,000,000 x 1": thin_png(40_000_000, 1, 1, 1),
        "30,000 x 30,000": thin_png(30_000, 30_000, 24, 1),
        "nothing": b"",
        "half of one": png(200)[:3000],
        "a program": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
    }
    for name, content in given.items():

        def act(target: Target, visitor: Visitor, content: bytes = content) -> str | None:
            before, began = target.memory(), time.monotonic()
            answered, said = visitor.ask("Fill", [visitor.uploaded("x.png", content), "a [MASK]"], 2 * SECONDS)
            grown = target.memory() - before
            problem = judge(answered, said, time.monotonic() - began)
            return problem or (f"memory grew by {grown:.0f} MB" if grown > 100 else None)

        yield Attack("images", name, act)


def thin_png(width: int, height: int, bits: int, rows: int) -> bytes:
    """A PNG of grey or, of 24 bits, RGB pixels whose header says so much and which holds only the first rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8 if bits == 24 else bits, 2 if bits == 24 else 0, 0, 0, 0)
    data = zlib.compress(bytes((1 + -(-width * bits // 8)) * rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def texts() -> Iterator[Attack]:
    given: dict[str, Any] = {
        "100,000 letters": "a" * 100_000,
        "only blanks": " \t\u2003\n",
        "half a letter of Unicode": "\ud800 [MASK]",
        "zeros": "\0" * 2000,
        "no [MASK]": "a circle",
        "300 [MASK]s": "[MASK] " * 140,
        "a number": 5,
        "a list": ["a"],
        "an object": {"a": "b"},
        "true": True,
        "combining marks": "a" + "\u0301" * 3000,
    }
    for name, text in given.items():
        yield Attack(
            "texts",
            f"Fill: {name}",
            asked(button("Fill"), lambda target, visitor, text=text: [visitor.uploaded("x.png", png()), text]),
        )

    def markup(target: Target, visitor: Visitor) -> str | None:
        text = '<img src=x onerror="alert(1)">'
        answered, said = visitor.ask("Fill", [visitor.uploaded("x.png", png()), text])
        return "markup came back" if answered or "<img" in said else judge_sentence(said)

    yield Attack("texts", "markup comes back as text", markup)


def products() -> Iterator[Attack]:
    labels, templates = "\n".join(f"label {i}" for i in range(100)), "\n".join(f"{'{}'} of {i}" for i in range(100))
    for name, first, second in (
        ("100 x 100", labels, templates),
        ("100 x 11", labels, "\n".join(["{}"] * 11)),
        ("101 labels", labels + "\nx", ""),
        ("one label", "a\na", ""),
        ("101 templates", "a\nb", templates + "\n{}"),
        ("300,000 lines", "a\n" * 300_000, ""),
        ("no label", "\n\n", ""),
        ("fields of a template", "a\nb", "{0.__class__}"),
    ):

        def values(target: Target, visitor: Visitor, first: str = first, second: str = second) -> list[Any]:
            return [visitor.uploaded("x.png", png()), first, second]

        yield Attack("labels x templates", name, asked(button("Classify"), values))


def origins() -> Iterator[Attack]:
    for origin in (
        "http://elsewhere.example",
        "null",
        "https://127.0.0.1",
        "http://127.0.0.1:1",
        "http://localhost:1",
        "http://127.0.0.1.elsewhere.example",
        "file://",
        "x",
    ):
        for method, path in (("POST", f"{API}/queue/join"), ("POST", f"{API}/upload"), ("GET", "/config")):
            yield Attack(
                "origin and host",
                f"{method} {path} from {origin}",
                requested(method, path, (403,), b"{}" if method == "POST" else b"", Origin=origin),
            )
    for host in (
        "elsewhere.example",
        "169.254.169.254",
        "127.0.0.1@elsewhere.example",
        "127.0.0.1,elsewhere.example",
        "a b",
        "elsewhere.example:80:80",
        "[::2]",
        "x" * 3000,
    ):
        yield Attack("origin and host", f"Host: {host[:30]}", requested("GET", "/config", (400,), Host=host))

    def framed(target: Target, visitor: Visitor) -> str | None:
        headers = visitor.request("GET", "/").headers
        if headers.get("x-frame-options") != "DENY" or headers.get("x-content-type-options") != "nosniff":
            return "another site may frame it, or guess types"
        return None if "frame-ancestors 'none'" in headers.get("content-security-policy", "") else "no frame-ancestors"

    yield Attack("origin and host", "framed by another site", framed)


def routes_off() -> Iterator[Attack]:
    for path in (
        "/openapi.json",
        f"{API}/openapi.json",
        "/docs",
        "/redoc",
        "/monitoring",
        "/monitoring/summary",
        "/monitoring/x",
        f"{API}/info",
        f"{API}/info/?all_endpoints=true",
        f"{API}/deep_link?session_hash=a",
        f"{API}/proxy=https://x.hf.space/y",
        f"{API}/custom_component/a/client/b/c",
        f"{API}/user",
        f"{API}/token",
        f"{API}/runs",
        f"{API}/run-history/buckets",
        f"{API}/startup-events",
        f"{API}/queue/status",
        "/logout",
        f"{API}/login_check",
        f"{API}/dev/reload",
        f"{API}/vibe-code/",
        f"{API}/stream/a/b/1/playlist.m3u8",
        f"{API}/call/x/y",
        "/robots.txt",
        "/manifest.json",
        "/pwa_icon/9999",
        f"{API}/mcp",
        f"{API}/heartbeat/a",
    ):
        yield Attack("routes that are off", f"GET {path}", requested("GET", path, (404,)))
    for path in (
        "/login",
        f"{API}/run/predict",
        f"{API}/api/predict",
        f"{API}/call/predict",
        f"{API}/component_server",
        f"{API}/cancel",
        f"{API}/reset",
        f"{API}/process_recording",
        f"{API}/vibe-edit/",
        f"{API}/vibe-code/",
        f"{API}/run-history/connect",
        f"{API}/stream/a",
        f"{API}/stream/a/close",
    ):
        yield Attack(
            "routes that are off",
            f"POST {path}",
            requested("POST", path, (404,), b'{"data": []}', Content_Type="application/json"),
        )
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "NONSENSE"):
        yield Attack("routes that are off", f"{method} /", requested(method, "/", (400, 404)))


def odd_json() -> Iterator[Attack]:
    given: dict[str, Callable[[Visitor], object]] = {
        "nothing": lambda v: b"",
        "no JSON": lambda v: b"{",
        "a list": lambda v: [],
        "null": lambda v: None,
        "a number": lambda v: 5,
        "no UTF-8": lambda v: b'"\xff"',
        "deep": lambda v: b"[" * 90_000 + b"]" * 90_000,
        "deep objects": lambda v: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "NaN": lambda v: b'{"data": [NaN]}',
        "100,000 digits": lambda v: b'{"fn_index": ' + b"9" * 100_000 + b"}",
        "keys twice": lambda v: b'{"data": [], "data": 5, "fn_index": 0, "fn_index": 0, "session_hash": "a"}',
        "an object of nothing": lambda v: {},
        "values of another kind": lambda v: _body(v, data="abc"),
        "values of null": lambda v: _body(v, data=None),
        "too few values": lambda v: _body(v, data=["a"]),
        "too many values": lambda v: _body(v, data=["a", None, None]),
        "10,000 values": lambda v: _body(v, data=[1] * 10_000),
    }
    for name, body in given.items():
        yield Attack("odd JSON", name, joined(body))
    for number in (99, -1, 10**9, 1.5, "0", None, True, [0], {"a": 0}, "__class__"):
        yield Attack("odd JSON", f"question {number!r}", joined(lambda v, number=number: _body(v, fn_index=number)))
    for session in (None, "", 5, "a" * 10_000, "../x", "a b", "\0", ["a"], {"a": 1}):
        yield Attack(
            "odd JSON",
            f"session {str(session)[:20]!r}",
            joined(lambda v, session=session: _body(v, session_hash=session)),
        )


def _body(visitor: Visitor, **changed: Any) -> dict[str, Any]:
    return {
        "data": ["a", None],
        "fn_index": visitor.event("Search")["id"],
        "session_hash": secrets.token_hex(6),
        **changed,
    }


def filenames() -> Iterator[Attack]:
    for name in (
        "",
        ".",
        "..",
        "/",
        "../../x.png",
        "/etc/x.png",
        "a\\..\\b.png",
        "x" * 5000 + ".png",
        "\u202egnp.x",
        "a%2f..%2fb.png",
        ".htaccess",
        "nul\0.png",
        "con",
        "x.html",
        "x.svg",
        "-rf",
        "a\rb.png",
        "$(id).png",
    ):

        def act(target: Target, visitor: Visitor, name: str = name) -> str | None:
            answer = visitor.upload(name, png())
            if answer.status != 200:
                return judge_answer(answer, (400,))
            path = json.loads(answer.body)[0]
            if os.path.realpath(path) != path or not Path(path).is_file():
                return f"it is stored as {path}"
            shown = visitor.show(path)
            kind = shown.headers.get("content-type", "")
            attached = shown.headers.get("content-disposition", "").startswith("attachment")
            if shown.status != 200 or not (kind == "image/png" or (kind == "application/octet-stream" and attached)):
                return f"it is served as {kind}, status {shown.status}"
            return None if Path(path).stem == "image" or name in ("x",) else f"the visitor named it: {path[-60:]}"

        yield Attack("filenames", repr(name)[:40], act)


def forgeries() -> Iterator[Attack]:
    def other_stream(target: Target, visitor: Visitor) -> str | None:
        session = secrets.token_hex(6)
        visitor.join(_body(visitor, session_hash=session))
        found = target.visitor().stream(session, 5)
        return f"another visitor read {len(found)} events" if found else None

    def other_session(target: Target, visitor: Visitor) -> str | None:
        session = secrets.token_hex(6)
        visitor.join(_body(visitor, session_hash=session))
        other = target.visitor()
        return judge_answer(other.join(_body(other, session_hash=session)), (400,))

    def unknown(target: Target, visitor: Visitor) -> str | None:
        answer = visitor.request("GET", f"{API}/queue/data?session_hash={secrets.token_hex(6)}", seconds=15)
        return judge_answer(answer, (404,))

    def no_cookie(target: Target, visitor: Visitor) -> str | None:
        path = json.loads(visitor.upload("x.png", png()).body)[0]
        answer = visitor.request("GET", f"{API}/file={path}", headers={"Cookie": ""})
        return judge_answer(answer, (403, 404))

    def other_file(target: Target, visitor: Visitor) -> str | None:
        path = json.loads(visitor.upload("x.png", png(43)).body)[0]
        return judge_answer(target.visitor().show(path), (404,))

    def same_name(target: Target, visitor: Visitor) -> str | None:
        one, two = (json.loads(each.upload("x.png", png(44)).body)[0] for each in (visitor, target.visitor()))
        return "the name of an upload follows from its content" if one == two else None

    def rebuilt(hidden: Any) -> Callable[[Target, Visitor], str | None]:
        return asked(button("Rebuild"), lambda target, visitor: [visitor.uploaded("x.png", png()), hidden, "a", "b"])

    yield Attack("forged session", "the answers of another visitor", other_stream)
    yield Attack("forged session", "a question in another visitor's session", other_session)
    yield Attack("forged session", "a session that nobody has", unknown)
    yield Attack("forged session", "an upload, without the cookie", no_cookie)
    yield Attack("forged session", "an upload, by another visitor", other_file)
    yield Attack("forged session", "the name of another visitor's upload", same_name)
    for query in ("", "?session_hash=", "?session_hash=a&session_hash=b", "?session_hash=..%2f", "?session_hash=%00"):
        yield Attack("forged session", f"a stream for {query!r}", requested("GET", f"{API}/queue/data{query}", (404,)))
    for hidden in ("2" * 16, "1" * 15, "", "1" * 10_000, "x", "\u0661" * 16, {"a": 1}, [True], 5):
        yield Attack("forged session", f"hidden patches {str(hidden)[:20]!r}", rebuilt(hidden))


def clicks() -> Iterator[Attack]:
    for event in (
        None,
        {},
        [],
        "x",
        5,
        {"index": None},
        {"index": []},
        {"index": [1]},
        {"index": [1, 2, 3]},
        {"index": ["a", "b"]},
        {"index": [10**30, 1]},
        {"index": [True, False]},
        {"index": {"x": 1}},
        {"target": "x"},
        {"index": [[1], [2]]},
    ):

        def act(target: Target, visitor: Visitor, event: Any = event) -> str | None:
            image = visitor.uploaded("x.png", png())
            number = number_of(visitor, "image", "select")
            began = time.monotonic()
            answered, said = visitor.ask_number(number, ["0" * 16, image], 2 * SECONDS, event_data=event)
            return judge(answered, said, time.monotonic() - began)

        yield Attack("event data", str(event)[:40], act)


@contextmanager
def _held(visitor: Visitor, content: bytes, count: int) -> Iterator[list[socket.socket]]:
    lines = []
    try:
        for _ in range(count):
            line = socket.create_connection((visitor.host, visitor.port), timeout=5)
            line.sendall(content)
            lines.append(line)
        yield lines
    finally:
        for line in lines:
            line.close()


def _is_open(line: socket.socket) -> bool:
    line.setblocking(False)
    try:
        while line.recv(1 << 16):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def slow_connections() -> Iterator[Attack]:
    def held(content: Callable[[Visitor], bytes], more: bytes = b"", seconds: float = 30.0) -> Callable:
        def act(target: Target, visitor: Visitor) -> str | None:
            with _held(visitor, content(visitor), 20) as lines:
                began = time.monotonic()
                while time.monotonic() - began < seconds:
                    time.sleep(1)
                    for line in list(lines):
                        if not _is_open(line):
                            lines.remove(line)
                            line.close()
                        elif more:
                            with _ignored():
                                line.sendall(more)
                    if not lines:
                        return None
                return f"{len(lines)} of 20 are open after {seconds:.0f} s"

        return act

    def head(visitor: Visitor, length: int) -> bytes:
        return (
            f"POST {API}/queue/join HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\nCookie: {visitor.cookie}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        ).encode()

    def crowd(target: Target, visitor: Visitor) -> str | None:
        with _held(visitor, b"GET / HTTP/1.1\r\n", 400) as lines:
            time.sleep(1)
            answer = visitor.request("GET", "/config", seconds=10)
            still = sum(_is_open(line) for line in lines)
        if answer.status != 200:
            return f"the page is closed to others: status {answer.status}"
        return f"{still} of 400 connections are open" if still > 300 else None

    yield Attack("slow connections", "20 that send nothing", held(lambda visitor: b""))
    yield Attack(
        "slow connections",
        "20 that send a letter of a header each second",
        held(lambda visitor: b"GET / HTTP/1.1\r\nX: ", b"a"),
    )
    yield Attack(
        "slow connections",
        "20 that send a letter of a body each second",
        held(lambda visitor: head(visitor, 400), b" ", 40.0),
    )
    yield Attack(
        "slow connections",
        "20 that stay after their answer",
        held(lambda visitor: f"GET /config HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\n\r\n".encode()),
    )
    yield Attack("crowds", "400 connections at once", crowd)


class _ignored:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is not None and issubclass(kind, OSError)


def abandoned() -> Iterator[Attack]:
    def flood(target: Target, visitor: Visitor) -> str | None:
        labels, templates = "\n".join(str(i) for i in range(100)), "\n".join(["a {}"] * 10)
        image = visitor.uploaded("x.png", png(900))
        number = visitor.event("Classify")["id"]
        lines = []
        try:
            for _ in range(120):
                session = secrets.token_hex(6)
                question = {"data": [image, labels, templates], "fn_index": number, "session_hash": session}
                body = json.dumps(question).encode()
                head = (
                    f"POST {API}/queue/join HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\n"
                    f"Cookie: {visitor.cookie}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                line = socket.create_connection((visitor.host, visitor.port), timeout=20)
                line.sendall(head.encode() + body[:-1])
                lines.append(line)
            for line in lines:  # all at once: no machine answers as fast
                line.sendall(b"}")
            states = [line.recv(1 << 12).split(b" ", 2)[1] for line in lines]
        finally:
            for line in lines:
                line.close()
        if states.count(b"503") < 40:
            return f"the queue has no end: {states.count(b'200')} questions wait"
        began = time.monotonic()
        while time.monotonic() - began < 20:
            if visitor.ask("Classify", [image, "a\nb", ""])[0]:
                return None
            time.sleep(0.5)
        return "nobody else was answered within 20 s"

    yield Attack("abandoned questions", "120 questions at once whose visitor left", flood)


ATTACKS = [
    *paths_without_meta(),
    *files_with_meta(),
    *traversals(),
    *bodies(),
    *texts(),
    *images(),
    *products(),
    *origins(),
    *routes_off(),
    *odd_json(),
    *filenames(),
    *forgeries(),
    *clicks(),
    *devices(),
    *slow_connections(),
    *abandoned(),
]
KINDS = tuple(dict.fromkeys(attack.kind for attack in ATTACKS))
