"""The folder of a package: what may not be in it, and how it is written whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from recipes.arguments import UserError, build, read_yaml
from recipes.record import sha256, write_json

if TYPE_CHECKING:
    from hub_cards.dataset import DatasetStatement
    from hub_cards.facts import Statement
    from recipes.publish.package import Files

    S = TypeVar("S", Statement, DatasetStatement)

TEXTS = {".json", ".md", ".py", ".txt", ".yaml", ".yml", ".html", ".jinja", ".css", ".js"}
# An absolute path of at least two parts, or one in the home folder: it names a machine, not a model.
_MACHINE_PATH = re.compile(r"(file://.*|(/|~/|[A-Za-z]:[\\/]|\\\\)[^\s/\\]+[\\/].*|~/.+)", re.DOTALL)
_TOKEN = re.compile(rb"hf\\?_[A-Za-z0-9]{30,}")  # as a card escapes it, too


def sidecar(output: Path) -> Path:
    """Return where the record of a package lies: beside it, so that it is not uploaded."""
    return output.with_name(f"{output.name}.package.json")


def check_repo_id(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse, or one without an owner.

    Raises:
        UserError: It is not owner/name.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"--repo_id {repo_id}: {error}") from None
    if "/" not in repo_id:
        raise UserError(f"--repo_id {repo_id}: expected owner/name.")


def read_statement(path: str | None, kind: str) -> Statement:
    """Read the YAML file of `--facts` for a model or metric; see `read_facts`."""
    from hub_cards.facts import Statement

    return read_facts(path, kind, Statement)


def read_facts(path: str | None, kind: str, cls: type[S]) -> S:
    """Read the YAML file of `--facts` into the dataclass `cls`.

    Raises:
        UserError: It is not given, not readable, lacks a key or has one that is unknown.
        CardError: A value is empty or cannot be.
    """
    from dataclasses import MISSING, fields

    if path is None:
        raise UserError(
            f"--facts: a {kind} needs it. Copy recipes/configs/publish/"
            f"{'facts_bazaar_dataset' if kind == 'dataset' else 'facts_bazaar'}.yaml and write what is true of yours."
        )
    values = read_yaml(cls, path)
    missing = [one.name for one in fields(cls) if one.default is MISSING and one.name not in values]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}, which no run can know. Write it there.")
    statement = build(cls, values, path)
    statement.check(path)
    return statement


def read_record(path: Path, made_by: str) -> dict[str, Any]:
    """Read a JSON record.

    Raises:
        UserError: It is not there, or not JSON.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. {made_by} writes it.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). Make it again with {made_by}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}.")
    return content


def to_json(content: Any) -> bytes:
    """Write JSON as a repository holds it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()


def refuse_private_content(files: Files) -> None:
    """Refuse paths of this machine in JSON files, and access tokens in any text.

    Raises:
        UserError: Naming the file and where in it.
    """
    for name, content in files.items():
        if Path(name).suffix not in TEXTS:
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if _TOKEN.search(data):
            raise UserError(f"{name}: holds what looks like an access token (hf_...). Remove it, and revoke the token.")
        if name.endswith(".json"):
            try:
                found = _machine_path(json.loads(data))
            except ValueError as error:
                raise UserError(f"{name}: not JSON ({error}).") from None
            if found is not None:
                raise UserError(
                    f"{name}: {found[0]} is {found[1]!r}, a path of this machine, which nobody else has. Write "
                    "the Hub id, or remove the key, and package again."
                )


def _machine_path(value: Any, where: str = "") -> tuple[str, str] | None:
    """Return key and value of the first path of a machine. A vocabulary may hold anything."""
    if isinstance(value, str):
        return (where, value) if _MACHINE_PATH.fullmatch(value) else None
    if isinstance(value, Mapping):
        named = next((key for key in value if _MACHINE_PATH.fullmatch(key)), None)
        if named is not None:
            return f"a key of {where or 'it'}", named
        parts = [(f"{where}.{key}" if where else key, part) for key, part in value.items()
                 if key not in ("vocab", "merges", "added_tokens")]  # fmt: skip
    else:
        parts = [(f"{where}[{index}]", part) for index, part in enumerate(value)] if isinstance(value, list) else []
    return next((found for name, part in parts if (found := _machine_path(part, name)) is not None), None)


def check_output(output: Path) -> None:
    """Refuse to write over anything but a package.

    Raises:
        UserError: The output is there and was not written by `write_package`, or holds more than that wrote.
    """
    if not output.exists() and not output.is_symlink():
        return
    record = sidecar(output)
    if not output.is_dir() or output.is_symlink() or not record.is_file():
        raise UserError(f"{output}: exists and is not a package, so it is left alone. Choose another --output.")
    known = read_record(record, "recipes.publish.package").get("files", {})
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if not path.is_dir() and name not in known:
            raise UserError(f"{path}: is not of the package in {output}. Move it away, or choose another --output.")


def write_package(output: Path, files: Files, record: Mapping[str, Any]) -> Path:
    """Write `files` as the folder `output`, and the record with their digests beside it.

    Everything is written beside the folder first and then put in its place, so a kill at any moment leaves the old
    package, the new one, or none; what it leaves beside them is removed by the next call.

    Raises:
        UserError: The output is something else than a package, or the disk refuses.
    """
    check_output(output)
    new, old = (output.with_name(f".{output.name}.{state}") for state in ("packaging", "replaced"))
    shutil.rmtree(new, ignore_errors=True)
    for unfinished in output.parent.glob(f".{sidecar(output).name}.*.tmp"):  # write_json's
        unfinished.unlink()
    try:
        for name, content in files.items():
            target = new / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)
        digests = {name: sha256(new / name) for name in sorted(files)}
        # Old away, record, new in place: a folder never lies beside the record of another one.
        if output.exists():
            shutil.rmtree(old, ignore_errors=True)
            output.replace(old)
        path = write_json(sidecar(output), {**record, "files": digests})
        new.replace(output)
    except OSError as error:
        raise UserError(f"{output}: could not be written ({error}). Free space or choose another --output.") from None
    finally:
        if old.exists() and not output.exists():
            old.replace(output)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
    return path
