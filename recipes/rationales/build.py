"""Choose among a teacher's completions the rationales that guide the student.

    # One row a perspective: the student is guided by the mean of their embeddings
    python -m recipes.rationales.build --pairs runs/esci/pairs --completions completions.parquet \
        --output runs/esci/rationales.parquet

    # The paper's: the one rationale of the teacher that was tuned on all perspectives
    python -m recipes.rationales.build --config recipes/configs/rationales/build.yaml --pairs runs/esci/pairs \
        --completions runs/esci/completions.parquet --output runs/esci/rationales.parquet

Reads: pairs (recipes.data.prepare) and completions (recipes.teacher.generate; labels as names or aliases). Writes: one
parquet of rationales, and beside it a report of what was kept and why the rest was not (OUTPUT.report.json).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import (
    COMPLETIONS,
    FAITHFULNESS,
    PERSPECTIVES,
    RATIONALES,
    SPLITS,
    load_labels,
    read,
    read_pairs,
    write,
)

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema


@dataclass
class BuildArguments:
    """What `recipes.rationales.build` can be told."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet a split."})
    completions: list[str] = field(metadata={"help": "Completions (parquet); several files are joined."})
    output: str = field(metadata={"help": "Rationales to write (parquet)."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    splits: list[str] = field(
        default_factory=lambda: ["train"],
        metadata={"help": "Splits whose pairs get rationales. Guidance needs train only; probes read others, with "
                          "--keep all, because eq. 1 looks at the gold label."},
    )  # fmt: skip
    target: Literal["mean", "concatenation", "unified", "user_intent", "structured_analysis", "business_rule"] = field(
        default="mean",
        metadata={"help": "`mean`: one row for each of the three perspectives, and the student is guided by the mean "
                          "of a pair's embeddings. `concatenation`: the three joined in one row. Else: one "
                          "perspective, `unified` being the perspective-free prompt's."},
    )  # fmt: skip
    keep: Literal["consistent", "all"] = field(
        default="consistent", metadata={"help": "`consistent`: only what predicts the gold label (eq. 1)."}
    )
    filter: str | None = field(
        default=None,
        metadata={"help": "completions.parquet of recipes.evaluate.faithfulness: only what it calls faithful."},
    )
    samples: Literal["first", "all"] = field(
        default="first", metadata={"help": "Of the kept samples of a pair and perspective: the first, or all."}
    )
    strip_label_names: bool = field(
        default=True, metadata={"help": "Take the verdict out of the text (recipes/rationales/strip.py says how)."}
    )
    separator: str = field(
        default="\n", metadata={"help": "Between joined rationales; e.g. ' </s> ', the encoder's own, for BGE-M3."}
    )


def main() -> None:
    """Run the verb."""
    build(parse(BuildArguments, __doc__))


def build(arguments: BuildArguments) -> None:
    """Read, select, render and write."""
    import pandas as pd

    labels = load_labels(arguments.labels)
    if unknown := [split for split in arguments.splits if split not in SPLITS]:
        raise UserError(f"splits: {', '.join(unknown)}: expected some of {', '.join(SPLITS)}.")
    pairs = pd.concat(read_pairs(arguments.pairs, arguments.splits).values(), ignore_index=True)
    pairs["label"] = labels.canonical_column(pairs["label"], arguments.pairs)
    completions = read_completions(arguments.completions, labels)
    rows, counts = select(completions, pairs, arguments)
    if arguments.strip_label_names:
        rows = _strip(rows, labels)
        counts["nothing but a verdict"] = int((rows["rationale"] == "").sum())
        rows = rows[rows["rationale"] != ""]
    if rows.empty:
        raise UserError(f"no rationale is left of {len(completions):,} completions: {counts}. Try --keep all.")
    if arguments.samples == "first":
        rows = rows.drop_duplicates(["pair_id", "perspective"])
    rows = rows.drop_duplicates(list(RATIONALES.key))
    perspectives = rows.groupby("pair_id")["perspective"].nunique().value_counts().sort_index()
    if arguments.target == "concatenation":
        rows = _concatenate(rows, arguments.separator)

    report = summary(rows, pairs, len(completions), counts) | {"arguments": to_dict(arguments)}
    report["pairs_by_perspectives"] = {str(number): int(count) for number, count in perspectives.items()}
    path = write(rows[[name for name in RATIONALES.columns if name in rows]], arguments.output, RATIONALES)
    command = command_line("recipes.rationales.build", arguments)
    report_path = write_json(path.with_name(f"{path.name}.report.json"), {"command": command, **report})
    _print_report(report)
    print(f"wrote {path} ({len(rows):,} rationales) and {report_path.name}")
    print(
        f"next: python -m recipes.rationales.embed --rationales {path} --encoder BAAI/bge-m3 --output embedded.parquet"
    )


def read_completions(files: list[str], labels: LabelSchema) -> pd.DataFrame:
    """Read and join files of completions, `predicted_label` as class names.

    Raises:
        UserError: A file breaks the contract, a label is outside the schema, or two files hold the same sample.
    """
    import pandas as pd

    frames = []
    for file in files:
        frame = read(file, COMPLETIONS)
        frame["predicted_label"] = labels.canonical_column(frame["predicted_label"].astype(object), file)
        columns = ["pair_id", "perspective", "sample_index", "rationale", "predicted_label", "parse_error"]
        frames.append(frame.reindex(columns=columns).assign(file=file))
    completions = pd.concat(frames, ignore_index=True)
    repeated = completions.duplicated(list(COMPLETIONS.key))
    if repeated.any():
        first = completions[repeated].iloc[0]
        raise UserError(
            f"{first['file']}: pair_id {first['pair_id']!r}, perspective {first['perspective']!r}, sample "
            f"{first['sample_index']} is in an earlier file too. Number the samples through, or leave one file out."
        )
    return completions


def select(
    completions: pd.DataFrame, pairs: pd.DataFrame, arguments: BuildArguments
) -> tuple[pd.DataFrame, dict[str, int]]:
    """Choose the completions to keep, in the order of pairs, perspectives and samples.

    Returns:
        Pairs with `perspective`, `rationale` and `predicted_label`, and how many completions went, by reason.
    """
    import pandas as pd

    counts: dict[str, int] = {}
    columns = ["pair_id", "query", "product_title", "locale", "label"]
    order = pd.Series(range(len(pairs)), index=pairs["pair_id"])
    rows = completions.merge(pairs[columns], on="pair_id")
    counts["pair not in these splits"] = len(completions) - len(rows)
    if rows.empty:
        raise UserError(
            f"{', '.join(arguments.completions)}: none of the {len(completions):,} completions has a pair_id of "
            f"{arguments.pairs} ({', '.join(arguments.splits)}), which begin with {list(pairs['pair_id'][:1])}; the "
            f"completions' with {list(completions['pair_id'][:1])}. Were they made from other pairs?"
        )
    wanted = PERSPECTIVES if arguments.target in ("mean", "concatenation") else (arguments.target,)
    keep = rows["perspective"].isin(wanted)
    if not keep.any():
        found = ", ".join(sorted(rows["perspective"].unique()))
        raise UserError(f"target: {arguments.target}: no completion of {' or '.join(wanted)}; found {found}.")
    counts["other perspective"] = int((~keep).sum())
    rows = rows[keep]
    blank = rows["rationale"].isna() | (rows["rationale"].fillna("").str.strip() == "")
    counts["no rationale"] = int(blank.sum())
    rows = rows[~blank]
    if arguments.keep == "consistent":
        inconsistent = rows["predicted_label"] != rows["label"]
        counts["predicts another label"] = int(inconsistent.sum())
        rows = rows[~inconsistent]
    if arguments.filter is not None:
        unfaithful = ~_is_faithful(rows, arguments.filter)
        counts["not faithful"] = int(unfaithful.sum())
        rows = rows[~unfaithful]
    places = rows["perspective"].map({name: place for place, name in enumerate(wanted)})
    rows = rows.assign(_pair=rows["pair_id"].map(order), _perspective=places)
    return rows.sort_values(["_pair", "_perspective", "sample_index"], ignore_index=True), counts


def _is_faithful(rows: pd.DataFrame, file: str) -> pd.Series:
    """Look up which completions were called faithful.

    Raises:
        UserError: The file breaks its contract, or was made of other completions.
    """
    key = list(FAITHFULNESS.key)
    judged = read(file, FAITHFULNESS).set_index(key)["faithful"]
    places = judged.index.get_indexer(wanted := rows.set_index(key).index)
    if (places < 0).any():
        first = dict(zip(key, wanted[int((places < 0).argmax())], strict=True))
        raise UserError(
            f"{file}: has no row for {first}. Judge these completions, and these splits: "
            "python -m recipes.evaluate.faithfulness --pairs ... --completions ... --splits ..."
        )
    return (judged.iloc[places] == 1).set_axis(rows.index)


def _strip(rows: pd.DataFrame, labels: LabelSchema) -> pd.DataFrame:
    from tqdm import tqdm

    from recipes.rationales.strip import strip_label_names

    texts = zip(rows["rationale"], rows["query"], rows["product_title"], strict=True)
    stripped = [
        strip_label_names(rationale, labels, own_words=f"{query} {title}")
        for rationale, query, title in tqdm(texts, total=len(rows), desc="Stripping label names", unit="rationale")
    ]
    return rows.assign(rationale=stripped)


def _concatenate(rows: pd.DataFrame, separator: str) -> pd.DataFrame:
    """Join the rationales of a pair in their order; the label they predict is kept where they agree."""
    groups = rows.groupby("pair_id", sort=False)
    joined = groups.first()
    joined["rationale"] = groups["rationale"].agg(separator.join)
    joined["predicted_label"] = joined["predicted_label"].where(groups["predicted_label"].nunique(dropna=False) == 1)
    return joined.reset_index().assign(perspective="concatenation")


def summary(rows: pd.DataFrame, pairs: pd.DataFrame, completions: int, counts: dict[str, int]) -> dict[str, Any]:
    """Count coverage: how many pairs, of which labels, have at least one rationale, and how long these are."""
    covered = pairs["pair_id"].isin(rows["pair_id"])
    words = rows["rationale"].str.split().str.len()
    return {
        "completions": completions,
        "removed": counts,
        "pairs": len(pairs),
        "pairs_with_rationale": int(covered.sum()),
        "coverage_by_label": covered.groupby(pairs["label"]).mean().round(4).to_dict(),
        "perspectives": {
            name: {"rationales": len(part), "mean_words": round(float(part.mean()), 1)}
            for name, part in words.groupby(rows["perspective"], sort=False)
        },
    }


def _print_report(report: dict[str, Any]) -> None:
    for reason, number in report["removed"].items():
        if number:
            print(f"left out {number:,} of {report['completions']:,} completions: {reason}")
    for name, numbers in report["perspectives"].items():
        print(f"{name:>20}: {numbers['rationales']:,} rationales, {numbers['mean_words']} words on average")
    covered, pairs = report["pairs_with_rationale"], report["pairs"]
    by_label = ", ".join(f"{label} {share:.1%}" for label, share in report["coverage_by_label"].items())
    print(f"{covered:,} of {pairs:,} pairs have a rationale ({covered / pairs:.1%}; {by_label})")
    for number, count in report["pairs_by_perspectives"].items():
        print(f"{count:,} pairs have {number} of the perspectives asked for")


if __name__ == "__main__":
    run(main)
