"""Rows a second that `recipes.serve.score` gains with a second worker, and what a billion pairs cost at that rate.

    python -m recipes.bench.scaling
    python -m recipes.bench.scaling --model runs/esci/exported --pairs runs/esci/pairs --price_per_core_hour 0.04

Scores the same pairs with one worker on one core, two workers on a core each (a Ray Data job), and one worker on two
cores, in turn. A rate counts from a run's first finished partition to its last: a billion pairs do not notice how long
Ray takes to start. Writes scaling.json and scaling.md.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.bench.measure import RESULTS, facts, paired_ratio, show_ratio, table, write_results
from recipes.schemas import make_folder

PAIRS = 1_000_000_000
SETTINGS = {"1 worker, 1 core": (1, 1), "2 workers, 1 core each": (2, 1), "1 worker, 2 cores": (1, 2)}


@dataclass
class ScalingArguments:
    """Options of the scaling bench."""

    output: str = field(default=RESULTS, metadata={"help": "Folder of scaling.json and scaling.md."})
    work: str = field(default="runs/bench", metadata={"help": "Folder of the quick student, exports and scores."})
    model: str | None = field(default=None, metadata={"help": "Folder of a student (None: a quick one)."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs of its marketplace."})
    labels: str = field(default="aliexpress6", metadata={"help": "Label schema of the pairs."})
    rows: int = field(default=2400, metadata={"help": "Pairs a run scores."})
    partition_rows: int = field(default=200, metadata={"help": "Of them a partition."})
    rounds: int = field(default=2, metadata={"help": "Runs of each setting, in turn."})
    patience: float = field(default=45.0, metadata={"help": "Seconds after which no further round begins."})
    price_per_core_hour: float | None = field(default=None, metadata={"help": "What a core costs you an hour."})


def rate(folder: Path) -> float:
    """Return rows a second between the first partition and the last, by when their files were written.

    Raises:
        UserError: There are fewer than two partitions.
    """
    import pyarrow.parquet as pq

    parts = folder.glob("part-*.parquet")
    written = sorted((path.stat().st_mtime_ns, pq.read_metadata(path).num_rows) for path in parts)
    if len(written) < 2 or written[-1][0] == written[0][0]:
        raise UserError(
            f"{folder}: too few partitions to tell a rate. Pass more --rows, or a smaller --partition_rows."
        )
    rows = sum(count for _, count in written[1:])  # the last partition of an input may be a small one
    return rows / ((written[-1][0] - written[0][0]) / 1e9)


def scaling(arguments: ScalingArguments) -> dict[str, Any]:
    """Measure; return what scaling.json holds.

    Raises:
        UserError: An option or a file is not usable (see `recipes.bench.student.prepare`).
    """
    import pandas as pd
    from tqdm import tqdm

    from recipes.bench.student import prepare, timed_pairs
    from recipes.serve.score import ScoreArguments, score
    from recipes.serve.scorer import usable_cores

    for name in ("rows", "partition_rows", "rounds"):
        if to_dict(arguments)[name] < 1:
            raise UserError(f"{name}: expected 1 or more, got {to_dict(arguments)[name]}.")
    if arguments.rows <= arguments.partition_rows:
        raise UserError(
            f"rows: expected more than a partition, {arguments.partition_rows}, got {arguments.rows}: a rate counts "
            "from the first partition to the last. Pass more --rows, or a smaller --partition_rows."
        )
    make_folder(arguments.output)
    exported, source = prepare(arguments.model, arguments.pairs, arguments.labels, arguments.work)
    frame = timed_pairs(source, arguments.rows)[["query", "product_title"]]
    frame = pd.concat([frame] * -(-arguments.rows // len(frame)), ignore_index=True).head(arguments.rows)
    pairs, scored = Path(arguments.work, "scaling.parquet"), Path(arguments.work, "scaling")
    frame.to_parquet(pairs)
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    form = ""
    begun = time.perf_counter()
    for number in tqdm(range(arguments.rounds), desc="rounds"):
        if number and time.perf_counter() - begun > arguments.patience:
            break
        for name, (workers, threads) in SETTINGS.items():
            shutil.rmtree(scored, ignore_errors=True)
            started = time.perf_counter()
            form = score(
                ScoreArguments(
                    str(exported),
                    str(pairs),
                    str(scored),
                    partition_rows=arguments.partition_rows,
                    workers=workers,
                    threads=threads,
                )
            )["form"]
            seconds[name].append(time.perf_counter() - started)
            rates[name].append(rate(scored))
    cells = []
    for name, (workers, threads) in SETTINGS.items():
        best = max(rates[name])
        core_hours = PAIRS / best * workers * threads / 3600
        price = arguments.price_per_core_hour
        cells.append(
            {
                "setting": name,
                "rows_per_second": rates[name],
                "seconds_with_start": seconds[name],
                "over_one": paired_ratio(rates[name], rates["1 worker, 1 core"]),
                "core_hours_of_a_billion": core_hours,
                "price_of_a_billion": None if price is None else core_hours * price,
            }
        )
    command = command_line("recipes.bench.scaling", arguments)
    return {
        "command": command,
        "facts": facts(to_dict(arguments)),
        "form": form,
        "usable_cores": usable_cores(),
        "cells": cells,
    }


def format_table(content: dict[str, Any]) -> str:
    """Return the cells as Markdown."""
    rows = []
    for cell in content["cells"]:
        row = {
            "setting": cell["setting"],
            "rows/s (best run)": f"{max(cell['rows_per_second']):,.0f}",
            "over one": show_ratio(cell["over_one"]),
            "with start": f"{min(cell['seconds_with_start']):.0f} s",
            "core-hours of a billion pairs": f"{cell['core_hours_of_a_billion']:,.0f}",
        }
        if cell["price_of_a_billion"] is not None:
            row["price of a billion pairs"] = f"{cell['price_of_a_billion']:,.0f}"
        rows.append(row)
    return f"{content['form']}, {content['usable_cores']} cores.\n\n{table(rows)}"


def main() -> None:
    """Measure from the command line."""
    arguments = parse(ScalingArguments, __doc__)
    content = scaling(arguments)
    write_results(arguments.output, "scaling", content, format_table(content))
    print("Next: python -m recipes.serve.score --model MODEL --input FOLDER --output FOLDER --workers N")


if __name__ == "__main__":
    run(main)
