"""A Hub on loopback: repositories from folders, over the HTTP that huggingface_hub and datasets speak.

Read-only so far: repository info, file tree, and files by revision. The clients read HF_ENDPOINT when they are
imported, so a test runs them in a subprocess with `hub.environment(home)`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?(?:/(.+))?$")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


@dataclass
class Repository:
    """The one commit of a repository: path -> content."""

    files: Mapping[str, bytes]
    commit: str = field(init=False)

    def __post_init__(self):
        digest = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            digest.update(path.encode() + b"\0" + hashlib.sha1(content).digest())
        self.commit = digest.hexdigest()

    @classmethod
    def of_folder(cls, folder: Path) -> Repository:
        return cls({p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    def has_revision(self, revision: str) -> bool:
        return revision in ("main", self.commit)


@dataclass
class Hub:
    """A running server: `repositories` by (kind, id), and the requests that it saw."""

    url: str
    repositories: dict[tuple[str, str], Repository]
    requests: list[str] = field(default_factory=list)

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a client that knows this Hub only and has nothing cached."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serve(repositories: dict[tuple[str, str], Repository]) -> Iterator[Hub]:
    """Serve repositories, `("datasets", "shop/pairs")` or `("models", "shop/encoder")`, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", repositories)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def log_message(self, *arguments):
        """Keep the tests' output quiet; `hub.requests` has it all."""

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        if match := _FILE.match(path):
            self._file("datasets" if match[1] else "models", match[2], match[3], match[4])
        elif match := _API.match(path):
            self._api(match[1], match[2], match[3], match[4], match[5] or "")
        else:
            self._error(404, "EntryNotFound")

    def _find(self, kind: str, name: str, revision: str) -> Repository | None:
        repository = self.server.hub.repositories.get((kind, name))
        if repository is None:
            # As the Hub does: who may not see a repository is not told whether it exists.
            self._error(401, "RepoNotFound")
        elif not repository.has_revision(revision):
            self._error(404, "RevisionNotFound")
        else:
            return repository
        return None

    def _file(self, kind: str, name: str, revision: str, path: str):
        repository = self._find(kind, name, revision)
        if repository is None:
            return
        headers = {"X-Repo-Commit": repository.commit}
        content = repository.files.get(path)
        if content is None:
            self._error(404, "EntryNotFound", headers)
            return
        headers |= {"ETag": f'"{_git_id(content)}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not requested:
            self._send(200, content, headers)
            return
        first, last = int(requested[1]), min(int(requested[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._send(206, content[first : last + 1], headers)

    def _api(self, kind: str, name: str, what: str | None, revision: str | None, folder: str):
        repository = self._find(kind, name, revision or "main")
        if repository is None:
            return
        if what != "tree":
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            answer = {"id": name, "sha": repository.commit, "private": False, "tags": [], "siblings": siblings}
            self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
            return
        recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in ("true", "1")
        entries = list(_tree(repository, folder, recursive))
        if entries:
            self._send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        else:
            self._error(404, "EntryNotFound")

    def _error(self, status: int, code: str, headers: Mapping[str, str] | None = None):
        body = json.dumps({"error": code}).encode()
        self._send(status, body, {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, content: bytes, headers: Mapping[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(repository: Repository, folder: str, recursive: bool) -> Iterator[dict[str, object]]:
    """List the files and folders in a folder; recursive: and in those below it."""
    prefix = f"{folder}/" if folder else ""
    folders = set()
    for path, content in sorted(repository.files.items()):
        if not path.startswith(prefix):
            continue
        *parents, _ = path[len(prefix) :].split("/")
        for depth in range(1, len(parents) + 1):
            parent = prefix + "/".join(parents[:depth])
            if parent not in folders and (recursive or depth == 1):
                folders.add(parent)
                yield {"type": "directory", "path": parent, "oid": _git_id(parent.encode()), "size": 0}
        if recursive or not parents:
            yield {"type": "file", "path": path, "size": len(content), "oid": _git_id(content)}


def _git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
