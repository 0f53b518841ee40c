"""Measure how faithful a teacher's rationales are to their pairs and verdicts, and say which of them to keep.

    python -m recipes.evaluate.faithfulness --pairs runs/esci/pairs --completions completions.parquet \
        --output runs/esci/faithfulness
    python -m recipes.evaluate.faithfulness --pairs runs/demo/bazaar --completions runs/demo/completions.parquet \
        --labels aliexpress6 --output runs/demo/faithfulness

For each perspective, with 95 % intervals over queries: how many rationales claim something concrete that stands in
neither query nor title (recipes/rationales/claims.py says what a claim is; for the bazaar the structures beside the
pairs count as known), name a verdict, or name another one than they conclude with; whether verdicts are right; whether
perspectives contradict each other; how length and verdicts are spread; how many are near-duplicates (MinHash).

Writes faithfulness.json, report.md, plot.png, and completions.parquet: one row a completion, for
`recipes.rationales.build --filter OUTPUT/completions.parquet`, which keeps those of `faithful` 1: nothing claimed that
is not there, and no other verdict named than the one concluded with.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import sha256, write_json
from recipes.schemas import FAITHFULNESS, SPLITS, load_labels, make_folder, read, read_pairs, write

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema

SHINGLE = 3  # words; characters where a script has no spaces
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]")


@dataclass
class FaithfulnessArguments:
    """Options of `recipes.evaluate.faithfulness`."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet file a split."})
    completions: list[str] = field(metadata={"help": "Completions (parquet); several files are joined."})
    output: str = field(metadata={"help": "Folder to write to."})
    splits: list[str] = field(default_factory=lambda: ["train", "test"], metadata={"help": "Splits to look at."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    similarity: float = field(default=0.8, metadata={"help": "Jaccard similarity from which rationales are the same."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap and of MinHash."})


def faithfulness(arguments: FaithfulnessArguments) -> dict[str, Any]:
    """Read, judge every completion, measure and write; return what faithfulness.json holds.

    Raises:
        UserError: A file breaks its contract, or no completion belongs to the pairs.
    """
    import pandas as pd

    from recipes.data.bazaar_rules import STRUCTURES
    from recipes.evaluate.faithfulness_report import measure, plot, table
    from recipes.rationales.build import read_completions

    if not 0 < arguments.similarity <= 1:
        raise UserError(f"--similarity {arguments.similarity}: expected more than 0, at most 1.")
    if arguments.draws < 1:
        raise UserError(f"--draws {arguments.draws}: expected at least 1.")
    if unknown := [split for split in arguments.splits if split not in SPLITS]:
        raise UserError(f"--splits {unknown[0]}: expected some of {', '.join(SPLITS)}.")
    schema = load_labels(arguments.labels)
    pairs = pd.concat(read_pairs(arguments.pairs, arguments.splits).values(), ignore_index=True)
    pairs["label"] = schema.canonical_column(pairs["label"], arguments.pairs)
    completions = read_completions(arguments.completions, schema)
    rows = completions.drop(columns="file").merge(pairs, on="pair_id")
    if rows.empty:
        raise UserError(
            f"{', '.join(arguments.completions)}: none of the {len(completions):,} completions has a pair_id of "
            f"{arguments.pairs} ({', '.join(arguments.splits)}). Were they made from other pairs?"
        )
    structures = Path(arguments.pairs, "structures.parquet")
    known = read(structures, STRUCTURES) if structures.is_file() else None
    output = make_folder(arguments.output)
    judged = judge(rows, schema, known)
    first = near_duplicates(judged["rationale"], arguments.similarity, arguments.seed)
    names = judged["pair_id"] + "/" + judged["perspective"] + "/" + judged["sample_index"].astype(str)
    judged["duplicate_of"] = [None if row is None else names.iloc[row] for row in first]
    measured = measure(judged, schema, arguments.draws, arguments.seed)
    report = {
        "command": command_line("recipes.evaluate.faithfulness", arguments),
        "completions": {file: sha256(file) for file in arguments.completions},
        "not_in_these_splits": len(completions) - len(rows),
        **measured,
        "arguments": to_dict(arguments),
    }
    write(judged[list(FAITHFULNESS.columns)], output / "completions.parquet", FAITHFULNESS)
    (output / "report.md").write_text(table(report), encoding="utf-8")
    plot(report, judged, output / "plot.png")
    write_json(output / "faithfulness.json", report)
    return report


def judge(rows: pd.DataFrame, schema: LabelSchema, structures: pd.DataFrame | None = None) -> pd.DataFrame:
    """Judge every completion by itself.

    Args:
        rows: Contract completions, joined with their pairs; labels by class name.
        schema: The classes.
        structures: Contract structures, for pairs of the bazaar.

    Returns:
        The rows with `claims` (how many), `invented` (those that stand nowhere, as "kind: text"), one count a kind,
        `named` (verdicts named), `other_verdict`, `words`, `grounding` (recipes.teacher.reward.faithfulness), `right`
        and `faithful`.
    """
    from tqdm import tqdm

    from recipes.data.bazaar_rules import ask_from_json, offer_from_json
    from recipes.rationales.claims import KINDS, Source, claims, facts_of, named_verdicts, proper_brands
    from recipes.teacher.reward import count_words
    from recipes.teacher.reward import faithfulness as grounding

    rows = rows.assign(rationale=rows["rationale"].fillna("").astype(str))
    own_brands = rows["brand"].fillna("").astype(str).str.strip() if "brand" in rows else rows["rationale"].str[:0]
    brands = proper_brands(set(own_brands), rows["rationale"])
    facts: dict[str, tuple[str, ...]] = {}
    if structures is not None:
        wanted = structures[structures["pair_id"].isin(rows["pair_id"])]
        columns = (wanted["pair_id"], wanted["query_structure"], wanted["product_structure"])
        facts = {
            p: facts_of(ask_from_json(ask), offer_from_json(offer)) for p, ask, offer in zip(*columns, strict=True)
        }
    found: dict[str, list[Any]] = {name: [] for name in ("claims", "invented", "named", "words", "grounding")}
    counts: dict[str, list[int]] = {f"{what}_{kind}": [] for what in ("claims", "invented") for kind in KINDS}
    columns = (rows[name] for name in ("pair_id", "rationale", "query", "product_title", "locale"))
    together = zip(*columns, own_brands, strict=True)
    for pair_id, text, query, title, locale, brand in tqdm(together, total=len(rows), desc="judge", unit="rationale"):
        made = claims(text, Source(query, title, locale, brand or None, facts.get(pair_id, ())), brands)
        found["claims"].append(len(made))
        found["invented"].append("; ".join(f"{one.kind}: {one.text}" for one in made if not one.grounded))
        for kind in KINDS:
            counts[f"claims_{kind}"].append(sum(one.kind == kind for one in made))
            counts[f"invented_{kind}"].append(sum(one.kind == kind and not one.grounded for one in made))
        found["named"].append(named_verdicts(text, schema, f"{query} {title}"))
        found["words"].append(count_words(text))
        found["grounding"].append(grounding(text, query, title, schema.names))
    rows = rows.assign(**found, **counts)
    concluded = rows["predicted_label"]
    other = [any(one != said for one in named) for named, said in zip(rows["named"], concluded, strict=True)]
    blank = rows["rationale"].str.strip() == ""
    faithful = (rows["invented"] == "") & ~rows.assign(other=other)["other"] & ~blank & concluded.notna()
    return rows.assign(
        named=["; ".join(named) for named in rows["named"]],
        other_verdict=[int(one) for one in other],
        right=(concluded == rows["label"]).astype(int),
        faithful=faithful.astype(int),
    )


def near_duplicates(rationales: pd.Series, similarity: float, seed: int) -> list[int | None]:
    """Find, for each rationale, the position of the first earlier one that says nearly the same, or None.

    MinHash of word shingles (character shingles in scripts without spaces) proposes, the exact Jaccard similarity
    of the shingles decides. Blank texts are nobody's duplicate.
    """
    from datasketch import MinHash, MinHashLSH
    from tqdm import tqdm

    shingled = [shingles(text) for text in rationales]
    index = MinHashLSH(threshold=similarity, num_perm=64)
    result: list[int | None] = []
    first: dict[frozenset[str], int] = {}
    for row, own in enumerate(tqdm(shingled, desc="near-duplicates", unit="rationale", delay=2)):
        if not own or own in first:
            result.append(first[own] if own else None)
            continue
        first[own] = row
        sketch = MinHash(num_perm=64, seed=seed + 1)
        sketch.update_batch([shingle.encode() for shingle in own])
        near = [int(key) for key in index.query(sketch)]
        same = [other for other in near if len(own & shingled[other]) / len(own | shingled[other]) >= similarity]
        result.append(min(same) if same else None)
        index.insert(str(row), sketch)
    return result


def shingles(text: str) -> frozenset[str]:
    """Cut a text into overlapping runs of three words, or of three characters where there are hardly any spaces.

    >>> sorted(shingles("It fits the phone.")), sorted(shingles("対応機種が違う"))[:2]
    (['fits the phone', 'it fits the'], ['が違う', '対応機'])
    """
    from recipes.data.text import normalise

    text = normalise(text)
    parts: list[str] = text.split()
    joint = " "
    if 2 * len(_UNSPACED.findall(text)) > len(text):
        parts, joint = list(text.replace(" ", "")), ""
    runs = [joint.join(parts[i : i + SHINGLE]) for i in range(max(1, len(parts) - SHINGLE + 1))]
    return frozenset(run for run in runs if run)


def main() -> None:
    """Measure faithfulness from the command line."""
    arguments = parse(FaithfulnessArguments, __doc__)
    from recipes.evaluate.faithfulness_report import table

    print(table(faithfulness(arguments)))
    output = arguments.output
    print(f"Wrote {output}/faithfulness.json, report.md, plot.png and completions.parquet.")
    print(
        f"Next: python -m recipes.rationales.build --pairs {arguments.pairs} --completions "
        f"{' '.join(arguments.completions)} --filter {output}/completions.parquet --output RATIONALES.parquet"
    )


if __name__ == "__main__":
    run(main)
