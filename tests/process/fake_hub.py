"""A hub on this machine: the few endpoints that finding and downloading a model asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c0ffee" * 6 + "c0ff"
TOKEN = "hf_right"


class FakeHub:
    """Serves `org/name` from a folder. `sizes` are what it says of files, if not the truth; a
    download of a file in `stalled` sends half of it and then nothing until `go_on` is set."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sizes: dict[str, int] = {}
        self.stalled: set[str] = set()
        self.go_on = threading.Event()
        self.is_gated = False
        self.status: int | None = None
        self.sent: list[str] = []
        self.url = ""

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """What makes a command ask here, with a cache below `home`."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            **more,
        }

    def answer(self, request: _Request) -> None:
        path = request.path.split("?")[0].strip("/").split("/")
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.status is not None:
            return request.fail(self.status, "", "out of order")
        if token and token != TOKEN:
            return request.fail(401, "", "Invalid credentials in Authorization header")
        if path[:2] == ["api", "models"]:
            path = path[2:]
        if path[:2] != ["org", "name"]:
            return request.fail(404 if token else 401, "RepoNotFound", "Repository not found")
        match path[2:]:
            case [] | ["revision", "main" | "v1"]:
                request.send_json(self._info())
            case ["revision", _]:
                request.fail(404, "RevisionNotFound", "no such revision")
            case ["tree", *_]:
                request.send_json([{"type": "file", "path": n, **m} for n, m in self._files()])
            case ["resolve", _, name]:
                self._resolve(request, name, token)
            case _:
                request.fail(404, "EntryNotFound", "no such entry")

    def _files(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for path in sorted(self.folder.iterdir()):
            size = self.sizes.get(path.name, path.stat().st_size)
            yield path.name, {"size": size, "oid": _etag(path)}

    def _info(self) -> dict[str, Any]:
        siblings = [
            {"rfilename": name, "size": meta["size"], "blobId": meta["oid"]}
            for name, meta in self._files()
        ]
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False}

    def _resolve(self, request: _Request, name: str, token: str) -> None:
        path = self.folder / name
        if self.is_gated and not token:
            return request.fail(401, "GatedRepo", "Access to model org/name is restricted")
        if not path.is_file():
            return request.fail(404, "EntryNotFound", "no such entry")
        data = path.read_bytes()
        is_whole = request.command == "HEAD" or name not in self.stalled
        request.send_head(200, len(data), {"X-Repo-Commit": COMMIT, "ETag": f'"{_etag(path)}"'})
        if request.command == "HEAD":
            return None
        self.sent.append(name)
        request.wfile.write(data if is_whole else data[: len(data) // 2])
        if not is_whole:
            request.wfile.flush()
            self.go_on.wait(60)
        return None


class _Request(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.hub.answer(self)

    do_HEAD = do_GET

    def send_head(self, status: int, num_bytes: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(num_bytes)}.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send_json(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_head(200, len(data), {"Content-Type": "application/json"})
        self.wfile.write(data)

    def fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.send_head(status, 0, headers)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the test looks at what the command says."""


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()  # noqa: S324  (git's own)


@contextmanager
def fake_hub(folder: Path) -> Iterator[FakeHub]:
    """A hub that is up, and gone at the end."""
    hub = FakeHub(folder)
    handler = type("Handler", (_Request,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, name="fake hub")
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
