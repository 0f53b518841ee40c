"""The folder that `recipes.publish.package` made, checked before any of it is uploaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

# What the Hub's access tokens look like; a card escapes the underscore, as markdown wants it.
TOKEN = re.compile(rb"hf\\?_[A-Za-z0-9]{30,}")
# Folders that git and the Hub's clients keep for themselves: the Hub takes no file under them.
RESERVED = {".git", ".cache"}
AGAIN = "Package it again: python -m recipes.publish.package"


@dataclass(frozen=True)
class PackagedFile:
    """One file of the folder: its size in bytes, and the ids that git and LFS give its content."""

    size: int
    sha256: str
    git_oid: str


@dataclass(frozen=True)
class PackagedFolder:
    """A folder that is what was packaged, and nothing else.

    Attributes:
        path: Where it lies.
        repo_id: The repository that it was packaged for, which its card names; None if the record does not say.
        kind: `student`, `adapter`, `dataset`, `metric` or `space`.
        repo_type: `model`, `dataset` or `space`.
        files: Path in the folder, with slashes -> the file.
        card: The metadata at the head of README.md.
    """

    path: Path
    repo_id: str | None
    kind: str
    repo_type: str
    files: dict[str, PackagedFile]
    card: dict[str, Any]


def sidecar_of(folder: str | Path) -> Path:
    """Return where `package` records what it put in a folder: beside it, `<folder>.package.json`."""
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f"{folder.name}.package.json")


def read_packaged(folder: str | Path, secrets: Iterable[str] = ()) -> PackagedFolder:
    """Check a folder against the record of its packaging.

    Args:
        folder: As `recipes.publish.package` wrote it.
        secrets: Texts that must not occur in any file, beside everything that looks like a token of the Hub.

    Raises:
        UserError: The folder was not packaged, or a file was changed, added or lost since; a link leads out of it; a
            file holds a token; README.md or its metadata is missing.
    """
    from tqdm import tqdm

    root = Path(os.path.abspath(folder))
    record = _read_record(root)
    found = _list_files(root)
    packed = record["files"]
    for path in sorted(set(found) - set(packed)):
        raise UserError(f"{root / path}: was not packaged, so it is not pushed. Remove it, or put it in and {_lower()}")
    for path in sorted(set(packed) - set(found)):
        raise UserError(f"{root / path}: was packaged and is missing. {AGAIN}")
    if "README.md" not in found:
        raise UserError(f"{root}: has no README.md. {AGAIN}")
    for path in found:
        if RESERVED & set(path.split("/")):
            raise UserError(f"{root / path}: the Hub takes no files under {' or '.join(sorted(RESERVED))}. Remove it.")
    files = {}
    size = sum(file.stat().st_size for file in found.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc="Checking", disable=size < 1 << 26) as bar:
        for path, file in sorted(found.items()):
            files[path] = _read_file(file, [secret.encode() for secret in secrets], bar)
            if files[path].sha256 != packed[path]:
                raise UserError(f"{file}: has changed since it was packaged. {AGAIN}")
    card = _read_card(root / "README.md")
    return PackagedFolder(root, record["repo_id"], record["kind"], record["repo_type"], files, card)


def _lower() -> str:
    return AGAIN[0].lower() + AGAIN[1:]


def _read_record(root: Path) -> dict[str, Any]:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Expected one that python -m recipes.publish.package made.")
    path = sidecar_of(root)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        files, repo_type = dict(record["files"]), record["repo_type"]
    except FileNotFoundError:
        raise UserError(
            f"{root}: was not packaged ({path.name} is not beside it). Pass a folder that "
            "python -m recipes.publish.package made."
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path}: not the record of a packaged folder ({error!r}). {AGAIN}") from None
    if repo_type not in ("model", "dataset", "space"):
        raise UserError(f"{path}: repo_type is {repo_type!r}; expected model, dataset or space. {AGAIN}")
    kind, repo_id = record.get("kind", repo_type), record.get("repo_id")
    return {"repo_id": repo_id, "kind": kind, "repo_type": repo_type, "files": files}


def _list_files(root: Path) -> dict[str, Path]:
    files = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{path}: is a link that leads out of the folder. Put the file itself there, or remove it.")
        if path.is_file():
            files[path.relative_to(root).as_posix()] = path
        elif not path.is_dir():
            raise UserError(f"{path}: is not a regular file. Remove it.")
    return files


def _read_file(path: Path, secrets: list[bytes], bar: Any) -> PackagedFile:
    """Read a file once: for both ids, and for tokens."""
    size = path.stat().st_size
    sha256, git = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    tail = b""
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            git.update(chunk)
            bar.update(len(chunk))
            window = tail + chunk  # a token may lie across two chunks
            if TOKEN.search(window) or any(secret in window for secret in secrets):
                raise UserError(
                    f"{path}: holds what looks like an access token of the Hub. Nothing was pushed. Take it out, "
                    "package again, and revoke the token if others may have seen it: https://huggingface.co/settings/tokens"
                )
            tail = window[-1024:]
    return PackagedFile(size, sha256.hexdigest(), git.hexdigest())


def _read_card(readme: Path) -> dict[str, Any]:
    import yaml
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(readme)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{readme}: its metadata is not YAML ({error}). {AGAIN}") from None
    if not card:
        raise UserError(f"{readme}: has no metadata between two lines of --- at its head. {AGAIN}")
    return dict(card)
