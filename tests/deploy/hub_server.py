"""A small server with the part of the hub's HTTP interface that is used here: make, commit, resolve."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
        files: Content by (repository, name).
        requests_seen: Method, path and token of every request.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], bytes] = {}
        self.requests_seen: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _seen(self) -> None:
        self.server.requests_seen.append((self.command, self.path, self.headers.get("Authorization")))

    def do_HEAD(self) -> None:
        self._seen()
        parts = self.path.split("?")[0].strip("/").split("/")
        repository, name = "/".join(parts[:2]), "/".join(parts[4:])
        if not any(each == repository for each, _ in self.server.files):
            return self._answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if parts[3] not in ("main", "v2", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        content = self.server.files.get((repository, name))
        if content is None:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)

    def do_GET(self) -> None:
        self.do_HEAD()

    def do_POST(self) -> None:
        self._seen()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.headers.get("Authorization"):
            return self._answer(401)
        if self.path.startswith("/api/repos/create"):
            sent = json.loads(body)
            owner = f"{sent['organization']}/" if sent.get("organization") else ""
            return self._json({"url": f"{self.server.url}/{owner}{sent['name']}"})
        if self.path.startswith("/api/validate-yaml"):
            return self._json({"errors": [], "warnings": []})
        repository = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            return self._json(
                {"files": [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in names]}
            )
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.files[repository, value["path"]] = base64.b64decode(value["content"])
        return self._json(
            {"commitUrl": f"{self.server.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT, "hookOutput": ""}
        )


@contextlib.contextmanager
def running():
    """A server that runs while the block does."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
