"""Sort a teacher's wrong verdicts by kind of error, perspective by perspective.

    python -m recipes.evaluate.taxonomy --pairs runs/esci/pairs --completions completions.parquet \
        --output runs/esci/taxonomy
    python -m recipes.evaluate.taxonomy --pairs runs/demo/bazaar --labels aliexpress6 \
        --completions runs/demo/completions.parquet --output runs/demo/taxonomy

Two questions of each wrong verdict:

- Which way? `over-lenient`: the gain of the verdict's class is above the gold class's; `over-strict`: below;
  `sideways`: the same.
- About what? The first that applies: `accessory`: one of the two classes is the schema's accessory class (Complement,
  Accessory Mismatch); then by what the rationale speaks of (`CUES`, and for a brand also the product's own):
  `negation`, `number or size`, `model`, `brand`, `colour or material`; else `other`. Cues are English, as
  rationales are: they say what was looked at, not whether that was the mistake.

Writes taxonomy.json, table.md and errors.parquet (one row an error, to read them).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import load_labels, make_folder, read_pairs

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema

ACCESSORY_CLASSES = ("Complement", "Accessory Mismatch")
DIRECTIONS = ("over-lenient", "over-strict", "sideways")
CUES = {
    "negation": re.compile(r"\b(?:without|exclu\w+|negat\w+|-free|forbid\w*|violat\w+|unwanted)\b", re.IGNORECASE),
    "number or size": re.compile(r"\d|\b(?:size[sd]?|count|pack|capacity|length|width|inch\w*)\b", re.IGNORECASE),
    "model": re.compile(r"\b(?:models?|versions?|generation|series|edition|compatib\w+)\b", re.IGNORECASE),
    "brand": re.compile(r"\b(?:brands?|makers?|manufacturers?|labelled by|company)\b", re.IGNORECASE),
    "colour or material": re.compile(r"\b(?:colou?rs?|shades?|material|fabric|leather|metal|wood\w*)\b", re.IGNORECASE),
}
KINDS = ("accessory", *CUES, "other")


@dataclass
class TaxonomyArguments:
    """Options of `recipes.evaluate.taxonomy`."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet file a split."})
    completions: list[str] = field(metadata={"help": "Completions (parquet); several files are joined."})
    output: str = field(metadata={"help": "Folder to write taxonomy.json, table.md and errors.parquet to."})
    splits: list[str] = field(default_factory=lambda: ["test"], metadata={"help": "Splits to look at."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})


def direction(gold: str, predicted: str, schema: LabelSchema) -> str:
    """Say which way a verdict is wrong.

    >>> direction("Substitute", "Exact", load_labels("esci")), direction("Exact", "Complement", load_labels("esci"))
    ('over-lenient', 'over-strict')
    """
    gains = dict(zip(schema.names, schema.gains, strict=True))
    if gains[gold] == gains[predicted]:
        return "sideways"
    return "over-lenient" if gains[predicted] > gains[gold] else "over-strict"


def kind(gold: str, predicted: str, rationale: str, brand: str | None = None) -> str:
    """Say what a wrong verdict is about.

    >>> kind("Exact", "Complement", "It holds 12 oz."), kind("Exact", "Substitute", "Acme sells it.", brand="Acme")
    ('accessory', 'brand')
    """
    if {gold, predicted} & set(ACCESSORY_CLASSES):
        return "accessory"
    for name, cue in CUES.items():
        if cue.search(rationale) or (name == "brand" and brand and brand.casefold() in rationale.casefold()):
            return name
    return "other"


def taxonomy(arguments: TaxonomyArguments) -> dict[str, Any]:
    """Read, sort, measure and write; return what taxonomy.json holds.

    Raises:
        UserError: A file breaks its contract, or no completion of these pairs is wrong.
    """
    import pandas as pd

    from recipes.rationales.build import read_completions

    schema = load_labels(arguments.labels)
    pairs = pd.concat(read_pairs(arguments.pairs, arguments.splits).values(), ignore_index=True)
    pairs["label"] = schema.canonical_column(pairs["label"], arguments.pairs)
    rows = read_completions(arguments.completions, schema).drop(columns="file").merge(pairs, on="pair_id")
    rows = rows[rows["predicted_label"].notna()].reset_index(drop=True)
    wrong = rows["predicted_label"] != rows["label"]
    if not wrong.any():
        raise UserError(
            f"{', '.join(arguments.completions)}: {len(rows):,} verdicts on {arguments.pairs} "
            f"({', '.join(arguments.splits)}), none of them wrong: there is nothing to sort. The right splits?"
        )
    output = make_folder(arguments.output)
    brands = rows["brand"].fillna("") if "brand" in rows else [""] * len(rows)
    columns = (rows["label"], rows["predicted_label"], rows["rationale"].fillna(""), brands, wrong)
    sorted_ = [
        (direction(gold, said, schema), kind(gold, said, text, brand or None)) if bad else ("", "")
        for gold, said, text, brand, bad in zip(*columns, strict=True)
    ]
    rows[["direction", "kind"]] = pd.DataFrame(sorted_, columns=["direction", "kind"])
    report = {
        "command": command_line("recipes.evaluate.taxonomy", arguments),
        **measure(rows, arguments.draws, arguments.seed),
        "arguments": to_dict(arguments),
    }
    shown = ["pair_id", "perspective", "direction", "kind", "label", "predicted_label", "query", "product_title"]
    rows.loc[wrong, [*shown, "rationale"]].to_parquet(output / "errors.parquet", index=False)
    (output / "table.md").write_text(table(report), encoding="utf-8")
    write_json(output / "taxonomy.json", report)
    return report


def measure(rows: pd.DataFrame, draws: int, seed: int) -> dict[str, Any]:
    """Measure, by perspective, the shares of verdicts that are wrong in each direction and kind.

    Args:
        rows: One row a completion: `perspective`, `query`, `locale`, `direction` and `kind`, both "" where right.
        draws: Bootstrap draws.
        seed: Of the draws.

    Returns:
        `perspectives` -> `verdicts`, and `wrong`, each of `DIRECTIONS` and each of `KINDS` as shares of all verdicts.
    """
    import numpy as np

    from recipes.evaluate.shares import ratios

    result = {}
    for name, part in rows.groupby("perspective"):
        hits = [part["direction"] != "", *(part["direction"] == one for one in DIRECTIONS)]
        hits += [part["kind"] == one for one in KINDS]
        query = part.groupby(["locale", "query"], sort=False).ngroup()
        found = ratios(hits, [np.ones(len(part))] * len(hits), query, draws, seed)
        names = ("wrong", *DIRECTIONS, *KINDS)
        result[str(name)] = {"verdicts": len(part), **{one: found.entry(place) for place, one in enumerate(names)}}
    return {"perspectives": result}


def table(report: dict[str, Any]) -> str:
    """Lay out the report in markdown."""
    from recipes.evaluate.shares import markdown_table, percent

    perspectives = report["perspectives"]
    counts = ", ".join(f"{name} {values['verdicts']:,}" for name, values in perspectives.items())
    rows = [
        [name, *(percent(values[name]) for values in perspectives.values())] for name in ("wrong", *DIRECTIONS, *KINDS)
    ]
    return "\n".join(
        [
            f"Verdicts: {counts}. Shares of all verdicts × 100, 95 % interval over queries; the three directions add "
            "up to wrong, and so do the kinds.",
            "",
            markdown_table(["", *perspectives], rows),
            "",
        ]
    )


def main() -> None:
    """Sort errors from the command line."""
    arguments = parse(TaxonomyArguments, __doc__)
    print(table(taxonomy(arguments)))
    print(f"Wrote {arguments.output}/taxonomy.json, table.md and errors.parquet.")
    print("Next: read some of the largest kind in errors.parquet, and write the rule that was missing into the rules.")


if __name__ == "__main__":
    run(main)
