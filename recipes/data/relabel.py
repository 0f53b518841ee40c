"""Label a bazaar again, by an edited rules file.

    python -m recipes.data.relabel --pairs runs/demo/bazaar --rules recipes/rules/changed/aliexpress6_compatible.yaml \
        --output runs/rule/bazaar

Texts, splits and structures stay as they are; labels are what the rules give (recipes/data/bazaar_policy.py). Writes
the three splits, structures.parquet and relabel.json. What a student makes of it: recipes.evaluate.rule_change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.data.bazaar_policy import follow
from recipes.data.bazaar_rules import STRUCTURES, ask_from_json, decide, offer_from_json
from recipes.record import write_json
from recipes.schemas import PAIRS, SPLITS, load_labels, make_folder, read, read_pairs, write


@dataclass
class RelabelArguments:
    """Options of `python -m recipes.data.relabel`."""

    pairs: str = field(metadata={"help": "Folder made by recipes.data.bazaar."})
    rules: str = field(metadata={"help": "Rules: a name in recipes/rules, or a YAML file for aliexpress6."})
    output: str = field(metadata={"help": "Another folder to write to."})


def relabel(arguments: RelabelArguments) -> dict[str, Any]:
    """Read, label and write; return what relabel.json holds.

    Raises:
        UserError: The folder is not a bazaar, the rules are no rules file, or the output is the input.
    """
    from recipes.teacher.books import load_rules

    rules = load_rules(arguments.rules, load_labels("aliexpress6"))
    folder, output = Path(arguments.pairs), Path(arguments.output)
    if folder.resolve() == output.resolve():
        raise UserError(f"--output {output}: is the folder that is read; the old labels would be lost. Choose another.")
    splits = read_pairs(folder)
    structures = read(folder / "structures.parquet", STRUCTURES)
    known = structures.set_index("pair_id")
    changes: dict[str, int] = {}
    make_folder(output)
    for split in SPLITS:
        frame = splits[split]
        labels = []
        missing = frame["pair_id"][~frame["pair_id"].isin(known.index)]
        if len(missing):
            raise UserError(f"{folder}/structures.parquet: has no row for pair {missing.iloc[0]!r} of {split}.")
        rows = known.loc[frame["pair_id"]]
        columns = (rows["query_structure"], rows["product_structure"], frame["locale"], frame["label"])
        for wanted, product, locale, old in zip(*columns, strict=True):
            ask, offer = ask_from_json(wanted), offer_from_json(product)
            label = follow(decide(ask, offer), ask, offer, rules, locale).label
            labels.append(label)
            if label != old:
                changes[f"{old} -> {label}"] = changes.get(f"{old} -> {label}", 0) + 1
        write(frame.assign(label=labels), output / f"{split}.parquet", PAIRS)
    write(structures, output / "structures.parquet", STRUCTURES)
    record = {
        "command": command_line("recipes.data.relabel", arguments),
        "pairs": sum(map(len, splits.values())),
        "changes": changes,
        "arguments": to_dict(arguments),
    }
    write_json(output / "relabel.json", record)
    return record


def main() -> None:
    """Label a bazaar again."""
    arguments = parse(RelabelArguments, __doc__)
    record = relabel(arguments)
    print(f"{arguments.output}: {sum(record['changes'].values()):,} of {record['pairs']:,} pairs have another label")
    for change, count in sorted(record["changes"].items()):
        print(f"  {change}: {count:,}")
    print(
        f"Next: python -m recipes.teacher.scripted --pairs {arguments.output} --rules {arguments.rules} "
        "--output COMPLETIONS.parquet"
    )


if __name__ == "__main__":
    run(main)
