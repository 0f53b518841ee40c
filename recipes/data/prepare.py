"""Make pairs out of a Hub dataset or of files: checked, split by query, without leakage, with a report.

    # The paper's sampling of Amazon ESCI (2.6 M rows; 3 GB of download, a few GB of memory)
    python -m recipes.data.prepare --config recipes/configs/data/esci.yaml --output runs/esci/pairs

    # Your own file; columns that are not recognised are named
    python -m recipes.data.prepare --source shop.csv --columns title=product_title grade=label --default_locale us \
        --labels aliexpress6 --output runs/shop/pairs

Reads: a Hub dataset id, or parquet, csv, tsv, json and jsonl files, folders or globs, with Amazon ESCI's columns
(example_id, query, product_title, product_locale, esci_label ...) or ours (pair_id, query, product_title, locale,
label ...). Writes: OUTPUT/{train,validation,test}.parquet and OUTPUT/report.json.

Two texts are the same query, or the same title, when `recipes.data.text.normalise` makes them equal. Rows that repeat a
pair and its label are merged. Messages count rows from 0, without the header.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import PAIRS, SPLITS, LabelSchema, load_labels, write

if TYPE_CHECKING:
    import pandas as pd

EXTRA_COLUMNS = ("brand", "color", "bullet_point", "description", "source")


@dataclass
class PrepareArguments:
    """What `recipes.data.prepare` can be told."""

    source: list[str] = field(metadata={"help": "A Hub dataset id, or files, folders and globs."})
    output: str = field(metadata={"help": "Folder to write."})
    subset: str | None = field(default=None, metadata={"help": "Configuration of the Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of the Hub dataset."})
    columns: list[str] = field(
        default_factory=list, metadata={"help": "Names that are not recognised, as theirs=ours: title=product_title."}
    )
    keep_columns: list[str] = field(
        default_factory=lambda: ["brand", "color"],
        metadata={"help": f"Optional columns to carry along with product_id, of {', '.join(EXTRA_COLUMNS)}."},
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of csv, tsv, json and jsonl files."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    locales: list[str] = field(default_factory=list, metadata={"help": "Keep these locales only; all by default."})
    default_locale: str | None = field(default=None, metadata={"help": "Locale of rows that name none."})
    version: Literal["all", "large", "small"] = field(
        default="all", metadata={"help": "Keep the rows that ESCI's large_version or small_version column marks."}
    )
    train_size: int | None = field(
        default=100_000, metadata={"help": "Training rows per locale, whole queries; null in YAML: all."}
    )
    test_size: int | None = field(
        default=10_000, metadata={"help": "Test rows per locale, whole queries; null in YAML: all."}
    )
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part of train to hold out by query, if the source has no validation split."}
    )
    test_fraction: float = field(
        default=0.1, metadata={"help": "Part of all rows to hold out by query, if the source has no test split."}
    )
    leakage: Literal["drop", "keep", "error"] = field(
        default="drop", metadata={"help": "Queries and titles on both sides of a split: dropped from train, then from "
                                          "validation, never from test; `error`: if the source's own splits overlap."}
    )  # fmt: skip
    blank: Literal["error", "drop"] = field(default="error", metadata={"help": "Rows with a blank query or title."})
    conflicts: Literal["error", "drop"] = field(
        default="error", metadata={"help": "Rows of one pair (locale, query, product) with several labels; drops all."}
    )
    duplicates: Literal["error", "drop"] = field(
        default="error", metadata={"help": "Rows under a pair_id that an earlier row has; drops them."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the draws."})


def main() -> None:
    """Run the verb."""
    prepare(parse(PrepareArguments, __doc__))


def prepare(arguments: PrepareArguments) -> None:
    """Read, check, split and write; every error comes before anything is written."""
    from recipes.data.clean import clean
    from recipes.data.sources import read_source
    from recipes.data.splits import Splitter, overlap

    labels = load_labels(arguments.labels)
    columns = _check_arguments(arguments)
    frame, commit = read_source(
        arguments.source, columns, arguments.keep_columns, arguments.encoding, arguments.subset, arguments.revision
    )
    read = len(frame)
    print(f"read {read:,} rows from {', '.join(arguments.source)}{f' at {commit}' if commit else ''}")
    frame, removed = clean(
        frame,
        labels,
        locales=arguments.locales,
        default_locale=arguments.default_locale,
        version=arguments.version,
        blank=arguments.blank,
        conflicts=arguments.conflicts,
        duplicates=arguments.duplicates,
    )
    splitter = Splitter(
        train_size=arguments.train_size,
        test_size=arguments.test_size,
        validation_fraction=arguments.validation_fraction,
        test_fraction=arguments.test_fraction,
        leakage=arguments.leakage,
        seed=arguments.seed,
    )
    splits = splitter(frame)
    if splits["train"].empty:
        raise UserError(f"no training rows are left of {read:,}: removed {removed}, leaking {splitter.dropped}.")

    report = {
        "arguments": to_dict(arguments),
        "commit": commit,
        "rows_read": read,
        "rows_removed": removed,
        "leakage_removed": splitter.dropped,
        "leakage_left": {
            f"{one} in {other}": {name: int(mask.sum()) for name, mask in overlap(splits[one], splits[other]).items()}
            for one, other in (("train", "validation"), ("train", "test"), ("validation", "test"))
        },
        "splits": {split: summary(rows, labels) for split, rows in splits.items()},
    }
    output = Path(arguments.output)
    for split, rows in splits.items():
        write(rows[[name for name in PAIRS.columns if name in rows]], output / f"{split}.parquet", PAIRS)
    write_json(output / "report.json", {"command": command_line("recipes.data.prepare", arguments), **report})
    _print_report(report)
    print(f"wrote {', '.join(f'{split}.parquet' for split in SPLITS)} and report.json to {output}")
    print(f"next: python -m recipes.rationales.build --pairs {output} --completions FILE --output rationales.parquet")


def _check_arguments(arguments: PrepareArguments) -> dict[str, str]:
    """Refuse what cannot work, and return the column mapping, theirs -> ours."""
    columns = {}
    for entry in arguments.columns:
        theirs, separator, ours = entry.rpartition("=")
        if not separator or ours not in (*PAIRS.columns, "split", "large_version", "small_version"):
            raise UserError(f"columns: {entry!r}: expected theirs=ours, ours one of {', '.join(PAIRS.columns)}, split.")
        columns[theirs] = ours
    for name in arguments.keep_columns:
        if name not in EXTRA_COLUMNS:
            raise UserError(f"keep_columns: {name!r}: expected some of {', '.join(EXTRA_COLUMNS)}.")
    for fraction in (arguments.validation_fraction, arguments.test_fraction):
        if not 0 <= fraction < 1:
            raise UserError(f"validation_fraction, test_fraction: {fraction}: expected 0 or more and below 1.")
    for size in (arguments.train_size, arguments.test_size):
        if size is not None and size < 1:
            raise UserError(f"train_size, test_size: {size}: expected at least 1, or null in YAML for all rows.")
    if Path(arguments.output).is_file():
        raise UserError(f"{arguments.output}: is a file; expected a folder to write to.")
    return columns


def summary(rows: pd.DataFrame, labels: LabelSchema) -> dict[str, dict[str, int]]:
    """Count, for each locale, rows, queries, titles and labels."""
    return {
        str(locale): {
            "rows": len(part),
            "queries": part["query_key"].nunique(),
            "titles": part["title_key"].nunique(),
            **{name: int((part["label"] == name).sum()) for name in labels.names},
        }
        for locale, part in rows.groupby("locale")
    }


def _print_report(report: dict[str, Any]) -> None:
    import pandas as pd

    counts = [
        {"split": split, "locale": locale, **numbers}
        for split, locales in report["splits"].items()
        for locale, numbers in locales.items()
    ]
    print(pd.DataFrame(counts).to_string(index=False))
    for reason, rows in report["rows_removed"].items():
        if rows:
            print(f"removed {rows:,} rows: {reason}")
    for split, numbers in report["leakage_removed"].items():
        print(
            f"leakage removed from {split}: {numbers['rows']:,} rows "
            f"({numbers['query']:,} by query, {numbers['title']:,} by title)"
        )
    for where, numbers in report["leakage_left"].items():
        print(f"leakage left, {where}: {numbers['query']:,} rows by query, {numbers['title']:,} by title")


if __name__ == "__main__":
    run(main)
