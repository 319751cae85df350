"""Stand-ins for the Hugging Face hub, for its own client: one serves a folder as a data set, one takes a model."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec.config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    """Reads bodies and sends JSON."""

    protocol_version = "HTTP/1.1"

    def content(self) -> bytes:
        """The body of the request."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def send(self, content: Any, status: int = 200, kind: str = "application/json") -> None:
        """Send bytes, or a value as JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(handler: type[Handler]) -> Iterator[str]:
    """Serve from a thread. Yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class DataHandler(Handler):
    """The requests that `HfFileSystem` makes to read a public data set: its info, its files, and their content."""

    folder: ClassVar[Path]
    name: ClassVar[str]
    asked: ClassVar[list[str]]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if re.fullmatch(rf"/api/datasets/{self.name}(?:/revision/\w+)?", path):
            return self.send({"id": self.name, "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        if path.startswith(f"/api/datasets/{self.name}/tree/"):
            return self.send([self._entry(file) for file in sorted(self.folder.iterdir())])
        found = re.fullmatch(rf"/datasets/{self.name}/resolve/\w+/(.+)", path)
        if found and (self.folder / found[1]).is_file():
            return self.send((self.folder / found[1]).read_bytes(), kind="application/octet-stream")
        return self.send(b"", 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        names = parse_qs(self.content().decode()).get("paths", [])
        if not path.startswith(f"/api/datasets/{self.name}/paths-info/"):
            return self.send(b"", 404)
        return self.send([self._entry(self.folder / n) for n in names if n and (self.folder / n).is_file()])

    def _entry(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return {"type": "file", "path": file.name, "size": len(content), "oid": digest}


@contextlib.contextmanager
def serve_hub(folder: Path, name: str) -> Iterator[list[str]]:
    """Serve a folder as a data set of the hub that fsspec's configuration names. Yields the paths asked for."""
    from huggingface_hub import HfFileSystem

    asked: list[str] = []
    with serving(type("Hub", (DataHandler,), {"folder": folder, "name": name, "asked": asked})) as address:
        try:
            with patch.dict(fsspec.config.conf, {"hf": {"endpoint": address, "token": False}}):
                yield asked
        finally:
            HfFileSystem.clear_instance_cache()


@dataclass
class ModelHub:
    """State of the stand-in."""

    endpoint: str = ""
    token: str = "secret"
    """Requests with another token are refused."""
    fail_at: str = ""
    """Part of a path whose requests fail with status 403, as for a token that may not write."""
    asked: list[str] = field(default_factory=list)
    """Method and path of each request."""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Files of each model, as of its last commit."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Message of each commit."""
    blobs: dict[str, bytes] = field(default_factory=dict)
    """Large files that were sent, by their SHA-256, before a commit names them."""


class UploadHandler(Handler):
    """create_repo, preupload, Git LFS and commit. Files called *.safetensors go by LFS, others within the commit."""

    hub: ClassVar[ModelHub]

    def do_POST(self) -> None:
        path, content = urlsplit(self.path).path, self.content()
        self.hub.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.send({"error": "Invalid username or password."}, 401)
        if self.hub.fail_at and self.hub.fail_at in path:
            return self.send({"error": "You have no right to write here."}, 403)
        if path == "/api/validate-yaml":
            return self.send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self.send({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            names = [file["path"] for file in json.loads(content)["files"]]
            modes = {True: "lfs", False: "regular"}
            return self.send({"files": [
                {"path": name, "uploadMode": modes[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]})  # fmt: skip
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{o['oid']}", "header": {}}}}
                for o in json.loads(content)["objects"]
            ]
            return self.send({"transfer": "basic", "objects": objects})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(found[1], [json.loads(line) for line in content.splitlines()])
        return self.send({"error": f"unknown path {path}"}, 404)

    def do_PUT(self) -> None:
        oid, content = self.path.rsplit("/", 1)[1], self.content()
        self.hub.asked.append(f"PUT {self.path}")
        good = hashlib.sha256(content).hexdigest() == oid
        self.hub.blobs |= {oid: content} if good else {}
        self.send({}, 200 if good else 400)

    def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = {}
        for item in lines:
            value = item["value"]
            if item["key"] == "header":
                self.hub.commits.append(value["summary"])
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self.hub.repositories[name] |= files
        self.send({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}"})


@contextlib.contextmanager
def serve_model_hub() -> Iterator[ModelHub]:
    """Serve an empty hub. Inside the block, huggingface_hub sends to it, with its token, and without Xet."""
    from huggingface_hub import constants

    hub = ModelHub()
    with (
        serving(type("Hub", (UploadHandler,), {"hub": hub})) as hub.endpoint,
        patch.object(constants, "ENDPOINT", hub.endpoint),
        patch.object(constants, "HF_HUB_DISABLE_XET", True),
        patch.dict("os.environ", {"HF_TOKEN": hub.token}),
    ):
        yield hub
