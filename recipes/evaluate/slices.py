"""Compare systems slice by slice: locale, head and tail queries, kinds of queries, categories.

    python -m recipes.evaluate.slices --pairs runs/esci/pairs --baseline none --output runs/esci/slices \
        --runs 'none=runs/esci/bench/none-*/evaluation-test' 'gat=runs/esci/bench/gat-[0-9]/evaluation-test'
    python -m recipes.evaluate.slices --runs gat=runs/transfer/bazaar_on_esci --baseline gat \
        --pairs runs/esci/pairs --output runs/transfer/slices

Runs are given as to recipes.evaluate.compare (one system alone will do). Slices are of queries, so that a query's
products stay together:
- `locale`;
- `products`: how many products of it are judged, which is how head queries differ from tail queries in ESCI;
- `words`: how long it is (two characters of Chinese, Japanese or Korean count as one word);
- `seen`: in how many queries of train.parquet its rarest word stands (words by white space);
- `says`: whether it names a brand of the data, a number, something to leave out, a device ("for"), or none of these.
  ESCI has no categories: this stands in for them;
- `category` and `kind`: of the bazaar, from structures.parquet beside the pairs.

Writes slices.json, table.md and plot.png. Slices of fewer than `--fewest` queries are left out and counted. Intervals
and p-values are those of compare; nothing is corrected for the number of slices: they show where to look.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import load_labels, make_folder, read, read_pairs

if TYPE_CHECKING:
    import pandas as pd

_WITHOUT = re.compile(r"\b(?:without|not|no|sin|que no sea|sem|não|sans|pas)\b|以外|なし|아닌", re.IGNORECASE)
_FOR = re.compile(r"\b(?:for|para|pour|compatible)\b|用|対応|호환", re.IGNORECASE)


@dataclass
class SlicesArguments:
    """Options of `recipes.evaluate.slices`."""

    baseline: str = field(metadata={"help": "Name of the system that the others are compared with."})
    pairs: str = field(metadata={"help": "Folder of the pairs that were scored; train.parquet tells what was seen."})
    output: str = field(metadata={"help": "Folder to write slices.json, table.md and plot.png to."})
    runs: list[str] = field(default_factory=list, metadata={"help": "NAME=DIR ..., wildcards allowed in DIR."})
    runs_file: str | None = field(default=None, metadata={"help": "JSON lines: system, predictions, seed."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder was scored."})
    labels: str = field(default="esci", metadata={"help": "Label schema of the predictions."})
    fewest: int = field(default=10, metadata={"help": "Queries that a slice must have."})
    draws: int = field(default=2_000, metadata={"help": "Bootstrap draws."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})


def query_slices(pairs: pd.DataFrame, train: pd.DataFrame, structures: pd.DataFrame | None = None) -> pd.DataFrame:
    """Say which slices each query is in.

    Args:
        pairs: Contract pairs: the products that were scored.
        train: Contract pairs: what the students learnt from.
        structures: Contract structures, for pairs of the bazaar.

    Returns:
        One row a query, by (locale, query): a column a way of slicing, the names of its slices in the cells (a tuple
        where a query can be in several).
    """
    import pandas as pd

    from recipes.data.perturb_words import find_word
    from recipes.data.text import normalise
    from recipes.teacher.reward import count_words

    queries = pairs.groupby(["locale", "query"], sort=False)
    table = pd.DataFrame({"products": queries.size()})
    text = table.index.get_level_values("query")
    table["locale"] = table.index.get_level_values("locale")
    table["words"] = [_band(count_words(query), (2, 4), "word") for query in text]
    known = Counter(word for query in train["query"].unique() for word in set(normalise(query).split()))
    rarest = [min((known[word] for word in normalise(query).split()), default=0) for query in text]
    table["seen"] = [_band(count, (0, 4), "train query", "train queries") for count in rarest]
    table["products"] = [_band(count, (1, 9), "product") for count in table["products"]]
    brands = {brand.strip() for frame in (pairs, train) if "brand" in frame for brand in frame["brand"].dropna()}
    brands = {brand for brand in brands if len(brand) > 2}
    keys = {normalise(brand) for brand in brands}
    said = []
    for query in text:
        words = normalise(query).split()
        runs = {" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1)}
        found = ["names a brand"] * bool(runs & keys or any(find_word(query, b) for b in brands if not b.isascii()))
        found += ["names a number"] * bool(re.search(r"\d", query))
        found += ["leaves something out"] * bool(_WITHOUT.search(query)) + ["for a device"] * bool(_FOR.search(query))
        said.append(tuple(found) or ("none of these",))
    table["says"] = said
    if structures is not None:
        from recipes.data.bazaar_rules import ask_from_json

        rows = pairs[["pair_id", "locale", "query"]].merge(structures, on="pair_id")
        first = rows.drop_duplicates(["locale", "query"]).set_index(["locale", "query"]).loc[table.index]
        asks = [ask_from_json(ask) for ask in first["query_structure"]]
        table["category"] = [(ask.hosts or ask.categories)[0] if len(ask.categories) < 3 else "a brand" for ask in asks]
        table["kind"] = first["query_kind"].to_numpy()
    return table


def _band(count: int, ends: tuple[int, int], noun: str, plural: str | None = None) -> str:
    """Name the band that a number is in: up to the first end, up to the second, or more.

    >>> _band(1, (1, 9), "product"), _band(5, (1, 9), "product"), _band(10, (1, 9), "product")
    ('1 product', '2-9 products', '10+ products')
    >>> _band(0, (0, 4), "word"), _band(2, (2, 4), "word")
    ('0 words', '1-2 words')
    """
    low, high = ends
    plural = plural or f"{noun}s"
    if count <= low:
        return f"{low} {noun if low == 1 else plural}" if low < 2 else f"1-{low} {plural}"
    return f"{low + 1}-{high} {plural}" if count <= high else f"{high + 1}+ {plural}"


def slices(arguments: SlicesArguments) -> dict[str, Any]:
    """Read the runs, slice, compare and write; return what slices.json holds.

    Raises:
        UserError: The baseline is missing, a file breaks its contract, or the runs are of other pairs.
    """
    import numpy as np

    from recipes.data.bazaar_rules import STRUCTURES
    from recipes.evaluate.compare import compare_slice
    from recipes.evaluate.metrics import ranking_by_query, to_arrays
    from recipes.evaluate.runs import list_runs, read_aligned
    from recipes.evaluate.significance import query_statistics
    from recipes.evaluate.slices_report import plot, table

    schema = load_labels(arguments.labels)
    runs = list_runs(arguments.runs, arguments.runs_file)
    systems = list(dict.fromkeys(one.system for one in runs))
    if arguments.baseline not in systems:
        raise UserError(
            f"--baseline {arguments.baseline}: expected one of {', '.join(systems) or 'the systems of --runs'}."
        )
    if arguments.draws < 100 or arguments.fewest < 1:
        raise UserError("--draws: expected at least 100; --fewest: at least 1.")
    folder = read_pairs(arguments.pairs, dict.fromkeys(["train", arguments.split]))
    runs = sorted(runs, key=lambda one: one.system != arguments.baseline)
    tables = read_aligned(runs, schema)
    pairs = folder[arguments.split]
    if missing := set(tables[0]["pair_id"]) - set(pairs["pair_id"]):
        raise UserError(f"{arguments.pairs}/{arguments.split}.parquet: has no pair {min(missing)!r}, which was scored.")
    pairs = pairs.set_index("pair_id").loc[tables[0]["pair_id"]].reset_index()
    structures = Path(arguments.pairs, "structures.parquet")
    behind = read(structures, STRUCTURES) if structures.is_file() else None
    of_query = query_slices(pairs, folder["train"], behind)

    query = tables[0].groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    arrays = [to_arrays(part, schema, str(one.predictions)) for one, part in zip(runs, tables, strict=True)]
    gold, predicted = arrays[0][0], np.stack([row for _, row, _ in arrays])
    ndcg = np.stack([ranking_by_query(part, schema)["ndcg"] for part in tables])
    statistics = query_statistics(query, gold, predicted, ndcg, len(schema.names))
    output = make_folder(arguments.output)
    result: dict[str, dict[str, Any]] = {"all": {}}
    left_out: dict[str, int] = {}
    for way in ["all", *of_query.columns]:
        cells = [("all",)] * len(of_query) if way == "all" else of_query[way]
        cells = [cell if isinstance(cell, tuple) else (cell,) for cell in cells]
        result[way] = {}
        for name in sorted({name for cell in cells for name in cell}, key=_natural):
            chosen = np.array([name in cell for cell in cells])
            if way != "all" and chosen.sum() < arguments.fewest:
                left_out[way] = left_out.get(way, 0) + 1
                continue
            right = (predicted == gold)[:, chosen[query]]
            found = compare_slice(
                runs, statistics.select(chosen), right, arguments.draws, arguments.seed, f"{way}: {name}"
            )
            result[way][name] = {"pairs": int(chosen[query].sum()), "queries": int(chosen.sum()), **found}
    report = {
        "command": command_line("recipes.evaluate.slices", arguments),
        "baseline": arguments.baseline,
        "slices": {way: parts for way, parts in result.items() if len(parts) > 1 or way == "all"},
        "left_out": left_out,
        "arguments": to_dict(arguments),
    }
    (output / "table.md").write_text(table(report), encoding="utf-8")
    plot(report, output / "plot.png")
    write_json(output / "slices.json", report)
    return report


def _natural(name: str) -> tuple[int, str]:
    number = re.match(r"\d+", name)
    return (int(number[0]) if number else -1, name)


def main() -> None:
    """Compare slices from the command line."""
    arguments = parse(SlicesArguments, __doc__)
    from recipes.evaluate.slices_report import table

    print(table(slices(arguments)))
    print(f"Wrote {arguments.output}/slices.json, table.md and plot.png.")
    print("Next: read the errors of the slice that stands out; recipes.evaluate.taxonomy sorts those of a teacher.")


if __name__ == "__main__":
    run(main)
