"""The HTTP of the test Hub: two origins, one for the API and one for large files."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

import yaml

from tests.hub_server.repository import Blob, Commit, Repository, belongs_in_lfs


@dataclass(frozen=True)
class Account:
    """Whom a token stands for, and what it may do."""

    name: str
    role: str
    organisations: tuple[str, ...]

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.name, *self.organisations)


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match `pattern`, "METHOD /path"."""

    pattern: str
    times: float
    status: int | None
    delay: float
    lost: bool
    cut: int | None
    corrupt: bool
    call: Callable[[str], object] | None


class Refused(Exception):
    """An answer that is an error; `code` is what the clients choose their exception by."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Hub:
    """A running server: `repositories` by (kind, id), and the requests that it saw."""

    repositories: dict[tuple[str, str], Repository]
    url: str = ""
    storage_url: str = ""
    requests: list[str] = field(default_factory=list)
    accounts: dict[str, Account] = field(default_factory=dict)
    collections: dict[str, dict] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: threading.Event = field(default_factory=threading.Event)
    _key: bytes = field(default_factory=lambda: os.urandom(16))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a client that knows this Hub only and has nothing cached."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        kept.pop("PYTHONPATH", None)
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            **({"HF_TOKEN": token} if token else {}),
        }

    def token(self, name: str = "maria", role: str = "write", organisations: Iterable[str] = ("shop",)) -> str:
        """Return a new token, which looks like a real one."""
        token = "hf_" + hashlib.sha256(os.urandom(16)).hexdigest()[:34]
        self.accounts[token] = Account(name, role, tuple(organisations))
        return token

    def fault(
        self,
        pattern: str,
        times: float = 1,
        status: int | None = None,
        delay: float = 0.0,
        lost: bool = False,
        cut: int | None = None,
        corrupt: bool = False,
        call: Callable[[str], object] | None = None,
    ) -> Fault:
        """Let the next `times` requests go wrong whose "METHOD /path" the regular expression matches in full.

        Args:
            status: Answer this instead of doing what was asked.
            delay: Seconds before anything is done.
            lost: Do what was asked, and close the connection without an answer.
            cut: Close the connection after so many bytes of the answer's body.
            corrupt: Send a body of the right length with other bytes.
            call: Call this with the request before anything is done.
        """
        self.faults.append(Fault(pattern, times, status, delay, lost, cut, corrupt, call))
        return self.faults[-1]

    def commits(self, kind: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """Return the commits of a revision, newest first."""
        return self.repositories[kind, repo_id].log(revision)

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a revision."""
        files = self.repositories[kind, repo_id].find(revision).files
        return {path: blob.content for path, blob in files.items()}

    def link(self, method: str, path: str) -> str:
        """Return a signed link to the storage."""
        return f"{self.storage_url}{path}?signature={self.signature(method, path)}"

    def signature(self, method: str, path: str) -> str:
        return hmac.new(self._key, f"{method} {path}".encode(), "sha256").hexdigest()

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.fullmatch(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def serve(repositories: dict[tuple[str, str], Repository] | None = None) -> Iterator[Hub]:
    """Serve repositories, `("datasets", "shop/pairs")` or `("models", "shop/encoder")`, until the block ends."""
    hub = Hub({} if repositories is None else repositories)
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (_Api, _Storage)]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    for server in servers:
        server.hub = hub
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        hub.closing.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets `_route` answer it, and does what a fault says."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments):
        """Keep the tests' output quiet; `hub.requests` has it all."""

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def _answer(self):
        self.path, _, query = self.path.partition("?")
        self.query = {name: values[-1] for name, values in parse_qs(query).items()}
        request = f"{self.command} {unquote(self.path)}"
        self.hub.requests.append(request)
        fault = self.hub.next_fault(request)
        try:
            self.body = self._read_body()
            if fault and fault.delay:
                self.hub.closing.wait(fault.delay)
            if fault and fault.call:
                fault.call(request)
            try:
                if fault and fault.status:
                    # The clients wait a second more than Retry-After says, else longer after each failure.
                    status, content, headers = fault.status, b"out of order", {"Retry-After": "0"}
                else:
                    status, content, headers = self._route()
            except Refused as refused:
                status, content = refused.status, json.dumps({"error": refused.message}).encode()
                headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            if fault and fault.lost:
                self.close_connection = True
                return
            self._send(status, content, headers, fault)
        except ConnectionError:  # the client was killed or lost its patience
            self.close_connection = True

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline() or b"0", 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: bytes, headers: Mapping[str, str], fault: Fault | None):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault and fault.corrupt:
            content = bytes(255 - byte for byte in content)
        if fault and fault.cut is not None:
            content, self.close_connection = content[: fault.cut], True
        self.wfile.write(content)

    def _content(self, blob: Blob, headers: Mapping[str, str]) -> tuple[int, bytes, dict[str, str]]:
        """Answer with a file, or the part of it that the client asked for."""
        headers = {"ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes", **headers}
        requested = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not requested:
            return 200, blob.content, headers
        size = len(blob.content)
        first, last = int(requested[1]), min(int(requested[2] or size), size - 1)
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{size}"}
        return 206, blob.content[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{size}"}


class _Storage(_Handler):
    """Large files by signed links: /storage/{kind}/{owner}/{name}/{sha256}."""

    def _route(self):
        if "Authorization" in self.headers:
            raise Refused(400, "Only one auth mechanism allowed")  # as S3 says; and no token may come here
        method = "PUT" if self.command == "PUT" else "GET"
        if self.query.get("signature") != self.hub.signature(method, self.path):
            raise Refused(403, "SignatureDoesNotMatch")
        _, _, kind, owner, name, oid = self.path.split("/")
        objects = self.hub.repositories[kind, f"{owner}/{name}"].objects
        if method == "GET":
            return self._content(objects[oid], {})
        blob = Blob(self.body, lfs=True)
        if blob.sha256 != oid:
            raise Refused(400, "XAmzContentSHA256Mismatch")
        objects[oid] = blob
        return 200, b"", {"ETag": f'"{oid}"'}


_REPO = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"


class _Api(_Handler):
    """The Hub itself; each route's groups, unquoted, are the arguments of its method."""

    routes = (
        ("GET|HEAD", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "file"),
        ("GET", _REPO, "info"),
        ("GET", _REPO + r"/revision/([^/]+)", "info"),
        ("GET", _REPO + r"/tree/([^/]+)(?:/(.+))?", "tree"),
        ("POST", _REPO + r"/paths-info/([^/]+)", "paths_info"),
        ("GET", _REPO + r"/commits/([^/]+)", "commits"),
        ("GET", _REPO + r"/refs", "refs"),
        ("GET", _REPO + r"/auth-check(/write)?", "auth_check"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/repos/create", "create"),
        ("DELETE", r"/api/repos/delete", "delete"),
        ("PUT", _REPO + r"/settings", "settings"),
        ("POST", _REPO + r"/preupload/([^/]+)", "preupload"),
        ("POST", r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("POST", _REPO + r"/commit/([^/]+)", "commit"),
        ("POST|DELETE", _REPO + r"/branch/([^/]+)", "branch"),
        ("POST|DELETE", _REPO + r"/tag/([^/]+)", "tag"),
        ("POST", r"/api/collections", "create_collection"),
        ("GET", r"/api/collections/([^/]+/[^/]+)", "collection"),
        ("POST", r"/api/collections/([^/]+/[^/]+)/items", "add_collection_item"),
    )

    def _route(self):
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.account = self.hub.accounts.get(bearer)
        if bearer and self.account is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, self.path)
            if match and self.command in methods.split("|"):
                with self.hub.lock:
                    answer = getattr(self, name)(*(group and unquote(group) for group in match.groups()))
                return answer if isinstance(answer, tuple) else (200, *_json(answer))
        if re.fullmatch(r"/api/(models|datasets|spaces)/[^/]+", self.path):
            raise self._not_found()
        raise Refused(404, "Entry not found", "EntryNotFound")

    # Who may see and do what

    def _not_found(self) -> Refused:
        # As the Hub does: who may not see a repository is not told whether it exists.
        if self.account is None:
            return Refused(401, "Invalid username or password.", "RepoNotFound")
        return Refused(404, "Repository not found", "RepoNotFound")

    def _repository(self, kind: str | None, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind or "models", repo_id))
        own = self.account is not None and self.account.owns(repo_id)
        if repository is None or (repository.private and not own):
            raise self._not_found()
        if write and self.account is None:
            raise Refused(401, "Invalid username or password.")
        if write and not own:
            raise Refused(403, "Authorization error: you don't have the right to write to this repository")
        if write and self.account.role != "write":
            raise Refused(403, 'Forbidden: pass a token with the "write" role')
        return repository

    def _find(self, kind: str | None, repo_id: str, revision: str | None) -> Commit:
        commit = self._repository(kind, repo_id).find(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def _json_body(self) -> dict:
        return json.loads(self.body or b"{}")

    def whoami(self):
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        organisations = [{"type": "org", "name": name, "roleInOrg": "write"} for name in self.account.organisations]
        access_token = {"displayName": "test", "role": self.account.role}
        auth = {"type": "access_token", "accessToken": access_token}
        return {"type": "user", "name": self.account.name, "orgs": organisations, "auth": auth}

    def auth_check(self, kind, repo_id, write):
        self._repository(kind, repo_id, write=bool(write))
        return {}

    # Reading

    def info(self, kind, repo_id, revision=None):
        commit = self._find(kind, repo_id, revision)
        card, blobs = commit.card(), "blobs" in self.query
        siblings = [
            {"rfilename": path, **({"size": len(blob.content), "blobId": blob.oid} if blobs else {})}
            for path, blob in sorted(commit.files.items())
        ]
        return {
            "id": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.id,
            "lastModified": commit.time,
            "private": self._repository(kind, repo_id).private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": siblings,
            **{name: card[name] for name in ("pipeline_tag", "library_name", "sdk") if name in card},
        }

    def tree(self, kind, repo_id, revision, folder):
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = list(self._find(kind, repo_id, revision).tree(folder or "", recursive))
        if folder and not entries:
            raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return entries

    def paths_info(self, kind, repo_id, revision):
        entries = self._find(kind, repo_id, revision).tree("", recursive=True)
        wanted = parse_qs(self.body.decode()).get("paths", [])
        return [entry for entry in entries if entry["path"] in wanted]

    def commits(self, kind, repo_id, revision):
        self._find(kind, repo_id, revision)
        return [commit.describe() for commit in self._repository(kind, repo_id).log(revision)]

    def refs(self, kind, repo_id):
        repository = self._repository(kind, repo_id)

        def describe(refs, folder):
            return [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in refs.items()]

        branches, tags = describe(repository.branches, "heads"), describe(repository.tags, "tags")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    def file(self, kind, repo_id, revision, path):
        commit = self._find(kind, repo_id, revision)
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            codes = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return 404, b"Entry not found", headers | codes
        if not blob.lfs:
            return self._content(blob, headers)
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        link = self.hub.link("GET", f"/storage/{kind or 'models'}/{repo_id}/{blob.sha256}")
        return 302, b"", headers | {"Location": link}

    # Making, changing and deleting repositories

    def create(self):
        body = self._json_body()
        kind = body.get("type", "model") + "s"
        if self.account is None:
            raise Refused(401, "Invalid username or password.")
        repo_id = f"{body.get('organization') or self.account.name}/{body['name']}"
        if not self.account.owns(repo_id) or self.account.role != "write":
            raise Refused(403, f"You don't have the rights to create a {kind[:-1]} under this namespace")
        if kind == "spaces" and "sdk" not in body:
            raise Refused(400, '"sdk" is required')
        url = f"{self.hub.url}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            return 409, *_json({"error": f"You already created this {kind[:-1]} repo", "url": url})
        self.hub.repositories[kind, repo_id] = Repository(private=_is_private(body))
        return {"url": url, "name": repo_id}

    def delete(self):
        body = self._json_body()
        kind, repo_id = body.get("type", "model") + "s", f"{body['organization'] or self.account.name}/{body['name']}"
        self._repository(kind, repo_id, write=True)
        del self.hub.repositories[kind, repo_id]
        return {}

    def settings(self, kind, repo_id):
        repository = self._repository(kind, repo_id, write=True)
        repository.private = _is_private(self._json_body())
        return {"private": repository.private}

    def branch(self, kind, repo_id, name):
        repository = self._repository(kind, repo_id, write=True)
        if self.command == "DELETE":
            if name == "main":
                raise Refused(403, "Cannot delete the main branch")
            if repository.branches.pop(name, None) is None:
                raise Refused(404, f"Branch {name} not found", "RevisionNotFound")
        elif name in repository.branches:
            raise Refused(409, "Reference already exists")
        else:
            start = self._json_body().get("startingPoint")
            repository.branches[name] = self._find(kind, repo_id, start).id
        return {}

    def tag(self, kind, repo_id, name):
        repository = self._repository(kind, repo_id, write=True)
        if self.command == "DELETE":
            if repository.tags.pop(name, None) is None:
                raise Refused(404, f"Tag {name} not found", "RevisionNotFound")
        elif (tag := self._json_body()["tag"]) in repository.tags:
            raise Refused(409, "Tag reference exists already")
        else:
            repository.tags[tag] = self._find(kind, repo_id, name).id  # of a POST, the path names the revision
        return {}

    # Uploading

    def validate_yaml(self):
        content, error = self._json_body()["content"], None
        try:
            card = Commit({"README.md": Blob(content.encode())}, "").card()
        except (yaml.YAMLError, IndexError) as problem:
            error = str(problem)
        else:
            if not isinstance(card, dict):
                error = "metadata must be a mapping"
        status = 400 if error else 200
        return status, *_json({"errors": [{"message": error}] if error else [], "warnings": []})

    def preupload(self, kind, repo_id, revision):
        self._repository(kind, repo_id, write=True)
        committed = self._find(kind, repo_id, revision).files
        answers = []
        for file in self._json_body()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            mode = "lfs" if belongs_in_lfs(path, sample) else "regular"
            oid = committed[path].etag if path in committed else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, kind, repo_id):
        repository = self._repository(kind, repo_id, write=True)
        objects = []
        for wanted in self._json_body()["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.objects:
                path = f"/storage/{kind or 'models'}/{repo_id}/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": self.hub.link("PUT", path)}}
            objects.append(answer)
        return {"transfer": "basic", "objects": objects}

    def commit(self, kind, repo_id, branch):
        repository = self._repository(kind, repo_id, write=True)
        if branch not in repository.branches:
            raise Refused(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        header, *operations = (json.loads(line) for line in self.body.splitlines())
        parent = header["value"].get("parentCommit")
        if parent and not repository.branches[branch].startswith(parent):
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.find(branch).files)
        for operation in operations:
            _apply(operation["key"], operation["value"], files, repository)
        made = repository.add(branch, files, header["value"]["summary"], self.account.name)
        return {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{made.id}", "commitOid": made.id, "success": True}

    # Collections

    def create_collection(self):
        body = self._json_body()
        if self.account is None or self.account.role != "write" or not self.account.owns(body["namespace"]):
            raise Refused(403, "You don't have the rights to create a collection under this namespace")
        words = re.sub(r"\W+", "-", body["title"].lower())
        slug = f"{body['namespace']}/{words}-{hashlib.sha256(body['title'].encode()).hexdigest()[:24]}"
        if slug in self.hub.collections:
            return 409, *_json({"error": "This collection exists already", "slug": slug})
        self.hub.collections[slug] = {
            "slug": slug,
            "title": body["title"],
            "owner": {"name": body["namespace"]},
            "items": [],
            "lastUpdated": "2026-01-01T00:00:00.000Z",
            "position": 0,
            "private": body.get("private", False),
            "theme": "green",
            "upvotes": 0,
        }
        return self.hub.collections[slug]

    def collection(self, slug):
        if slug not in self.hub.collections:
            raise Refused(404, "Collection not found")
        return self.hub.collections[slug]

    def add_collection_item(self, slug):
        collection, item = self.collection(slug), self._json_body()["item"]
        if self.account is None or self.account.role != "write" or not self.account.owns(slug):
            raise Refused(403, "You don't have the rights to change this collection")
        self._repository(f"{item['type']}s", item["id"])
        if any((item["id"], item["type"]) == (known["id"], known["type"]) for known in collection["items"]):
            raise Refused(409, "Item already in the collection")
        position = len(collection["items"])
        collection["items"].append(
            {**item, "_id": f"{position:024x}", "position": position, "repoType": item["type"], "author": "x"}
        )
        return collection


def _json(content: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(content).encode(), {"Content-Type": "application/json"}


def _is_private(body: Mapping[str, object]) -> bool:
    return body["visibility"] == "private" if "visibility" in body else bool(body.get("private"))


def _apply(operation: str, value: Mapping[str, str], files: dict[str, Blob], repository: Repository) -> None:
    """Do one line of a commit."""
    path = value["path"]
    if operation == "file":
        files[path] = Blob(base64.b64decode(value["content"]))
    elif operation == "lfsFile":
        if value["oid"] not in repository.objects:
            raise Refused(400, "Your push was rejected because an LFS pointer pointed to a file that does not exist.")
        files[path] = repository.objects[value["oid"]]
    elif operation == "deletedFile":
        if files.pop(path, None) is None:
            raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
    elif operation == "deletedFolder":
        for below in [file for file in files if file.startswith(path.rstrip("/") + "/")]:
            del files[below]
    else:
        raise Refused(400, f"Unknown operation {operation}")
