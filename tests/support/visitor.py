"""A visitor of the page of `mvlm app` who sends bytes through a socket, with neither a browser nor Gradio's client."""

import contextlib
import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

API = "/gradio_api"
ASK = f"{API}/run/predict"


class Answer(NamedTuple):
    """Answer of a server. `status` is 0 if the server closed the connection without an answer."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    @property
    def text(self) -> str:
        """The body as a text."""
        return self.body.decode("utf-8", "replace")


class Visitor:
    """A visitor who has opened the page once, so that its cookie is known.

    Args:
        address: whence the visitor comes, one of 127.0.0.0/8.
    """

    def __init__(self, url: str, address: str = "127.0.0.1") -> None:
        parts = urlsplit(url)
        self.host, self.port, self.address = parts.hostname or "", parts.port or 80, address
        self.cookie = ""
        answer = self.request("GET", "/")
        self.cookie = answer.headers.get("set-cookie", "").partition(";")[0]
        config = json.loads(self.request("GET", "/config").body)
        self.labels = {c["id"]: c["props"].get("value") for c in config["components"] if c["type"] == "button"}
        self.types = {c["id"]: c["type"] for c in config["components"]}
        self.events: list[dict[str, Any]] = config["dependencies"]
        self.examples = [c["props"]["value"]["path"] for c in config["components"]
                         if c["type"] == "image" and c["props"].get("value")]  # fmt: skip

    def connect(self, seconds: float = 60.0) -> socket.socket:
        """A connection to the page."""
        return socket.create_connection((self.host, self.port), timeout=seconds, source_address=(self.address, 0))

    def send(self, content: bytes, seconds: float = 60.0) -> Answer:
        """Send bytes, and read until the server closes, or has sent as much as it said."""
        began = time.monotonic()
        received = b""
        with self.connect(seconds) as line:
            with contextlib.suppress(OSError):  # it may answer before it has read everything
                line.sendall(content)
            while time.monotonic() - began < seconds:
                try:
                    line.settimeout(max(0.01, seconds - (time.monotonic() - began)))
                    more = line.recv(1 << 16)
                except OSError:
                    break
                received += more
                if not more or _is_whole(received):
                    break
        return _parse(received, time.monotonic() - began)

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, seconds: float = 60.0
    ) -> Answer:
        """Send one request. Headers replace those of a browser; an empty value leaves one out."""
        given = {
            "Host": f"{self.host}:{self.port}",
            "Cookie": self.cookie,
            "Content-Length": str(len(body)) if body or method == "POST" else "",
            "Connection": "close",
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
        return self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body, seconds)

    def event(self, label: str) -> dict[str, Any]:
        """Gradio's description of what the button of this label calls."""
        return next(e for e in self.events if any(self.labels.get(target) == label for target, _ in e["targets"]))

    def post(self, body: object, seconds: float = 60.0) -> Answer:
        """Send a question: bytes as they are, anything else as JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", ASK, content, {"Content-Type": "application/json"}, seconds)

    def ask_number(self, number: object, values: object, seconds: float = 60.0, **more: Any) -> tuple[bool, str]:
        """True and the answer as JSON, or False and the sentence with which the page refuses."""
        answer = self.post({"data": values, "fn_index": number, "session_hash": "a1", **more}, seconds)
        if answer.status == 200:
            return True, json.dumps(json.loads(answer.body)["data"])
        try:
            return False, str(json.loads(answer.body)["error"])
        except (ValueError, KeyError, TypeError):
            return False, answer.text

    def ask(self, label: str, values: list[Any], seconds: float = 60.0, **more: Any) -> tuple[bool, str]:
        """Press the button with a label, as `ask_number` does by its number."""
        return self.ask_number(self.event(label)["id"], values, seconds, **more)

    def upload(self, name: str, content: bytes) -> Answer:
        """Send a file as the page does."""
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode("utf-8", "surrogatepass") + content + b"\r\n--x--\r\n"
        return self.request("POST", f"{API}/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})

    def uploaded(self, name: str, content: bytes) -> dict[str, Any]:
        """A file that was sent, as a value of a question."""
        return {"path": json.loads(self.upload(name, content).body)[0], "meta": {"_type": "gradio.FileData"}}

    def show(self, path: str) -> Answer:
        """Ask for an image by its path on the server."""
        return self.request("GET", f"{API}/file={quote(path)}")


def _is_whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)^content-length: (\d+)\r?$", head, re.MULTILINE)
    if end and length:
        return len(body) >= int(length[1])
    return bool(end) and b"chunked" in head.lower() and body.endswith(b"0\r\n\r\n")


def _parse(received: bytes, seconds: float) -> Answer:
    head, _, body = received.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/"):
        return Answer(0, {}, received, seconds)
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        whole = b""
        while body:
            size, _, rest = body.partition(b"\r\n")
            if not size or int(size, 16) == 0:
                break
            whole, body = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        body = whole
    return Answer(int(lines[0].split()[1]), headers, body, seconds)
