"""A model hub on this machine, for the real clients: as much of the Hugging Face Hub's HTTP as reading models and datasets asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "a" * 40
API = re.compile(r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<what>revision|tree)/[^/]+)?(?P<below>/.*)?")
FILE = re.compile(r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)")


@contextmanager
def hub(root: Path) -> Iterator[str]:
    """The address (HF_ENDPOINT) of a hub with the repositories root/models/<owner>/<name> and root/datasets/<owner>/<name>."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if found := API.fullmatch(path):
            repository = self.root / found["kind"] / found["name"]
            if not repository.is_dir():
                return self._send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if found["what"] == "tree":
                below = repository / (found["below"] or "/")[1:]
                if not below.is_dir():
                    return self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return self._send([_entry(x, repository) for x in sorted(below.iterdir())])
            files = [{"rfilename": x.relative_to(repository).as_posix()} for x in sorted(repository.rglob("*")) if x.is_file()]
            return self._send({"id": found["name"], "sha": COMMIT, "private": False, "tags": [], "siblings": files})
        found = FILE.fullmatch(path)
        file = self.root / ("datasets" if found and found["kind"] else "models") / (f"{found['name']}/{found['path']}" if found else "-")
        if not file.is_file():
            return self._send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = file.read_bytes()
        head = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(span[1]), min(int(span[2] or len(data)), len(data) - 1)
            return self._send(data[begin : end + 1], 206, head | {"Content-Range": f"bytes {begin}-{end}/{len(data)}"})
        self._send(data, 200, head)

    do_HEAD = do_GET

    def _send(self, body: Any, code: int = 200, head: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **(head or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _entry(path: Path, repository: Path) -> dict[str, Any]:
    """A file or folder as a listing names it."""
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {"type": "file", "oid": hashlib.sha1(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "path": name}
