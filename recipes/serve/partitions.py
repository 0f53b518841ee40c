"""Parquet files as partitions, on any storage: found, read, and written whole or not at all.

A path is local, or a URI that pyarrow knows: `s3://bucket/folder`, `hf://datasets/owner/name/folder` (read only).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.record import sha256

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.fs import FileInfo, FileSystem

MANIFEST = "_manifest.json"  # what reads a folder of parquet leaves such names alone


@dataclass(frozen=True)
class Partition:
    """Rows `start` to `stop` of one input file; its results are `part-<number>.parquet`."""

    number: int
    path: str
    start: int
    stop: int

    @property
    def name(self) -> str:
        """File of its results."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True)
class Storage:
    """A folder or file on some storage; what is opened here is opened anew in every process."""

    uri: str

    def open(self) -> tuple[FileSystem, str]:
        """Return the file system and the path on it.

        Raises:
            UserError: The kind of storage is not known, or it cannot be reached.
        """
        import pyarrow as pa
        from pyarrow.fs import FileSystem, LocalFileSystem

        if "://" not in self.uri:
            return LocalFileSystem(), str(Path(self.uri).resolve())
        try:
            file_system, path = FileSystem.from_uri(self.uri)
        except (pa.ArrowInvalid, OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.uri}: not a storage that can be reached ({error}).") from None
        return file_system, path.rstrip("/")

    def info(self, name: str = "") -> FileInfo:
        """Return what is known of a file of the folder; without a name: of the folder or file itself.

        Raises:
            UserError: The storage does not answer, or not to us.
        """
        file_system, folder = self.open()
        try:
            return file_system.get_file_info(f"{folder}/{name}".rstrip("/"))
        except OSError as error:
            advice = "Check the path" + (
                ", the network, and AWS_ENDPOINT_URL, AWS_REGION and the credentials in the environment."
                if self.uri.startswith("s3://")
                else ", and whether you may read it."
            )
            raise UserError(f"{self.uri}: could not be reached ({error}). {advice}") from None

    def exists(self, name: str) -> bool:
        """Whether the folder holds such a file."""
        return bool(self.info(name).is_file)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file of the folder, None if there is none.

        Raises:
            UserError: It is damaged.
        """
        if not self.exists(name):
            return None
        file_system, folder = self.open()
        try:
            with file_system.open_input_file(f"{folder}/{name}") as file:
                return dict(json.loads(file.read()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.uri}/{name}: not readable ({error}). Delete it, or choose another.") from None

    def names(self, ending: str) -> list[str]:
        """Return the names in the folder with this ending, sorted; none if there is no folder.

        Raises:
            UserError: It is no folder, or may not be listed.
        """
        from pyarrow.fs import FileSelector

        file_system, folder = self.open()
        try:
            found = file_system.get_file_info(FileSelector(folder, allow_not_found=True))
        except OSError as error:
            raise UserError(f"{self.uri}: not a folder that can be listed ({error}). Choose another.") from None
        return sorted(file.base_name for file in found if file.base_name.endswith(ending))

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the folder: on disks beside it and renamed, elsewhere as one object (which needs no folder).

        Raises:
            UserError: The storage refuses it.
        """
        from pyarrow.fs import LocalFileSystem

        file_system, folder = self.open()
        is_local = isinstance(file_system, LocalFileSystem)
        place = f"{folder}/.{name}.tmp" if is_local else f"{folder}/{name}"
        try:
            if is_local:
                file_system.create_dir(folder, recursive=True)
            with file_system.open_output_stream(place) as file:
                file.write(content)
            if is_local:
                file_system.move(place, f"{folder}/{name}")
        except OSError as error:
            raise UserError(
                f"{self.uri}/{name}: could not be written ({error}). Nothing that stands is lost: see that the folder "
                "or bucket is there and may be written to, and run the same command again."
            ) from None


def find_inputs(storage: Storage, columns: Sequence[str], taken: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parquet files of a folder, or the one that `storage` is, each checked and named by its content.

    Args:
        storage: Where they are.
        columns: String columns that each must have.
        taken: Columns that the results add, which no input may have.

    Returns:
        `path`, `rows`, `bytes` and `digest`: the SHA-256 of a local file, elsewhere that of its footer.

    Raises:
        UserError: Nothing is there, a file is no parquet, lacks a column or has one too many, or no file has a row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from pyarrow.fs import FileSelector, FileType, LocalFileSystem

    file_system, root = storage.open()
    info = storage.info()
    try:
        if info.type == FileType.Directory:
            found = file_system.get_file_info(FileSelector(root, recursive=True))
            files = sorted((f for f in found if f.path.endswith(".parquet")), key=lambda file: file.path)
        else:
            files = [info] if info.type == FileType.File else []
    except OSError as error:
        raise UserError(f"{storage.uri}: could not be read ({error}).") from None
    if not files:
        raise UserError(f"{storage.uri}: no parquet file there. Pass a parquet file, or a folder of them.")
    inputs, schema = [], None
    for file in files:
        try:
            with file_system.open_input_file(file.path) as source:
                parquet = pq.ParquetFile(source)
                footer, own = parquet.metadata, parquet.schema_arrow
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{file.path}: not a readable parquet file ({error}).") from None
        if footer.num_rows:  # without rows, pandas for one does not know the types of its columns
            _check_schema(own, file.path, columns, taken)
            own = own.remove_metadata()
            if schema is not None and own != schema:
                raise UserError(f"{file.path}: has other columns than the files before it. Score it by itself.")
            schema = own
        local = isinstance(file_system, LocalFileSystem)
        described = json.dumps(footer.to_dict(), default=str, sort_keys=True).encode()
        digest = sha256(file.path) if local else hashlib.sha256(described).hexdigest()
        name = file.path.removeprefix(root).lstrip("/") or file.path.rsplit("/", 1)[-1]
        inputs.append({"path": name, "rows": footer.num_rows, "bytes": file.size, "digest": digest})
    if not any(item["rows"] for item in inputs):
        raise UserError(f"{storage.uri}: has no rows. Expected (query, product) pairs.")
    return inputs


def _check_schema(schema: pa.Schema, path: str, columns: Sequence[str], taken: Sequence[str]) -> None:
    import pyarrow as pa

    for name in columns:
        if name not in schema.names:
            raise UserError(f"{path}: column {name!r} is missing; found {', '.join(schema.names)}.")
        kind = schema.field(name).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: column {name!r} holds {kind}; expected string.")
    if again := [name for name in taken if name in schema.names]:
        raise UserError(f"{path}: has a column {again[0]!r}, which the results bring. Rename or drop it.")


def plan(inputs: Sequence[dict[str, Any]], rows: int) -> list[Partition]:
    """Cut the inputs into partitions of at most `rows` rows, none of two files.

    >>> [(p.path, p.start, p.stop) for p in plan([{"path": "a", "rows": 5}, {"path": "b", "rows": 1}], rows=3)]
    [('a', 0, 3), ('a', 3, 5), ('b', 0, 1)]
    """
    spans = [
        (item["path"], start, min(start + rows, item["rows"]))
        for item in inputs
        for start in range(0, item["rows"], rows)
    ]
    return [Partition(number, *span) for number, span in enumerate(spans)]


def read_partition(storage: Storage, partition: Partition) -> pa.Table:
    """Read the rows of one partition, and of the row groups that they lie in no others."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file_system, root = storage.open()
    try:
        with file_system.open_input_file(root if storage.info().is_file else f"{root}/{partition.path}") as source:
            parquet = pq.ParquetFile(source)
            groups, before, seen = [], None, 0
            for number in range(parquet.num_row_groups):
                size = parquet.metadata.row_group(number).num_rows
                if seen < partition.stop and seen + size > partition.start:
                    groups.append(number)
                    before = seen if before is None else before
                seen += size
            table = parquet.read_row_groups(groups)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{partition.path}: could not be read ({error}).") from None
    return table.slice(partition.start - (before or 0), partition.stop - partition.start)


def write_partition(storage: Storage, partition: Partition, table: pa.Table) -> None:
    """Write the results of one partition, whole or not at all."""
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    storage.write(partition.name, buffer.getvalue())


def rows_of(storage: Storage, partition: Partition) -> int | None:
    """Return how many results of a partition are there, None if it is not finished."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not storage.exists(partition.name):
        return None
    file_system, folder = storage.open()
    try:
        with file_system.open_input_file(f"{folder}/{partition.name}") as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    except (pa.ArrowInvalid, OSError):
        return None  # damaged: score it again
