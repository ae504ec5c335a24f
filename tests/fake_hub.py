"""A model hub on this machine: repositories with commits and branches, private ones too, behind the hub's own API."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

Files = dict[str, bytes]


@dataclass
class FakeHub:
    """The hub.

    Attributes:
        commits: files by (repository, commit).
        branches: commits by (repository, branch).
        tokens: the token that a private repository needs.
        created: the fields of each request for a new repository.
        messages: of commits that clients made, and whether they are pull requests, by commit.
        requests: (method, path) of all requests.
    """

    url: str = ""
    commits: dict[tuple[str, str], Files] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    created: list[dict] = field(default_factory=list)
    messages: dict[str, tuple[str, bool]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        """A commit with the files of a folder. Returns its name."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        return self.commit(
            repository, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}, branch
        )

    def commit(self, repository: str, files: Files, branch: str = "main") -> str:
        """A commit with these files, to which the branch moves. Returns its name."""
        digest = hashlib.sha1(f"{repository} {len(self.commits)}".encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + data)
        sha = digest.hexdigest()
        self.commits[repository, sha] = files
        self.branches[repository, branch] = sha
        return sha

    def sha(self, repository: str, revision: str) -> str | None:
        """The commit of a branch or commit."""
        revision = self.branches.get((repository, revision), revision)
        return revision if (repository, revision) in self.commits else None

    def downloads(self) -> list[str]:
        """The paths of the files that were sent."""
        return [path for method, path in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        self._answer(body)

    def _answer(self, body: bytes = b"") -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append((self.command, path))
        if path == "/api/repos/create":
            fields = json.loads(body)
            self.hub.created.append(fields)
            name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
            if (name, "main") not in self.hub.branches:
                self.hub.commit(name, {})
            return self._json({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        parts = path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        parts = parts[2:] if is_api else parts
        repository, rest = "/".join(parts[:2]), parts[2:]
        if (needed := self.hub.tokens.get(repository)) and self.headers.get("Authorization") != f"Bearer {needed}":
            return self._error(401, "RepoNotFound")
        if (repository, "main") not in self.hub.branches:
            return self._error(404, "RepoNotFound")
        if is_api and rest[:1] == ["branch"]:
            self.hub.branches.setdefault((repository, "/".join(rest[1:])), self.hub.branches[repository, "main"])
            return self._json({})
        sha = self.hub.sha(repository, rest[1] if len(rest) > 1 else "main")
        if sha is None:
            return self._error(404, "RevisionNotFound")
        if is_api:
            return self._api(repository, sha, rest, body)
        return self._file(repository, sha, "/".join(rest[2:]))

    def _api(self, repository: str, sha: str, rest: list[str], body: bytes) -> None:
        files = self.hub.commits[repository, sha]
        if rest[:1] == ["tree"]:
            folder = "".join(f"{part}/" for part in rest[2:])
            deep = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() in ("true", "1")
            names = [name for name in files if name.startswith(folder) and (deep or "/" not in name[len(folder) :])]
            if folder and not names:
                return self._error(404, "EntryNotFound")
            return self._json(
                [{"type": "file", "path": name, "size": len(files[name]), "oid": _oid(files[name])} for name in names]
            )
        if rest[:1] == ["preupload"]:
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        if rest[:1] == ["commit"]:
            new, message = dict(files), ""
            create_pr = "create_pr=1" in self.path
            for line in map(json.loads, body.splitlines()):
                key, value = line["key"], line["value"]
                if key == "header":
                    message = value["summary"]
                elif key == "file":
                    new[value["path"]] = base64.b64decode(value["content"])
                elif key == "deletedFile":
                    del new[value["path"]]
            sha = self.hub.commit(repository, new, "refs/pr/1" if create_pr else rest[1])
            self.hub.messages[sha] = (message, create_pr)
            answer = {"commitUrl": f"{self.hub.url}/{repository}/commit/{sha}", "commitOid": sha}
            if create_pr:
                answer["pullRequestUrl"] = f"{self.hub.url}/{repository}/discussions/1"
            return self._json(answer)
        siblings = [{"rfilename": name} for name in files]
        facts = {"id": repository, "modelId": repository, "sha": sha, "siblings": siblings, "tags": []}
        front_matter = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.S)
        return self._json(facts | ({"cardData": yaml.safe_load(front_matter[1])} if front_matter else {}))

    def _file(self, repository: str, sha: str, name: str) -> None:
        data = self.hub.commits[repository, sha].get(name)
        if data is None:
            return self._error(404, "EntryNotFound", sha)
        self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": sha})

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, sha: str = "") -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": sha})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
