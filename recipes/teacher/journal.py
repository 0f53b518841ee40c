"""The journal of `recipes.teacher.generate`: what was paid for is written down before anything else happens.

One file of JSON lines beside the output. The first line holds the settings of the run, every other line one
completion. Lines are only ever appended, each batch in one write, so a process that is killed leaves whole lines and
at most one torn one at the end; opening the journal again cuts that off. Completions may come in any order, and are
told apart by (pair_id, perspective, sample_index).
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.arguments import UserError
from recipes.schemas import COMPLETIONS, make_folder

FORMAT = "lrkd completions 1"
SYNC_SECONDS = 1.0

Key = tuple[str, str, int]


class Journal:
    """Completions on disk, appended durably, one writer at a time.

    Attributes:
        path: The file.
        settings: What the completions in it were made with; None until `begin`.
        done: The keys (pair_id, perspective, sample_index) of the completions in it, with their prompt's hash.
        damaged: Lines that could not be read (a broken disk, an edit by hand); they are made again.
    """

    def __init__(self, path: str | Path, overwrite: bool = False) -> None:
        """Open or create the file, cut off a torn last line, and read what is done.

        Args:
            path: The file; it need not exist.
            overwrite: Begin again, whatever is in it; that is thrown away by `begin`, not before.

        Raises:
            UserError: It cannot be written to, another process is writing to it, or it is not a journal.
        """
        self.path = Path(path)
        self.settings: dict[str, Any] | None = None
        self.done: dict[Key, str] = {}
        self.damaged = 0
        make_folder(self.path.parent)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror}). Choose another output.") from None
        self._lock()
        if not overwrite:
            self._read()
        self._synced = time.monotonic()

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process ends
        except BlockingIOError:
            os.close(self._file)
            raise UserError(f"{self.path}: another process is writing to it. Wait for it, or stop it.") from None

    def _read(self) -> None:
        end = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    if number == 0 and not line.startswith(_START[: len(line)]):
                        self._header(line)  # somebody else's file: refused, not cut
                    break
                end += len(line)
                if number == 0:
                    self.settings = self._header(line)
                elif (record := _decode(line)) is not None:
                    self.done[_key(record)] = record["prompt_hash"]
                else:
                    self.damaged += 1
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)

    def _header(self, line: bytes) -> dict[str, Any]:
        try:
            header = json.loads(line)
            if header["format"] == FORMAT:
                return header["settings"]
        except (ValueError, KeyError, TypeError):
            pass
        raise UserError(
            f"{self.path}: not a journal of this version of recipes.teacher.generate. Choose another output, or pass "
            f"--overwrite to begin again."
        )

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Write the settings of a run, once, before its first completion."""
        self.settings = dict(settings)
        os.ftruncate(self._file, 0)
        self._write(_encode({"format": FORMAT, "settings": self.settings}))
        self.sync()
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name of the new file, too, survives a power cut
        finally:
            os.close(folder)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add completions in one write: a kill leaves them, and a power cut takes at most the last second.

        Args:
            records: Each with `pair_id`, `perspective`, `sample_index`, `prompt_hash` and whatever else is to be kept.
                One whose key is there already is left out.

        Raises:
            UserError: The disk is full. What was written before is kept.
        """
        fresh = {_key(record): record for record in records if _key(record) not in self.done}
        self._write(b"".join(_encode(record) for record in fresh.values()))
        self.done.update((key, record["prompt_hash"]) for key, record in fresh.items())
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def _write(self, content: bytes) -> None:
        try:
            while content:
                content = content[os.write(self._file, content) :]
        except OSError as error:
            raise UserError(
                f"{self.path}: could not be written ({error.strerror}). Free some space and run the same command "
                f"again: {len(self.done):,} completions are kept."
            ) from None

    def sync(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._file)
        self._synced = time.monotonic()

    def records(self) -> Iterator[dict[str, Any]]:
        """Read the completions back, each key once, in the order in which they came."""
        self.sync()
        seen = set()
        with open(self.path, "rb") as file:
            next(file, None)
            for line in file:
                record = _decode(line)
                if record is not None and _key(record) not in seen:
                    seen.add(_key(record))
                    yield record

    def close(self) -> None:
        """Sync, and let another process write."""
        self.sync()
        os.close(self._file)


def refuse_changes(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compare the settings of a journal with those of this run.

    Raises:
        UserError: They differ; says in what, and what to do.
    """
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if changed:
        differences = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changed)
        raise UserError(
            f"{path}: its completions were made with other settings: {differences}. Nothing was sent. Restore the "
            f"settings, choose another --output, or pass --overwrite to throw these completions away."
        )


_START = f'{{"format": "{FORMAT}"'.encode()


def _encode(record: Mapping[str, Any]) -> bytes:
    # In ASCII: a lone surrogate that a server sends must not stop the run, nor a line separator of Unicode a reader.
    return json.dumps(record, ensure_ascii=True).encode() + b"\n"


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        _key(record), record["prompt_hash"]
    except (ValueError, KeyError, TypeError):
        return None
    return record


def _key(record: Mapping[str, Any]) -> Key:
    pair_id, perspective, sample = (record[name] for name in COMPLETIONS.key)
    return pair_id, perspective, sample
