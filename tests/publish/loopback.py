"""A Hub on 127.0.0.1 that keeps repositories in memory, records every request, and fails where it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

SLOWEST = 5.0
"""Seconds after which an answer that trickles ends by itself, so that no test hangs."""


@dataclass
class Fault:
    """What the server does instead of answering a request.

    Args:
        path: Part of the address of the requests that it is for.
        status: The answer's status; 0 drops the connection without an answer.
        times: How many requests it is for.
        headers: Headers of the answer.
        message: The server's own words.
        after: Whether the request is carried out first, so that only its answer is lost.
        slow: Whether the answer's body trickles.
        page: Whether the body is the page of a proxy, in the place of JSON.
    """

    path: str
    status: int = 500
    times: int = 99
    headers: dict[str, str] = field(default_factory=dict)
    message: str = ""
    after: bool = False
    slow: bool = False
    page: bool = False


@dataclass
class Repository:
    """A repository: its files, the commits so far, its tags and pull requests, and the licence that its card names."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, bytes]] = field(default_factory=list)
    licence: str | None = None

    @property
    def head(self) -> str:
        """The newest commit's hash."""
        return hashlib.sha1(str(len(self.commits)).encode(), usedforsecurity=False).hexdigest()


class Hub:
    """The server's state."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.large = False
        self.url = ""

    def count(self, part: str) -> int:
        """Return how many requests had a part in their address."""
        return sum(part in path for _, path in self.requests)

    def fault_for(self, path: str) -> Fault | None:
        """Return the fault that is next for an address."""
        for fault in self.faults:
            if fault.path in path and fault.times > 0:
                fault.times -= 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _send(
        self, status: int, document: Any, headers: dict[str, str] | None = None, *, raw: bytes | None = None
    ) -> None:
        body = json.dumps(document).encode() if raw is None else raw
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, path: str) -> None:
        owner, name, _, _, *rest = path.strip("/").split("/")
        repository = self.hub.repositories[f"{owner}/{name}"]
        self._send(200, None, raw=repository.files["/".join(rest)])

    def _trickle(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        end = time.monotonic() + SLOWEST
        while time.monotonic() < end:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.02)

    def _any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path))
        fault = self.hub.fault_for(path)
        try:
            if fault is None and "/resolve/" in path:
                self._send_file(path)
                return
            if fault is None:
                self._send(*self._answer(self.path, body))
                return
            if fault.after:
                self._answer(self.path, body)
            if fault.slow:
                self._trickle()
            elif fault.status == 0:
                self.close_connection = True
            elif fault.page:
                self._send(fault.status, None, fault.headers, raw=b"<html>Bad gateway</html>")
            else:
                self._send(fault.status, {"error": fault.message} if fault.message else {}, fault.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = _any  # noqa: N815  (names that http.server looks for)

    def _answer(  # noqa: PLR0911  (one for each kind of address)
        self, address: str, body: bytes
    ) -> tuple[int, Any] | tuple[int, Any, dict[str, str]]:
        path, _, query = address.partition("?")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                return 409, {"error": "You already created this model repo"}
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
            return 200, {"url": f"{self.hub.url}/{name}"}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if parts[0] == "upload":
            self.hub.uploads[parts[1]] = body
            return 200, {}
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2]).removesuffix(".git")
        repository = self.hub.repositories.get(name)
        if repository is None:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if "/commit/" not in path or "create_pr=1" not in query:
            return self._of_repository(name, repository, parts, body)
        return self._commit_of_request(name, repository, body)

    def _of_repository(self, name: str, repository: Repository, parts: list[str], body: bytes) -> tuple[int, Any]:
        what = "batch" if parts[-1] == "batch" else parts[4] if len(parts) > 4 else ""
        if what == "commit":
            return self._commit(name, repository, body)
        if what == "tag" and json.loads(body)["tag"] in repository.tags:
            return 409, {"error": "Tag exists"}
        if what == "tag":
            repository.tags[json.loads(body)["tag"]] = unquote(parts[5])
        card = {"cardData": {"license": repository.licence}} if repository.licence else {}
        about = {"id": name, "modelId": name, "private": repository.private, "sha": repository.head, "tags": []}
        answers: dict[str, Any] = {
            "batch": lambda: self._batch(body),
            "preupload": lambda: self._preupload(body),
            "refs": lambda: _references(repository),
            "paths-info": lambda: _paths(repository, unquote(parts[5])),
            "branch": dict,
            "tag": dict,
        }
        return 200, answers.get(what, lambda: about | card)()

    def _batch(self, body: bytes) -> Any:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}", "header": {}}}}
            for one in json.loads(body)["objects"]
        ]
        return {"objects": objects, "transfer": "basic"}

    def _preupload(self, body: bytes) -> Any:
        mode = "lfs" if self.hub.large else "regular"
        files = [
            {"path": file["path"], "uploadMode": mode if file["path"].endswith(".safetensors") else "regular"}
            for file in json.loads(body)["files"]
        ]
        return {"files": [{**file, "shouldIgnore": False} for file in files]}

    def _commit_of_request(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        aside = Repository(files=dict(repository.files), commits=list(repository.commits))
        status, answer = self._commit(name, aside, body)
        if status == 200:
            repository.requests.append(aside.files)
            answer |= {"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{len(repository.requests)}"}
        return status, answer

    def _commit(self, name: str, repository: Repository, body: bytes) -> tuple[int, Any]:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repository.head):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.hub.uploads[value["oid"]]
        repository.commits.append(header | {"files": [line["value"].get("path") for line in lines[1:]]})
        return 200, {"commitUrl": f"{self.hub.url}/{name}/commit/x", "commitOid": repository.head}


def _references(repository: Repository) -> dict[str, Any]:
    requests = [f"refs/pr/{number}" for number in range(1, len(repository.requests) + 1)]
    return {
        "branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}],
        "converts": [],
        "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repository.tags.items()],
        "pullRequests": [{"name": ref, "ref": ref, "targetCommit": ""} for ref in requests],
    }


def _paths(repository: Repository, revision: str) -> list[dict[str, Any]]:
    request = re.fullmatch(r"refs/pr/(\d+)", revision)
    files = repository.requests[int(request[1]) - 1] if request else repository.files
    return [
        {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
        for path, content in files.items()
    ]


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a Hub until the context ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
