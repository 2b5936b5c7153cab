"""Serve a Hub in this process: the part of its protocol that the real client needs to create, push and read."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_canary0123456789"
_PAUSE = threading.Event()  # never set; the tests replace time.sleep
COMMIT = r"/api/models/user/tiny/commit/main"


@dataclass
class Fault:
    """A failure of some requests.

    Args:
        method: Method of the requests.
        pattern: Regular expression for their paths.
        answer: Status of the response; `drop` closes the connection before carrying out the request, `lose` after it;
            `silent` sends nothing, and `drip` a byte of the answer now and then, for some seconds.
        times: Number of requests that fail.
        headers: Headers of the response.
        content: Body of the response.
    """

    method: str
    pattern: str
    answer: int | Literal["drop", "lose", "silent", "drip"]
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    content: object = field(default_factory=lambda: {"error": "fault"})


@dataclass
class Hub:
    """The content of the Hub and the requests that it received.

    Args:
        refuse: Status of every response, or None to serve the requests.
        faults: Failures; the first one that matches a request is used.
        files: Content of the main branch by `user/name` and path.
        branches: Content of the other branches and pull requests, by `user/name` and name.
        tags: Commit of each tag, by `user/name` and name.
        snapshots: Content by commit.
        commits: One entry for each commit: repository, branch, summary, paths.
        requests: Method, path and Authorization header of each request.
        bodies: Body of each request.
        collections: Models of each collection; other collections do not exist.
        gate: Uploads of files wait until it is set.
    """

    url: str = ""
    refuse: int | None = None
    faults: list[Fault] = field(default_factory=list)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    tags: dict[tuple[str, str], str] = field(default_factory=dict)
    snapshots: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[tuple[str, str], str] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, list[str]] = field(default_factory=dict)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve a new Hub on a free local port within the block."""
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


def _sha(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


class _HubRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    is_lost = False

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
        self.hub.bodies.append(body)
        if self.hub.refuse is not None:
            return self._send(self.hub.refuse, {"error": "refused"})
        for fault in self.hub.faults:
            if fault.times and fault.method == self.command and re.fullmatch(fault.pattern, path):
                fault.times -= 1
                if isinstance(fault.answer, int):
                    return self._send(fault.answer, fault.content, **fault.headers)
                self.close_connection = True
                if fault.answer in ("silent", "drip"):
                    return self._hesitate(drips=fault.answer == "drip")
                if fault.answer == "drop":
                    return None
                self.is_lost = True
                break
        for method, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method:
                return action(self, body, *match.groups())
        return self._send(404, {"error": "not found"})

    def _hesitate(self, *, drips: bool) -> None:
        """Answer nothing, or one byte of many now and then, until the client gives up or five seconds are over."""
        if drips:
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
        for _ in range(100):
            _PAUSE.wait(0.05)
            with suppress(OSError):
                if drips:
                    self.wfile.write(b" ")
                elif not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    return

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
        if self.is_lost:
            return
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create_repo(self, body: bytes) -> None:
        request = json.loads(body)
        repo = f"{request['organization']}/{request['name']}"
        exists = repo in self.hub.files
        if not exists:
            self.hub.files[repo] = {}
            self.hub.heads[repo, "main"] = _sha(0)
            self.hub.private[repo] = request.get("visibility") == "private"
        self._send(409 if exists else 200, {"url": f"{self.hub.url}/{repo}"})

    def validate_card(self, body: bytes) -> None:
        valid = json.loads(body)["content"].startswith("---\n")
        errors = [] if valid else [{"message": "no metadata"}]
        self._send(200 if valid else 400, {"errors": errors, "warnings": []})

    def _content(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files of a branch, a tag or a commit."""
        if repo not in self.hub.files:
            return None
        if (repo, revision) in self.hub.heads:
            files = self.hub.files[repo] if revision == "main" else self.hub.branches[repo, revision]
            return self.hub.heads[repo, revision], files
        sha = self.hub.tags.get((repo, revision), revision)
        return (sha, self.hub.snapshots[sha]) if sha in self.hub.snapshots else None

    def choose_modes(self, body: bytes, repo: str, revision: str) -> None:
        found = self._content(repo, revision)
        if found is None:
            return self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            content = found[1].get(file["path"])
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if content is not None:
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                answer["oid"] = hashlib.sha256(content).hexdigest() if large else blob
            answers.append(answer)
        return self._send(200, {"files": answers})

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
        self.hub.gate.wait(60)
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.blobs[oid] = body
        self._send(200 if good else 400, {})

    def verify_blob(self, body: bytes) -> None:
        self._send(200 if json.loads(body)["oid"] in self.hub.blobs else 404, {})

    def commit(self, body: bytes, repo: str, branch: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.blobs[value["oid"]] if large else base64.b64decode(value["content"])
        wants_pr = "create_pr" in parse_qs(urlsplit(self.path).query)
        before = self.hub.files[repo] if branch == "main" else self.hub.branches[repo, branch]
        if wants_pr:
            number = 1 + sum(name.startswith("refs/pr/") for _, name in self.hub.heads)
            branch = f"refs/pr/{number}"
        self.hub.commits.append(
            {"repo": repo, "branch": branch, "summary": lines[0]["value"]["summary"], "paths": sorted(files)}
        )
        sha = self.hub.heads[repo, branch] = _sha(len(self.hub.commits))
        self.hub.snapshots[sha] = before | files
        if branch == "main":
            self.hub.files[repo] = before | files
        else:
            self.hub.branches[repo, branch] = before | files
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha}
        if wants_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{branch.rpartition('/')[2]}"
        self._send(200, answer)

    def create_collection(self, body: bytes) -> None:
        about = json.loads(body)
        slug = f"{about['namespace']}/{about['title'].lower().replace(' ', '-')}-64f9a55bb3115b4f513ec026"
        if slug in self.hub.collections:
            return self._send(409, {"error": "exists", "slug": slug})
        self.hub.collections[slug] = []
        return self.show_collection(body, slug)

    def show_collection(self, body: bytes, slug: str) -> None:
        about = {"slug": slug, "title": "models", "owner": {"name": "user"}, "private": False, "theme": "blue"}
        about |= {"position": 0, "upvotes": 0, "lastUpdated": "2026-01-01T00:00:00.000Z", "items": []}
        self._send(200, about)

    def add_to_collection(self, body: bytes, slug: str) -> None:
        if slug not in self.hub.collections:
            return self._send(404, {"error": "Collection not found"})
        item = json.loads(body)["item"]["id"]
        if item in self.hub.collections[slug]:
            return self._send(409, {"error": "exists"})
        self.hub.collections[slug].append(item)
        return self.show_collection(body, slug)

    def create_branch(self, body: bytes, repo: str, branch: str) -> None:
        if (repo, branch) in self.hub.heads:
            return self._send(409, {"error": "exists"})
        self.hub.heads[repo, branch] = self.hub.heads[repo, "main"]
        self.hub.branches[repo, branch] = dict(self.hub.files[repo])
        return self._send(200, {})

    def create_tag(self, body: bytes, repo: str, revision: str) -> None:
        name = json.loads(body)["tag"]
        if (repo, name) in self.hub.tags:
            return self._send(409, {"error": "exists"})
        self.hub.tags[repo, name] = self.hub.heads.get((repo, revision), revision)
        return self._send(200, {})

    def list_refs(self, body: bytes, repo: str) -> None:
        branches, tags = (
            {n: sha for (r, n), sha in refs.items() if r == repo} for refs in (self.hub.heads, self.hub.tags)
        )

        def describe(kind: str, refs: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        self._send(200, {"branches": describe("heads", branches), "tags": describe("tags", tags), "converts": []})

    def describe(self, body: bytes, repo: str, revision: str | None) -> None:
        found = self._content(repo, revision or "main")
        if found is None:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        sha, files = found
        siblings = [{"rfilename": path} for path in sorted(files)]
        return self._send(200, {"id": repo, "sha": sha, "private": self.hub.private[repo], "siblings": siblings})

    def list_tree(self, body: bytes, repo: str, revision: str) -> None:
        _, files = self._content(repo, revision) or ("", {})
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in sorted(files.items())
        ]
        self._send(200, entries)

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        sha, files = self._content(repo, revision) or (_sha(0), {})
        content = files.get(path)
        if content is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(200, content, X_Repo_Commit=sha, ETag=etag)


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (("POST",), "/api/repos/create", _HubRequest.create_repo),
    (("POST",), "/api/validate-yaml", _HubRequest.validate_card),
    (("POST",), rf"/api/models/{_REPO}/preupload/(.+)", _HubRequest.choose_modes),
    (("POST",), f"/{_REPO}\\.git/info/lfs/objects/batch", _HubRequest.plan_lfs),
    (("PUT",), r"/lfs/([0-9a-f]{64})", _HubRequest.put_blob),
    (("POST",), "/lfs-verify", _HubRequest.verify_blob),
    (("POST",), rf"/api/models/{_REPO}/commit/(.+)", _HubRequest.commit),
    (("POST",), "/api/collections", _HubRequest.create_collection),
    (("POST",), rf"/api/collections/{_REPO}/items", _HubRequest.add_to_collection),
    (("GET",), rf"/api/collections/{_REPO}", _HubRequest.show_collection),
    (("POST",), rf"/api/models/{_REPO}/branch/(.+)", _HubRequest.create_branch),
    (("POST",), rf"/api/models/{_REPO}/tag/(.+)", _HubRequest.create_tag),
    (("GET",), rf"/api/models/{_REPO}/refs", _HubRequest.list_refs),
    (("GET",), rf"/api/models/{_REPO}(?:/revision/([\w.-]+))?", _HubRequest.describe),
    (("GET",), rf"/api/models/{_REPO}/tree/([\w.-]+)", _HubRequest.list_tree),
    (("GET", "HEAD"), rf"/{_REPO}/resolve/([\w.-]+)/(.+)", _HubRequest.resolve),
)
