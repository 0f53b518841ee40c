"""Where pairs come from: a Hub dataset, or local parquet, csv, tsv, json and jsonl files, with the same columns out."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    Part = tuple[str, str | None, pa.Table]  # name for messages, split if the name tells it, wanted columns as text

SUFFIXES = (".parquet", ".csv", ".tsv", ".json", ".jsonl")
# Amazon ESCI's own names -> ours. Our own names are recognised as they are, and win.
ESCI_COLUMNS = {
    "example_id": "pair_id",
    "product_locale": "locale",
    "esci_label": "label",
    "product_brand": "brand",
    "product_color": "color",
    "product_bullet_point": "bullet_point",
    "product_description": "description",
}
REQUIRED = ("query", "product_title", "label")
# Read where they are there; what else travels along is the caller's choice.
USED = ("pair_id", "locale", "product_id", "split", "large_version", "small_version")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def read_source(
    sources: Sequence[str],
    columns: Mapping[str, str],
    extra: Sequence[str] = (),
    encoding: str = "utf-8",
    subset: str | None = None,
    revision: str | None = None,
) -> tuple[pd.DataFrame, str | None]:
    """Read every row of a source, only the columns that are needed, every cell a string or null.

    Args:
        sources: One Hub dataset id, or files, folders and globs.
        columns: The source's column name -> ours, for names that are not recognised.
        extra: Further columns of ours to read where they are there.
        encoding: Of csv, tsv, json and jsonl files.
        subset: Configuration of a Hub dataset.
        revision: Commit, branch or tag of a Hub dataset.

    Returns:
        The rows under our column names, `split` as the source names it (its column, else the Hub's split or a word of
        the file's name, else null), with `file` and `row` to point at a row, and the commit of a Hub dataset.

    Raises:
        UserError: Nothing there, not readable, or a column is missing.
    """
    import pandas as pd

    commit = None
    if _is_hub_id(sources):
        commit, parts = _read_hub(sources[0], columns, extra, subset, revision)
    else:
        if subset or revision:
            raise UserError(f"`subset` and `revision` are for Hub datasets; {', '.join(sources)} is local.")
        parts = _read_files(_files(sources), columns, extra, encoding)
    frames = []
    for name, split, table in parts:
        frame = table.to_pandas()
        if "split" not in frame:
            frame["split"] = split
        frames.append(frame.assign(file=name, row=range(len(frame))))
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(file=frame["file"].astype("category")), commit


def _is_hub_id(sources: Sequence[str]) -> bool:
    name = sources[0]
    return (
        len(sources) == 1
        and not Path(name).exists()
        and not name.endswith(SUFFIXES)
        and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None
    )


def _read_hub(
    dataset_id: str, columns: Mapping[str, str], extra: Sequence[str], subset: str | None, revision: str | None
) -> tuple[str, Iterator[Part]]:
    """Download a dataset; the commit is resolved once, so what is recorded is what is read."""
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetGenerationError

    try:
        builder = load_dataset_builder(dataset_id, name=subset, revision=revision)
        builder.download_and_prepare()
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        raise UserError(
            f"{dataset_id}: no such file or folder here, and the Hub does not give it ({_first_line(error)}). Check "
            "the name, --revision, --subset (where it has several configurations) and the network; a private or gated "
            "one needs `hf auth login`."
        ) from None

    def parts() -> Iterator[Part]:
        for split, dataset in builder.as_dataset().items():
            name = f"{dataset_id} ({split})"
            wanted = _wanted(dataset.column_names, columns, extra, name)
            table = dataset.select_columns(list(wanted)).with_format("arrow")[:]
            yield name, SPLIT_NAMES.get(split, split), _as_strings(table, wanted, name)

    return builder.hash, parts()


def _files(sources: Sequence[str]) -> list[Path]:
    """Expand folders and globs, in the order of their names."""
    files: list[Path] = []
    for source in sources:
        if Path(source).is_dir():
            found = [path for path in sorted(Path(source).iterdir()) if path.suffix in SUFFIXES]
            # Next to pairs lies the report that this stage writes.
            found = [path for path in found if path.name != "report.json"]
        elif Path(source).is_file():
            found = [Path(source)]
        else:
            found = [Path(path) for path in sorted(glob.glob(source, recursive=True))]
        if not found:
            raise UserError(
                f"{source}: no such file. Expected a Hub dataset id, or files, folders, globs of {', '.join(SUFFIXES)}."
            )
        files += found
    for path in files:
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}.")
    return files


def _read_files(
    files: Sequence[Path], columns: Mapping[str, str], extra: Sequence[str], encoding: str
) -> Iterator[Part]:
    import pyarrow as pa

    for path in files:
        words = re.split(r"[^a-z]+", path.stem.lower())
        split = next((word for word in words if word in SPLIT_NAMES), None)
        try:
            if path.suffix == ".parquet":
                table, wanted = _read_parquet(path, columns, extra)
            elif path.suffix in (".json", ".jsonl"):
                table, wanted = _read_json(path, columns, extra, encoding)
            else:
                table, wanted = _read_csv(path, columns, extra, encoding)
        except UnicodeDecodeError as error:
            raise _undecodable(path, encoding, error) from None
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{path}: not a readable {path.suffix[1:]} file ({_first_line(error)}).") from None
        yield str(path), split, _as_strings(table, wanted, path)


def _read_parquet(path: Path, columns: Mapping[str, str], extra: Sequence[str]) -> tuple[pa.Table, dict[str, str]]:
    import pyarrow.parquet as pq

    wanted = _wanted(pq.read_schema(path).names, columns, extra, path)
    return pq.ParquetFile(path).read(columns=list(wanted)), wanted


def _read_csv(
    path: Path, columns: Mapping[str, str], extra: Sequence[str], encoding: str
) -> tuple[pa.Table, dict[str, str]]:
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    delimiter = "\t" if path.suffix == ".tsv" else ","
    with path.open(encoding="utf-8-sig" if encoding == "utf-8" else encoding, newline="") as file:
        header = next(csv.reader(file, delimiter=delimiter), [])
    wanted = _wanted(header, columns, extra, path)
    try:
        table = arrow_csv.read_csv(
            path,
            # Without threads the errors name the row.
            read_options=arrow_csv.ReadOptions(encoding=encoding, use_threads=False),
            parse_options=arrow_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            # Only an empty cell is null: a product may be called NA, null or None, and an id may be 007.
            convert_options=arrow_csv.ConvertOptions(
                include_columns=list(wanted),
                column_types=dict.fromkeys(wanted, pa.string()),
                null_values=[""],
                strings_can_be_null=True,
            ),
        )
    except pa.ArrowInvalid:
        path.read_bytes().decode(encoding)  # Arrow does not say where a byte cannot be decoded; this does
        raise
    return table, wanted


def _read_json(
    path: Path, columns: Mapping[str, str], extra: Sequence[str], encoding: str
) -> tuple[pa.Table, dict[str, str]]:
    """Read one JSON object a line, or one array of objects; only the wanted keys are held."""
    import pyarrow as pa

    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    with path.open(encoding=encoding) as file:
        rows = enumerate(_json_array(path, file.read()) if path.suffix == ".json" else _json_lines(path, file))
        wanted: dict[str, str] | None = None
        cells: dict[str, list[str | None]] = {}
        for number, row in rows:
            if not isinstance(row, dict):
                raise UserError(f"{path}: row {number}: expected an object, found {type(row).__name__}.")
            if wanted is None:
                wanted = _wanted(list(row), columns, extra, path)
                cells = {name: [] for name in wanted}
            for name, column in cells.items():
                value = row.get(name)
                column.append(value if value is None or isinstance(value, str) else json.dumps(value))
    if wanted is None:
        raise UserError(f"{path}: no rows.")
    try:
        return pa.table({name: pa.array(column, pa.large_string()) for name, column in cells.items()}), wanted
    except UnicodeEncodeError as error:
        # json accepts "\ud83d" without its other half, which no encoding can write.
        name, number = next((n, i) for n, c in cells.items() for i, value in enumerate(c) if value == error.object)
        raise UserError(f"{path}: row {number}, column {name!r}: half of a surrogate pair ({error.reason}).") from None


def _json_lines(path: Path, lines: Iterator[str]) -> Iterator[object]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}: line {number}, column {error.colno}: not JSON ({error.msg}).") from None


def _json_array(path: Path, text: str) -> list[object]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several objects, one a line, under the name .json
            return list(_json_lines(path, iter(text.splitlines())))
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON ({error.msg}).") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected an array of objects or one object a line, found one {type(rows).__name__}.")
    return rows


def _wanted(found: Sequence[str], columns: Mapping[str, str], extra: Sequence[str], source: object) -> dict[str, str]:
    """Choose the columns to read: the source's name -> ours."""
    for name in columns:
        if name not in found:
            raise UserError(f"{source}: `columns` maps {name!r}, which is not there; found {', '.join(found)}.")
    wanted: dict[str, str] = {}
    for ours in (*REQUIRED, *USED, *extra):
        mapped = [name for name, target in columns.items() if target == ours]
        esci = [name for name, target in ESCI_COLUMNS.items() if target == ours]
        candidates = [name for name in (*mapped, ours, *esci) if name in found]
        if candidates:
            wanted[candidates[0]] = ours
        elif ours in REQUIRED:
            raise UserError(
                f"{source}: no column for {ours!r} (or {' or '.join(esci) or 'another known name'}); found "
                f"{', '.join(found)}. Say which it is: --columns NAME={ours}."
            )
    return wanted


def _as_strings(table: pa.Table, wanted: Mapping[str, str], source: object) -> pa.Table:
    import pyarrow as pa

    arrays = {}
    for name, ours in wanted.items():
        try:
            arrays[ours] = table.column(name).cast(pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            kind = table.column(name).type
            raise UserError(f"{source}: column {name!r} holds {kind}; expected text or numbers.") from None
    return pa.table(arrays)


def _undecodable(path: Path, encoding: str, error: UnicodeDecodeError) -> UserError:
    """Say which byte on which line, by decoding line after line."""
    place = ""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError as inner:
                place = f"line {number}, byte {inner.start + 1} of it (0x{line[inner.start]:02x})"
                break
    return UserError(
        f"{path}: {place or error.reason} is not {encoding}. Pass --encoding with the file's own (latin-1, cp1252, "
        "shift_jis, utf-16 ...), or convert it: iconv -f latin1 -t utf-8."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
