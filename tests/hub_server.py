"""A Hub in one process: enough of its protocol for the real client to create a repository, push to it and read it."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the Hub holds and what it was asked.

    Args:
        refuse: Status that every request gets, or None to serve.
        files: Content by `user/name` and path.
        commits: One entry for each commit: repository, summary, paths.
        requests: Method, path and Authorization header of each request.
    """

    url: str = ""
    refuse: int | None = None
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a fresh Hub on a free local port for the length of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubRequest", (_HubRequest,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _sha(hub: Hub) -> str:
    return hashlib.sha1(str(len(hub.commits)).encode()).hexdigest()


class _HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._read_body()
        self.hub.requests.append((self.command, path, self.headers.get("Authorization")))
        if self.hub.refuse is not None:
            return self._send(self.hub.refuse, {"error": "refused"})
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                return action(self, body, *match.groups())
        return self._send(404, {"error": "not found"})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status: int, answer: Any, **headers: str) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create_repo(self, body: bytes) -> None:
        wish = json.loads(body)
        repo = f"{wish['organization']}/{wish['name']}"
        exists = repo in self.hub.files
        if not exists:
            self.hub.files[repo] = {}
            self.hub.private[repo] = wish.get("visibility") == "private"
        self._send(409 if exists else 200, {"url": f"{self.hub.url}/{repo}"})

    def validate_card(self, body: bytes) -> None:
        valid = json.loads(body)["content"].startswith("---\n")
        errors = [] if valid else [{"message": "no metadata"}]
        self._send(200 if valid else 400, {"errors": errors, "warnings": []})

    def choose_modes(self, body: bytes, repo: str) -> None:
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            content = self.hub.files[repo].get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if content is not None:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else blob
            answers.append(answer)
        self._send(200, {"files": answers})

    def plan_lfs(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.hub.url}/lfs-verify"},
            }
            objects.append(item if item["oid"] in self.hub.blobs else {**item, "actions": actions})
        self._send(200, {"transfer": "basic", "objects": objects})

    def put_blob(self, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.blobs[oid] = body
        self._send(200 if good else 400, {})

    def verify_blob(self, body: bytes) -> None:
        self._send(200 if json.loads(body)["oid"] in self.hub.blobs else 404, {})

    def commit(self, body: bytes, repo: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
        self.hub.files[repo] |= files
        self.hub.commits.append({"repo": repo, "summary": lines[0]["value"]["summary"], "paths": sorted(files)})
        sha = _sha(self.hub)
        self._send(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def describe(self, body: bytes, repo: str) -> None:
        if repo not in self.hub.files:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        siblings = [{"rfilename": path} for path in sorted(self.hub.files[repo])]
        private = self.hub.private[repo]
        return self._send(200, {"id": repo, "sha": _sha(self.hub), "private": private, "siblings": siblings})

    def list_tree(self, body: bytes, repo: str) -> None:
        files = self.hub.files.get(repo, {})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(files.items())
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, path: str) -> None:
        content = self.hub.files.get(repo, {}).get(path)
        sha = _sha(self.hub)
        if content is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(200, content, X_Repo_Commit=sha, ETag=etag)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (("POST",), "/api/repos/create", _HubRequest.create_repo),
    (("POST",), "/api/validate-yaml", _HubRequest.validate_card),
    (("POST",), f"/api/models/{_REPO}/preupload/main", _HubRequest.choose_modes),
    (("POST",), f"/{_REPO}\\.git/info/lfs/objects/batch", _HubRequest.plan_lfs),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _HubRequest.put_blob),
    (("POST",), "/lfs-verify", _HubRequest.verify_blob),
    (("POST",), f"/api/models/{_REPO}/commit/main", _HubRequest.commit),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/[\w.-]+)?", _HubRequest.describe),
    (("GET",), rf"/api/models/{_REPO}/tree/[\w.-]+", _HubRequest.list_tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/[\w.-]+/(.+)", _HubRequest.resolve),
)
