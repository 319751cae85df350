"""A stand-in for the Hugging Face hub that takes a model's files from its own client, in the calls of an upload."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest.mock import patch
from urllib.parse import urlsplit

from support.hub import COMMIT


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


class UploadHandler(http.server.BaseHTTPRequestHandler):
    """create_repo, preupload, Git LFS and commit. Files called *.safetensors go by LFS, others within the commit."""

    protocol_version = "HTTP/1.1"
    hub: ClassVar[ModelHub]

    def do_POST(self) -> None:
        path, content = urlsplit(self.path).path, self._content()
        self.hub.asked.append(f"POST {path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send({"error": "Invalid username or password."}, 401)
        if self.hub.fail_at and self.hub.fail_at in path:
            return self._send({"error": "You have no right to write here."}, 403)
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
            self.hub.repositories.setdefault(name, {})
            self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self._send({"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})
        if re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            modes = {True: "lfs", False: "regular"}
            return self._send(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": modes[file["path"].endswith(".safetensors")],
                            "shouldIgnore": False,
                        }
                        for file in json.loads(content)["files"]
                    ]
                }
            )
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{self.hub.endpoint}/blobs/{o['oid']}", "header": {}}}}
                for o in json.loads(content)["objects"]
            ]
            return self._send({"transfer": "basic", "objects": objects})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path)
        if found:
            return self._commit(found[1], [json.loads(line) for line in content.splitlines()])
        return self._send({"error": f"unknown path {path}"}, 404)

    def do_PUT(self) -> None:
        oid, content = self.path.rsplit("/", 1)[1], self._content()
        self.hub.asked.append(f"PUT {self.path}")
        good = hashlib.sha256(content).hexdigest() == oid
        if good:
            self.hub.blobs[oid] = content
        self._send({}, 200 if good else 400)

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
        self._send({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{COMMIT}"})

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serve_model_hub() -> Iterator[ModelHub]:
    """Serve an empty hub. Inside the block, huggingface_hub sends to it, with its token, and without Xet."""
    from huggingface_hub import constants

    hub = ModelHub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (UploadHandler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with (
            patch.object(constants, "ENDPOINT", hub.endpoint),
            patch.object(constants, "HF_HUB_DISABLE_XET", True),
            patch.dict("os.environ", {"HF_TOKEN": hub.token}),
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
