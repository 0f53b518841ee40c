"""Show what a change of the business rules moved: labels, predictions, and what should not have moved.

    python -m recipes.evaluate.rule_change --before_pairs runs/demo/bazaar --after_pairs runs/rule/bazaar \
        --before runs/rule/old/evaluation --after runs/rule/new/evaluation --again runs/rule/old-1/evaluation \
        --output runs/rule/change

The pairs are the same, labelled by the old and by the new rules (recipes.data.relabel); `--before` is the evaluation
(recipes.evaluate.run) of a student of the old labels, `--after` of one of the new. Pairs that got another label should
move, the others should stay. Students move by chance too: `--again`, another seed under the old rules, says how much.
The whole sequence stands in recipes/README.md. Writes rule_change.json and table.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import PREDICTIONS, load_labels, make_folder, read, read_pairs

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema


@dataclass
class RuleChangeArguments:
    """Options of `recipes.evaluate.rule_change`."""

    before_pairs: str = field(metadata={"help": "Folder of pairs, labelled by the old rules."})
    after_pairs: str = field(metadata={"help": "Folder of the same pairs, labelled by the new rules."})
    before: str = field(metadata={"help": "Evaluation of a student of the old labels: a folder."})
    after: str = field(metadata={"help": "Evaluation of a student of the new labels: a folder."})
    output: str = field(metadata={"help": "Folder to write rule_change.json and table.md to."})
    again: str | None = field(default=None, metadata={"help": "Evaluation of another seed under the old rules."})
    split: str = field(default="test", metadata={"help": "Which split was evaluated."})
    labels: str = field(default="aliexpress6", metadata={"help": "Label schema."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})


def rule_change(arguments: RuleChangeArguments) -> dict[str, Any]:
    """Read, align, compare and write; return what rule_change.json holds.

    Raises:
        UserError: A file breaks its contract, the two folders hold other pairs, or no label changed.
    """
    schema = load_labels(arguments.labels)
    old, new = (
        read_pairs(folder, [arguments.split])[arguments.split]
        for folder in (arguments.before_pairs, arguments.after_pairs)
    )
    old = old.set_index("pair_id")
    if set(old.index) != set(new["pair_id"]):
        raise UserError(
            f"{arguments.before_pairs} and {arguments.after_pairs}: hold other pairs. Make the second from the first "
            "with recipes.data.relabel."
        )
    new = new.set_index("pair_id").loc[old.index]
    frame = old[["query", "locale", "product_title"]].assign(old=old["label"], new=new["label"])
    if (frame["old"] == frame["new"]).all():
        raise UserError(f"{arguments.after_pairs}: no label of {arguments.split} differs. Does the rules file differ?")
    runs = {"before": arguments.before, "after": arguments.after, "again": arguments.again}
    for name, folder in runs.items():
        if folder is not None:
            frame[name] = _predicted(Path(folder, "predictions.parquet"), frame.index, schema)
    output = make_folder(arguments.output)
    report = {
        "command": command_line("recipes.evaluate.rule_change", arguments),
        **measure(frame, arguments.draws, arguments.seed),
        "arguments": to_dict(arguments),
    }
    (output / "table.md").write_text(table(report), encoding="utf-8")
    write_json(output / "rule_change.json", report)
    return report


def _predicted(file: Path, pair_ids: pd.Index, schema: LabelSchema) -> pd.Series:
    predictions = read(file, PREDICTIONS).set_index("pair_id")
    missing = pair_ids.difference(predictions.index)
    if len(missing):
        raise UserError(f"{file}: has no prediction for pair {missing[0]!r}. Evaluate the student on this split.")
    return schema.canonical_column(predictions["predicted_label"], file).loc[pair_ids]


def measure(frame: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """Measure what moved.

    Args:
        frame: One row a pair: `query`, `locale`, `old` and `new` label, and the predictions `before`, `after` and,
            where there is one, `again`.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `changed`: "old -> new" -> pairs. `groups`: `moved` (all pairs with another label), `stayed`, and `stayed` by
        label -> `pairs`, `before right` and `after right` (each by its own labels), `flipped` (prediction after is
        another than before), `flipped by chance` (again against before), `new label before` and `new label after`.
    """
    import numpy as np

    from recipes.evaluate.shares import ratios

    moved = (frame["old"] != frame["new"]).to_numpy()
    query = frame.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    shares = {
        "before right": frame["before"] == frame["old"],
        "after right": frame["after"] == frame["new"],
        "flipped": frame["before"] != frame["after"],
        "new label before": frame["before"] == frame["new"],
    }
    if "again" in frame:
        shares["flipped by chance"] = frame["before"] != frame["again"]
    groups = {"moved": moved, "stayed": ~moved}
    groups |= {f"stayed, {label}": ~moved & (frame["old"] == label).to_numpy() for label in sorted(set(frame["old"]))}
    names = [(group, share) for group in groups for share in shares]
    masks = [groups[group].astype(float) for group, _ in names]
    hits = [mask * shares[share].to_numpy() for mask, (_, share) in zip(masks, names, strict=True)]
    found = ratios(hits, masks, query, draws, seed)
    result: dict[str, dict[str, Any]] = {group: {"pairs": int(groups[group].sum())} for group in groups}
    for place, (group, share) in enumerate(names):
        result[group][share] = found.entry(place)
    if "again" in frame:
        for group in groups:
            one, other = names.index((group, "flipped")), names.index((group, "flipped by chance"))
            result[group]["flipped, beyond chance"] = found.difference(one, other)
    changed = frame[moved].groupby(["old", "new"]).size()
    return {
        "pairs": len(frame),
        "queries": int(np.unique(query).size),
        "changed": {f"{old} -> {new}": int(count) for (old, new), count in changed.items()},
        "groups": {group: values for group, values in result.items() if values["pairs"]},
    }


def table(report: dict[str, Any]) -> str:
    """Lay out the report in markdown."""
    from recipes.evaluate.shares import markdown_table, percent

    columns = list(next(iter(report["groups"].values())))[1:]
    rows = [
        [group, f"{values['pairs']:,}", *(percent(values[c], "+" if "beyond" in c else "") for c in columns)]
        for group, values in report["groups"].items()
    ]
    changes = ", ".join(f"{change}: {count:,}" for change, count in report["changed"].items())
    return "\n".join(
        [
            f"{report['pairs']:,} pairs of {report['queries']:,} queries. Labels that changed: {changes}.",
            "",
            "Shares of pairs × 100, 95 % interval over queries. Right is by the labels the student was trained on.",
            "",
            markdown_table(["pairs whose label", "pairs", *columns], rows),
            "",
        ]
    )


def main() -> None:
    """Show what a change of rules moved, from the command line."""
    arguments = parse(RuleChangeArguments, __doc__)
    print(table(rule_change(arguments)))
    print(f"Wrote {arguments.output}/rule_change.json and table.md.")
    print("Next: where pairs that should have stayed flipped beyond chance, look at their rationales.")


if __name__ == "__main__":
    run(main)
