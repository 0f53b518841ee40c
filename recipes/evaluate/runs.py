"""Find the runs to compare, and read their predictions onto one row order."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.schemas import PREDICTIONS, LabelSchema, read

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Run:
    """One system trained with one seed, and the file of its predictions."""

    system: str
    seed: int
    predictions: Path


def list_runs(named: Sequence[str], runs_file: str | None) -> list[Run]:
    """Collect runs.

    Args:
        named: `NAME=PATH`, PATH a file of predictions, a folder with predictions.parquet, or a wildcard of either.
        runs_file: JSON lines with `system`, `predictions` (relative to the runs file) and optional `seed`.

    Raises:
        UserError: Something is not NAME=PATH, a line is not a run, or a system has the same seed twice.
    """
    found: list[tuple[str, Path, int | None]] = []
    for text in named:
        name, _, pattern = text.partition("=")
        if not (name and pattern):
            raise UserError(f"--runs {text}: expected NAME=DIR, e.g. gat=runs/eval/gat.")
        found += [(name, Path(path), None) for path in sorted(glob.glob(pattern)) or [pattern]]
    if runs_file is not None:
        found += _read_runs_file(Path(runs_file))

    runs: dict[tuple[str, int], Run] = {}
    for system, path, given in found:
        file = path / "predictions.parquet" if path.is_dir() else path
        recorded = _recorded_seed(file) if given is None else given
        seed = sum(run.system == system for run in runs.values()) if recorded is None else recorded
        if (system, seed) in runs:
            raise UserError(
                f"{file}: system {system!r} with seed {seed} is already given by "
                f"{runs[system, seed].predictions}. Keep one of the two, or give another name or seed."
            )
        runs[system, seed] = Run(system, seed, file)
    return list(runs.values())


def _recorded_seed(predictions: Path) -> int | None:
    record = predictions.with_name("metrics.json")
    return json.loads(record.read_text(encoding="utf-8")).get("facts", {}).get("seed") if record.is_file() else None


def _read_runs_file(path: Path) -> list[tuple[str, Path, int | None]]:
    if not path.is_file():
        raise UserError(f"--runs_file {path}: no such file.")
    found: list[tuple[str, Path, int | None]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            seed = record.get("seed")
            found.append((record["system"], path.parent / record["predictions"], None if seed is None else int(seed)))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: line {number}: not a run ({error!r}); "
                'expected {"system": "gat", "predictions": "gat-1/predictions.parquet", "seed": 1}.'
            ) from None
    return found


def read_aligned(runs: Sequence[Run], schema: LabelSchema) -> list[pd.DataFrame]:
    """Read the predictions of each run, rows in the order of the first.

    Raises:
        UserError: A file breaks its contract, or is on other pairs, queries, locales or labels than the first.
    """
    tables: list[pd.DataFrame] = []
    for run in runs:
        table = read(run.predictions, PREDICTIONS)
        table["label"] = schema.canonical_column(table["label"], run.predictions)
        if tables:
            table = _align(table, tables[0], run.predictions, runs[0].predictions)
        tables.append(table)
    return tables


def _align(table: pd.DataFrame, reference: pd.DataFrame, path: Path, reference_path: Path) -> pd.DataFrame:
    advice = "Systems are compared on the same pairs: score them on the same split with recipes.evaluate.run."
    for ids, others, has, lacks in (
        (reference["pair_id"], table["pair_id"], reference_path, path),
        (table["pair_id"], reference["pair_id"], path, reference_path),
    ):
        extra = ids[~ids.isin(others)]
        if len(extra):
            raise UserError(
                f"{lacks}: pair {extra.iloc[0]!r} is missing, which {has} has ({len(extra)} such pairs). {advice}"
            )
    table = table.set_index("pair_id").loc[reference["pair_id"]].reset_index()
    for column in ("label", "query", "locale"):
        differs = (table[column] != reference[column]).to_numpy()
        if differs.any():
            row = int(differs.argmax())
            raise UserError(
                f"{path}: pair {table['pair_id'][row]!r}: {column} is {table[column][row]!r}; "
                f"{reference_path} has {reference[column][row]!r}. {advice}"
            )
    return table
