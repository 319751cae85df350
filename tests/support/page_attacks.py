"""Attacks on the page of `mvlm app`, and checks of what they may not reach."""

import contextlib
import io
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from support import hostile_images
from support.visitor import API, ASK, Answer, Visitor

INNARDS = re.compile(
    r"0x[0-9a-f]{6,}|Traceback|pydantic|site-packages|/(usr|work|tmp|home|root|dev|proc)/|Errno|NoneType"
    r"|has no attribute|subscriptable|[A-Za-z]+Error|[A-Za-z]+Exception|codec"
)
"""Texts that no visitor may see."""
SECONDS = 10.0
"""A refusal takes a second at most on an idle machine."""


class Target(NamedTuple):
    """A running `mvlm app` to attack: its address, process, and a folder of secrets."""

    url: str
    pid: int
    folder: Path
    """A folder of this machine that the page has nothing to do with. It has secret.png, secret.txt and a FIFO, pipe."""

    def visitor(self, address: str = "127.0.0.1") -> Visitor:
        """Somebody who opens the page, from an address of 127.0.0.0/8."""
        return Visitor(self.url, address)

    def memory(self) -> float:
        """Resident MB of the page's process."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


Act = Callable[[Target, Visitor], str | None]
"""An attack. Returns what happened that must not, or None."""


class Attack(NamedTuple):
    """One request, or a few that belong together."""

    kind: str
    name: str
    act: Act


def png(side: int = 40) -> bytes:
    """An image of this side, of noise."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


IMAGE = object()
"""Stands in a question for an image that the visitor uploads before."""
META = {"meta": {"_type": "gradio.FileData"}}


def filled(value: Any, target: Target, visitor: Visitor) -> Any:
    """Value of a question in which an uploaded image stands for each IMAGE, and the folder of secrets for "FOLDER".

    A function (target, visitor) in it is replaced by its result.
    """
    if value is IMAGE:
        return visitor.uploaded("x.png", png())
    if isinstance(value, str):
        return value.replace("FOLDER", str(target.folder))
    if isinstance(value, list):
        return [filled(each, target, visitor) for each in value]
    if isinstance(value, dict):
        return {name: filled(each, target, visitor) for name, each in value.items()}
    return value(target, visitor) if callable(value) else value


def number_of(visitor: Visitor, asker: str) -> int:
    """Number of the function of the page (Gradio's id) that a button calls.

    asker: label of the button, or "KIND EVENT" for an event of the first component of a kind, such as "image select".
    """
    kind, _, event = asker.partition(" ")
    if not event:
        return visitor.event(asker)["id"]
    return next(
        e["id"] for e in visitor.events for at, name in e["targets"] if name == event and visitor.types.get(at) == kind
    )


CHOOSE, CLICK = "radio change", "image select"
"""Events of the page's tab Rebuild: the choice of a part shows an image as the model sees it, a click hides a patch."""


def judge_sentence(said: str) -> str | None:
    """Fault of an error message for a visitor: it shows innards, or is no line of at most 300 letters. None if good."""
    if found := INNARDS.search(said):
        return f"it shows {found[0]!r}: {said[:300]}"
    if not said.strip() or "\n" in said.strip() or len(said) > 300:
        return f"it is no sentence: {said[:300]!r}"
    return None


def asked(asker: str, *values: Any, **more: Any) -> Act:
    """Attack by a question that has to be refused, in one sentence, in time and without much memory.

    asker: see :func:`number_of`. values: arguments of the question, see :func:`filled`.
    """

    def act(target: Target, visitor: Visitor) -> str | None:
        given, number = filled(list(values), target, visitor), number_of(visitor, asker)
        before, began = target.memory(), time.monotonic()
        answered, said = visitor.ask_number(number, given, 2 * SECONDS, **more)
        if answered:
            return f"it was answered: {said[:200]}"
        if time.monotonic() - began > SECONDS:
            return f"it took {time.monotonic() - began:.1f} s"
        grown = target.memory() - before
        return judge_sentence(said) or (f"memory grew by {grown:.0f} MB" if grown > 100 else None)

    return act


def judge(answer: Answer, statuses: tuple[int, ...]) -> str | None:
    """Fault of an answer that has to have one of these HTTP statuses; None without one."""
    if answer.status not in statuses:
        return f"status {answer.status}: {answer.text[:200]}"
    if answer.seconds > SECONDS:
        return f"it took {answer.seconds:.1f} s"
    if answer.status == 200 or not (answer.status and answer.body):
        return None
    if answer.headers.get("content-type", "").startswith("application/json"):
        try:
            said = next(iter(json.loads(answer.body).values()))
        except (ValueError, KeyError, TypeError):
            return f"it has no sentence: {answer.text[:200]}"
        return judge_sentence(said if isinstance(said, str) else json.dumps(said, indent=1))
    return judge_sentence(answer.text)


def requested(method: str, path: str, statuses: tuple[int, ...], body: bytes = b"", **headers: str) -> Act:
    """Attack by a request whose answer has to have one of these HTTP statuses."""
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda target, visitor: judge(
        visitor.request(method, filled(path, target, visitor), body, given, 2 * SECONDS), statuses
    )


def attacks(kind: str, acts: Mapping[Any, Act]) -> Iterator[Attack]:
    """Attacks of a kind, by their names."""
    return (Attack(kind, str(name), act) for name, act in acts.items())


def paths() -> Iterator[Attack]:
    """Files that the visitor has not uploaded, in place of an image."""
    paths: list[Any] = [
        "FOLDER/secret.png", "FOLDER", "FOLDER/none.png", "FOLDER/../secret.png", "/etc/passwd", "/proc/self/environ",
        "file:///etc/passwd", "data:image/png;base64,AAAA", "http://127.0.0.1:1/x.png", "a\0b", "", "x" * 100_000, 5,
        None, ["a"], {"path": "a"}, True,
    ]  # fmt: skip
    secret = {"path": "FOLDER/secret.png"}
    values = {
        **{repr(path)[:40]: {"path": path, **META} for path in paths},
        "no meta": secret, "another meta": {**secret, "meta": {"_type": "x"}}, "meta null": {**secret, "meta": None},
        "a url beside no path": {"path": None, "url": "http://127.0.0.1:1/x.png", **META}, "a string": "/etc/passwd",
        "a list": ["/etc/passwd"], "a number": 7, "a stream": {"path": "/etc/passwd", "is_stream": True, **META},
        "another visitor's upload": {"path": lambda target, _: target.visitor().uploaded("x.png", png(41))["path"]},
        "below an upload": {"path": lambda _, he: f"{he.uploaded('x.png', png())['path']}/../../../secret.png"},
    }  # fmt: skip
    yield from attacks("path", {name: asked(CHOOSE, "nothing", value) for name, value in values.items()})
    yield from attacks("path", {
        "Fill": asked("Fill", secret, "a [MASK]"), "Classify": asked("Classify", secret, "a\nb", ""),
        "Look": asked("Look", secret, "a"), "Search": asked("Search", "a", secret),
    })  # fmt: skip


def traversals() -> Iterator[Attack]:
    files = (
        "/etc/passwd", "FOLDER/secret.png", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd",
        "..%2f..%2f..%2fetc%2fpasswd", "/etc/passwd%00.png", "%00", "/proc/self/mem", "/dev/zero", "FOLDER/pipe",
        "http://127.0.0.1:1/x", "http%3A%2F%2F127.0.0.1%3A1%2Fx", "file:///etc/passwd", "//etc/passwd", ".", "/",
        "x" * 5000,
    )  # fmt: skip
    return attacks("traversal", {path[:40]: requested("GET", f"{API}/file={path}", (404,)) for path in files})


def bodies() -> Iterator[Attack]:
    def large(target: Target, visitor: Visitor) -> str | None:
        before = target.memory()
        problem = judge(visitor.post(b'["' + b"a" * 60_000_000 + b'"]', 30), (413, 0))
        grown = target.memory() - before
        return problem or (f"memory grew by {grown:.0f} MB" if grown > 100 else None)

    def sent(body: bytes) -> Act:
        return lambda target, visitor: judge(visitor.post(body, 2 * SECONDS), (400, 413, 0))

    acts: dict[str, Act] = {
        "60 MB of JSON": large,
        "1 MB of brackets": sent(b"[" * 1_000_000),
        "1 MB of numbers": sent(b"[" + b"1," * 500_000 + b"1]"),
        "2 MB of digits": sent(b"1" * 2_000_000),
    }
    of_forms = "multipart/form-data; boundary=x"
    for method, path in (
        ("POST", f"{API}/upload"), ("GET", "/"), ("GET", "/config"), ("POST", "/"),
        ("GET", f"{API}/app_id"),
    ):  # fmt: skip
        headers = {"Content_Length": "30000000", "Content_Type": of_forms}
        acts[f"30 MB to {method} {path}"] = requested(method, path, (400, 404, 413, 0), b"a" * 30_000_000, **headers)
    field = b'--x\r\nContent-Disposition: form-data; name="'
    forms = {
        "no boundary": (b"abc", "multipart/form-data"),
        "an empty boundary": (b"--\r\n", "multipart/form-data; boundary="),
        "no file": (b"--x--\r\n", of_forms),
        "not multipart": (b"a=b", "application/x-www-form-urlencoded"),
        "a field in place of a file": (field + b'files"\r\n\r\nabc\r\n--x--\r\n', of_forms),
        "3,000 files": ((field + b'files"; filename="a"\r\n\r\na\r\n') * 3000 + b"--x--\r\n", of_forms),
        "3,000 fields": ((field + b'a"\r\n\r\na\r\n') * 3000 + b"--x--\r\n", of_forms),
        "1 MB of headers of a part": (
            b"--x\r\nContent-Disposition: " + b"a" * 1_000_000 + b"\r\n\r\na\r\n--x--\r\n", of_forms
        ),
        "another charset": (
            field + b'files"; filename="\xff\xfe"\r\n\r\na\r\n--x--\r\n', f"{of_forms}; charset=nonsense"
        ),
    }  # fmt: skip
    for name, (body, form) in forms.items():
        statuses = (200, 400, 413) if name == "another charset" else (400, 413)
        acts[f"a form with {name}"] = requested("POST", f"{API}/upload", statuses, body, Content_Type=form)
    return attacks("bodies", acts)


def question_head(visitor: Visitor, headers: str) -> bytes:
    """The head of a request that asks a question."""
    return (
        f"POST {ASK} HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\nCookie: {visitor.cookie}\r\n"
        f"Content-Type: application/json\r\n{headers}\r\n\r\n"
    ).encode()


def requests() -> Iterator[Attack]:
    """Requests that two programs may read in two ways, or that are no plain HTTP/1.1."""

    def refused(content: bytes | Callable[[Visitor], bytes], *statuses: int) -> Act:
        """An act: bytes that get one answer, with one of these states, behind which the connection ends."""

        def act(target: Target, visitor: Visitor) -> str | None:
            given = content if isinstance(content, bytes) else content(visitor)
            host = f"{visitor.host}:{visitor.port}".encode()
            with visitor.connect(5) as line:
                line.sendall(given.replace(b"HOST", host) + b"GET /config HTTP/1.1\r\nHost: " + host + b"\r\n\r\n")
                found = b""
                with contextlib.suppress(ConnectionError):
                    while more := line.recv(1 << 16):
                        found += more
            states = re.findall(rb"HTTP/1\.1 (\d+)", found)
            return None if [int(state) for state in states] in [[status] for status in statuses] else f"{states}"

        return act

    def posted(*headers: str, body: bytes = b"{}", statuses: tuple[int, ...] = (400,)) -> Act:
        return refused(lambda visitor: question_head(visitor, "\r\n".join(headers)) + body, *statuses)

    def got(line: bytes, *headers: bytes, statuses: tuple[int, ...] = (400,)) -> Act:
        return refused(b"\r\n".join((line, b"Host: HOST", *headers)) + b"\r\n\r\n", *statuses)

    chunks, get = "Transfer-Encoding: chunked", b"GET /config HTTP/1.1"
    yield from attacks("requests", {
        "a length and chunks": posted("Content-Length: 2", chunks, body=b"2\r\n{}\r\n0\r\n\r\n"),
        "chunks and a length": posted(chunks, "Content-Length: 2", body=b"2\r\n{}\r\n0\r\n\r\n"),
        "chunks alone": posted(chunks, body=b"2\r\n{}\r\n0\r\n\r\n", statuses=(411,)),
        "chunks with extensions and trailers":
            posted(chunks, body=b"2;a=b\r\n{}\r\n0\r\nContent-Length: 9\r\n\r\n", statuses=(411,)),
        "other codings": posted("Transfer-Encoding: gzip, chunked", statuses=(400, 411, 501)),
        "chunks twice": posted(chunks, chunks, statuses=(400, 411, 501)),
        "chunks, then identity": posted(chunks, "Transfer-Encoding: identity", statuses=(400, 411, 501)),
        "chunks of a GET": got(get, chunks.encode(), statuses=(411,)),
        "a length twice": posted("Content-Length: 2", "Content-Length: 2"),
        "two lengths": posted("Content-Length: 2", "Content-Length: 3"),
        "two lengths in a line": posted("Content-Length: 2, 2"),
        **{f"a length of {length!r}": posted(f"Content-Length: {length}")
           for length in ("-2", "+2", "2.0", "0x2", "2 2", "2,", "", "x", "\u0662", "2_0", "9" * 30)},
        "a length with a blank before its colon": posted("Content-Length : 2"),
        "a length in a folded line": posted("X: a", " b", "Content-Length: 2"),
        "a length behind a bare line feed": posted("X: a\nContent-Length: 2"),
        "a bare carriage return": posted("X: a\rContent-Length: 2", "Content-Length: 2"),
        "lines that end in line feeds": refused(b"GET /config HTTP/1.1\nHost: HOST\n\n", 400),
        "a header with a zero": got(get, b"X: a\0b"),
        "a header with a bell": got(get, b"X: a\x07b"),
        "a header without a name": got(get, b": a"),
        "a header without a colon": got(get, b"a"),
        "two hosts": got(get, b"Host: elsewhere"),
        "no host": refused(b"GET /config HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        "101 headers": got(get, *(b"X: a",) * 100, statuses=(431,)),
        "10,000 headers": got(get, *(b"X: a",) * 10_000, statuses=(431,)),
        "a header of 100,000 letters": got(get, b"X: " + b"a" * 100_000, statuses=(431,)),
        "an address of 100,000 letters": got(b"GET /" + b"a" * 100_000 + b" HTTP/1.1", statuses=(431,)),
        **{f"version {version}": got(f"GET /config {version}".encode(), statuses=(400, 505))
           for version in ("HTTP/9.9", "HTTP/2.0", "HTTP/0.9", "HTTP/1.2", "HTTP/1.10", "http/1.1", "HTTP/1")},
        "a preface of HTTP/2": refused(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, 505),
        "a hello of TLS": refused(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 500, 400),
    })  # fmt: skip
    long = "a" * 4000
    addresses = {
        f"/assets/{long}": 404, f"/static/{long}": 404, f"/assets/{'a/' * 90}": 404, "/assets/index.html/x": 404,
         "/assets/%00": 404, "/assets/%ff": 404, "/assets/a%0d%0ab": 404,
        "/assets/..%2f..%2fetc/passwd": 404, f"/{long}": 404, f"{API}/file={long}": 404, f"{API}/queue/join": 404,
        f"{API}/queue/data?" + "&".join(f"a{i}=1" for i in range(30)): 404, f"{API}/queue/data?session_hash=%00": 404,
        f"{API}/run/fill": 404, f"{ASK}/": 404, "http://elsewhere.example/config": 404, "*": 404, "//config": 404,
        "/config?" + "a=b&" * 1000: 200, "/?__theme=dark": 200,
    }  # fmt: skip
    yield from attacks(
        "addresses", {path[:50]: requested("GET", path, (status,)) for path, status in addresses.items()}
    )

    def reflected(target: Target, visitor: Visitor) -> str | None:
        headers = {
            "X-Forwarded-Host": "elsewhere.example", "X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.1",
            "X-Forwarded-Prefix": "/elsewhere", "Forwarded": "host=elsewhere.example;proto=https",
        }  # fmt: skip
        question = {"data": ["a", None], "fn_index": visitor.event("Search")["id"]}
        answers = [visitor.request("GET", path, headers=headers) for path in ("/", "/config", "/theme.css")]
        answers.append(visitor.request("POST", ASK, json.dumps(question).encode(),
                                       {**headers, "Content-Type": "application/json"}))  # fmt: skip
        states = [answer.status for answer in answers]
        found = [
            word for word in ("elsewhere", "https://127", "192.0.2.1") for answer in answers if word in answer.text
        ]
        return f"{states}, {found}" if found or states != [200] * 4 else None

    foreign = requested("POST", ASK, (403,), b"{}", Origin="https://elsewhere.example",
                        X_Forwarded_Host="elsewhere.example")  # fmt: skip
    yield from attacks("headers of proxies", {"reflected": reflected, "another site's question": foreign})


def images() -> Iterator[Attack]:
    given = {
        "1 x 40,000,000, of which 10 rows are there": hostile_images.png(1, 40_000_000, 10, depth=1, colour=0),
        "40,000,000 x 1": hostile_images.png(40_000_000, 1, 1, depth=1, colour=0),
        "30,000 x 30,000": hostile_images.png(30_000, 30_000, 1),
        "nothing": b"",
        "half of one": png(200)[:3000],
        "a program": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\nshowpage\n",
    }

    def uploaded(content: bytes) -> Callable[[Target, Visitor], Any]:
        return lambda target, visitor: visitor.uploaded("x.png", content)

    return attacks("images", {name: asked("Fill", uploaded(x), "a [MASK]") for name, x in given.items()})


def texts() -> Iterator[Attack]:
    given: dict[str, Any] = {
        "100,000 letters": "a" * 100_000, "only blanks": " \t\u2003\n", "half a letter of Unicode": "\ud800 [MASK]",
        "zeros": "\0" * 2000, "no [MASK]": "a circle", "300 [MASK]s": "[MASK] " * 140, "a number": 5, "a list": ["a"],
        "an object": {"a": "b"}, "true": True, "combining marks": "a" + "\u0301" * 3000,
    }  # fmt: skip

    def markup(target: Target, visitor: Visitor) -> str | None:
        text = '<img src=x onerror="alert(1)">'
        answered, said = visitor.ask("Fill", [visitor.uploaded("x.png", png()), text])
        return "markup came back" if answered or "<img" in said else judge_sentence(said)

    acts = {f"Fill: {name}": asked("Fill", IMAGE, text) for name, text in given.items()}
    labels, templates = "\n".join(str(i) for i in range(100)), "\n".join(["{}"] * 11)
    acts |= {"100 labels x 11 templates": asked("Classify", IMAGE, labels, templates)}
    acts |= {"300,000 labels": asked("Classify", IMAGE, "a\n" * 300_000, "")}
    return attacks("texts", acts | {"markup comes back as text": markup})


def forgeries() -> Iterator[Attack]:
    def path_of(visitor: Visitor, side: int = 40) -> str:
        return json.loads(visitor.upload("x.png", png(side)).body)[0]

    def no_cookie(target: Target, visitor: Visitor) -> str | None:
        return judge(visitor.request("GET", f"{API}/file={path_of(visitor)}", headers={"Cookie": ""}), (403, 404))

    def other_file(target: Target, visitor: Visitor) -> str | None:
        return judge(target.visitor().show(path_of(visitor, 43)), (404,))

    def answered(session: object) -> Act:
        """An act: a question with this session, which is nobody's, so that the question is as good as any other."""
        return lambda target, visitor: (
            None if visitor.ask("Search", ["a", None], session_hash=session)[0] else "refused"
        )

    def same_name(target: Target, visitor: Visitor) -> str | None:
        same = path_of(visitor, 44) == path_of(target.visitor(), 44)
        return "the name of an upload follows from its content" if same else None

    patches = ("2" * 16, "1" * 15, "", "1" * 10_000, "x", "\u0661" * 16, {"a": 1}, [True], 5)
    acts: dict[str, Act] = {
        "an upload, without the cookie": no_cookie,
        "an upload, by another visitor": other_file,
        "the name of another visitor's upload": same_name,
    }
    acts |= {
        f"session {session!r:.20}": answered(session) for session in ("a1", "a" * 1000, "../..", 5, None, {"a": 1})
    }
    acts |= {f"cookie {cookie[:20]!r}": requested("POST", ASK, (403,), b"{}", Cookie=cookie) for cookie in
             ("", "a", "x" * 9000, "mvlm-00000000=" + "a" * 32, ";" * 9000, "\u00ff=;;=")}  # fmt: skip
    acts |= {f"hidden patches {str(x)[:20]!r}": asked("Rebuild", IMAGE, x, "a", "b") for x in patches}
    return attacks("forgeries", acts)


@contextmanager
def _held(visitor: Visitor, content: bytes, count: int) -> Iterator[list[socket.socket]]:
    lines = []
    try:
        for _ in range(count):
            line = visitor.connect(5)
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
    def held(content: Callable[[Visitor], bytes], more: bytes = b"", seconds: float = 30.0) -> Act:
        def act(target: Target, visitor: Visitor) -> str | None:
            with _held(visitor, content(visitor), 20) as lines:
                began = time.monotonic()
                while lines and time.monotonic() - began < seconds:
                    time.sleep(1)
                    for line in list(lines):
                        if not _is_open(line):
                            lines.remove(line)
                            line.close()
                        elif more:
                            with contextlib.suppress(OSError):
                                line.sendall(more)
                return f"{len(lines)} of 20 are open after {seconds:.0f} s" if lines else None

        return act

    def whole(visitor: Visitor) -> bytes:
        return f"GET /config HTTP/1.1\r\nHost: {visitor.host}:{visitor.port}\r\n\r\n".encode()

    letters = held(lambda visitor: question_head(visitor, "Content-Length: 400"), b" ", 40.0)
    yield from attacks("slow connections", {
        "20 that send nothing": held(lambda visitor: b""),
        "20 that send a letter of a header each second": held(lambda visitor: b"GET / HTTP/1.1\r\nX: ", b"a"),
        "20 that send a letter of a body each second": letters,
        "20 that stay after their answer": held(whole),
    })  # fmt: skip


MAKERS = (
    paths, traversals, bodies, texts, images, forgeries, requests, slow_connections,
)  # fmt: skip
ATTACKS = [attack for maker in MAKERS for attack in maker()]
KINDS = tuple(dict.fromkeys(attack.kind for attack in ATTACKS))
