"""A repository of the test Hub: blobs with git's and LFS's own ids, commits, branches and tags, all in memory."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import yaml

# What the Hub keeps in LFS by name; other binary files go there too, as on the Hub.
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".onnx", ".parquet", ".arrow", ".npy", ".npz", ".gz", ".zip", ".tar")
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()


def belongs_in_lfs(path: str, sample: bytes) -> bool:
    """Say whether the Hub wants a file, known by its name and first bytes, as LFS."""
    return path.endswith(LFS_SUFFIXES) or b"\0" in sample


@dataclass(frozen=True)
class Blob:
    """The content of one file."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        head = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n"
        return f"{head}size {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        """The id that git gives the file, or the pointer of an LFS file."""
        content = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, object]:
        """Describe the file as `tree` and `paths-info` do."""
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """All files as of one commit."""

    files: Mapping[str, Blob]
    title: str
    parent: str | None = None
    author: str = "system"
    date: datetime = field(default_factory=lambda: datetime.now(timezone.utc))

    @cached_property
    def id(self) -> str:
        tree = {path: blob.oid for path, blob in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([self.parent, self.title, tree]).encode()).hexdigest()

    @property
    def time(self) -> str:
        return self.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def describe(self) -> dict[str, object]:
        authors = [{"user": self.author}]
        return {"id": self.id, "title": self.title, "message": "", "authors": authors, "date": self.time}

    def card(self) -> dict[str, object]:
        """The metadata at the head of README.md."""
        readme = self.files.get("README.md", Blob(b"")).content.decode()
        return (yaml.safe_load(readme.split("---")[1]) if readme.startswith("---") else None) or {}

    def tree(self, folder: str, recursive: bool) -> Iterator[dict[str, object]]:
        """List the files and folders in a folder; recursive: and in those below it."""
        prefix = f"{folder}/" if folder else ""
        folders = set()
        for path, blob in sorted(self.files.items()):
            if not path.startswith(prefix):
                continue
            *parents, _ = path[len(prefix) :].split("/")
            for depth in range(1, len(parents) + 1):
                parent = prefix + "/".join(parents[:depth])
                if parent not in folders and (recursive or depth == 1):
                    folders.add(parent)
                    yield {"type": "directory", "path": parent, "oid": Blob(parent.encode()).oid, "size": 0}
            if recursive or not parents:
                yield blob.describe(path)


class Repository:
    """A repository, born with one commit of `files`: path -> content."""

    def __init__(self, files: Mapping[str, bytes] | None = None, private: bool = False):
        files = {".gitattributes": GITATTRIBUTES} if files is None else files
        blobs = {path: Blob(content, belongs_in_lfs(path, content[:512])) for path, content in files.items()}
        first = Commit(blobs, "initial commit")
        self.private = private
        self.history = {first.id: first}
        self.branches = {"main": first.id}
        self.tags: dict[str, str] = {}
        # What the storage holds of this repository, by sha256: uploaded, whether committed or not.
        self.objects = {blob.sha256: blob for blob in blobs.values() if blob.lfs}

    @classmethod
    def of_folder(cls, folder: Path, private: bool = False) -> Repository:
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        return cls(files, private)

    @property
    def commit(self) -> str:
        """The id of main's newest commit."""
        return self.branches["main"]

    def find(self, revision: str = "main") -> Commit | None:
        """Return the commit that a branch, a tag, or an id of at least seven digits names."""
        named = self.branches.get(revision) or self.tags.get(revision)
        if named is None and len(revision) >= 7:
            named = next((commit for commit in self.history if commit.startswith(revision)), None)
        return self.history.get(named)

    def log(self, revision: str = "main") -> list[Commit]:
        """Return the commits that lead to a revision, newest first."""
        commits = [self.find(revision)]
        while commits[-1].parent is not None:
            commits.append(self.history[commits[-1].parent])
        return commits

    def add(self, branch: str, files: Mapping[str, Blob], title: str, author: str = "system") -> Commit:
        """Put a commit, which is all of `files`, on a branch."""
        commit = Commit(dict(files), title, self.branches[branch], author)
        self.history[commit.id] = commit
        self.branches[branch] = commit.id
        return commit

    def export(self, folder: Path, revision: str = "main") -> Path:
        """Write the files of a revision as a plain git folder, for servers that serve one."""
        for path, blob in self.find(revision).files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(blob.content)
        identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        for command in (["init", "--quiet", "--initial-branch=main"], ["add", "--all", "--force"]):
            subprocess.run(["git", *command], cwd=folder, check=True)
        subprocess.run(["git", *identity, "commit", "--quiet", "--message=all files"], cwd=folder, check=True)
        return folder
