"""Make the bazaar: a synthetic marketplace of labelled (query, product title) pairs in six locales.

The demo's 20,000 pairs, a few hundred for a test, a million:

    python -m recipes.data.bazaar --config recipes/configs/data/bazaar.yaml --output runs/bazaar
    python -m recipes.data.bazaar --config recipes/configs/tiny/bazaar.yaml --output runs/tiny/bazaar
    python -m recipes.data.bazaar --config recipes/configs/data/bazaar.yaml --output runs/large --size 1000000

Writes `{train,validation,test}.parquet` (contract: pairs, label schema aliexpress6), `structures.parquet` (what each
query asks for and each product is: the labels follow from it by `recipes.data.bazaar_rules`, and the scripted
teacher reads it) and `report.json`. The same options give the same bytes. `recipes.publish`
makes a dataset for the Hub of it, with a card that says plainly that it is synthetic.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.data.bazaar_catalogue import LOCALES, load_catalogue
from recipes.data.bazaar_market import KINDS, Market
from recipes.data.bazaar_rules import STRUCTURES, label, to_json
from recipes.data.bazaar_text import Writer
from recipes.data.text import normalise
from recipes.schemas import PAIRS, SPLITS, make_folder, write

if TYPE_CHECKING:
    import pandas as pd

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}
MISSPELT = 0.12
PRODUCTS = (4, 12)
# So many shoppers in a row without a new query: the catalogue is exhausted.
PATIENCE = 2000


@dataclass
class BazaarArguments:
    """Options of `python -m recipes.data.bazaar`."""

    output: str = field(metadata={"help": "Folder to write to."})
    size: int = field(default=20_000, metadata={"help": "Pairs to make, over the three splits."})
    seed: int = field(default=0, metadata={"help": "Another seed gives another bazaar."})
    locales: list[str] = field(
        default_factory=lambda: list(LOCALES), metadata={"help": f"Any of {', '.join(LOCALES)}."}
    )


def make_bazaar(size: int, seed: int = 0, locales: Sequence[str] = LOCALES) -> dict[str, pd.DataFrame]:
    """Make `size` pairs, fewer if the catalogue runs out of new queries.

    A query belongs to one split, and so does a title: neither is in two, compared by `normalise`.

    Args:
        size: Pairs over the three splits.
        seed: Of everything that is drawn.
        locales: Each query draws one of them.

    Returns:
        The splits by name (contract: pairs), and `structures` (contract: structures).

    Raises:
        UserError: The size is not positive or a locale is not in the catalogue.
    """
    import pandas as pd
    from tqdm import tqdm

    check_options(size, locales)
    catalogue = load_catalogue()
    rng = random.Random(f"bazaar {seed}")
    market = Market(catalogue, rng)
    writers = {locale: Writer(catalogue, locale, rng) for locale in locales}
    pairs: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    structures: list[dict[str, Any]] = []
    queries: set[str] = set()
    split_of_title: dict[str, str] = {}
    misses = 0
    with tqdm(total=size, desc="bazaar", unit=" pairs", delay=1) as progress:
        while len(structures) < size and misses < PATIENCE:
            locale = rng.choice(list(locales))
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            ask, name = market.ask(kind, locale)
            query = writers[locale].query(ask, kind, name)
            typed = writers[locale].misspell(query) if rng.random() < MISSPELT else query
            query, misspelt = typed, typed != query
            if normalise(query) in queries:
                misses += 1
                continue
            misses = 0
            # The split that is furthest behind its share gets the query.
            split = min(SPLITS, key=lambda split: len(pairs[split]) / SHARES[split])
            titles: set[str] = set()
            for offer in market.offers(ask, rng.randint(*PRODUCTS)):
                title = writers[locale].title(offer)
                same = normalise(title)
                if same in titles or split_of_title.setdefault(same, split) != split:
                    continue
                if len(structures) == size:
                    break
                pair_id = f"bazaar-{seed}-{len(queries):06d}-{len(titles):02d}"
                titles.add(same)
                pairs[split].append(
                    {
                        "pair_id": pair_id,
                        "query": query,
                        "product_title": title,
                        "locale": locale,
                        "label": label(ask, offer),
                        "brand": offer.brand,
                        "source": "bazaar (synthetic)",
                    }
                )
                structures.append(
                    {
                        "pair_id": pair_id,
                        "split": split,
                        "query_kind": kind,
                        "misspelt": str(misspelt).lower(),
                        "query_structure": to_json(ask),
                        "product_structure": to_json(offer),
                    }
                )
            queries.add(normalise(query))
            progress.update(len(structures) - progress.n)
    frames = {split: pd.DataFrame(rows, columns=_columns(PAIRS), dtype="string") for split, rows in pairs.items()}
    frames["structures"] = pd.DataFrame(structures, columns=_columns(STRUCTURES), dtype="string")
    return frames


def check_options(size: int, locales: Sequence[str]) -> None:
    """Refuse what cannot be made.

    Raises:
        UserError: The size is not positive, or a locale is unknown or repeated, or there is none.
    """
    if size < 1:
        raise UserError(f"size: {size} pairs asked for; expected 1 or more.")
    unknown = [locale for locale in locales if locale not in LOCALES]
    if unknown:
        raise UserError(f"locales: {unknown[0]!r} is not in the catalogue; choose from {', '.join(LOCALES)}.")
    if not locales or len(set(locales)) != len(locales):
        raise UserError(f"locales: {list(locales)}; expected one or more of {', '.join(LOCALES)}, each once.")


def report(frames: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Count pairs by split, label, locale and kind of query."""
    import pandas as pd

    pairs = pd.concat([frames[split].assign(split=split) for split in SPLITS])
    structures = frames["structures"]
    return {
        "pairs": len(pairs),
        "queries": int(pairs["query"].nunique()),
        "split": {split: len(frames[split]) for split in SPLITS},
        "label": _counts(pairs["label"]),
        "locale": _counts(pairs["locale"]),
        "query_kind": _counts(structures["query_kind"]),
        "misspelt": int((structures["misspelt"] == "true").sum()),
    }


def main() -> None:
    """Make the bazaar and write it."""
    arguments = parse(BazaarArguments, __doc__)
    check_options(arguments.size, arguments.locales)
    output = make_folder(arguments.output)
    frames = make_bazaar(arguments.size, arguments.seed, arguments.locales)
    for split in SPLITS:
        write(frames[split], output / f"{split}.parquet", PAIRS)
    write(frames["structures"], output / "structures.parquet", STRUCTURES)
    counts = report(frames)
    command = command_line("recipes.data.bazaar", arguments)
    recorded = {"command": command, "arguments": to_dict(arguments), **counts}
    (output / "report.json").write_text(json.dumps(recorded, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if counts["pairs"] < arguments.size:
        print(f"{counts['pairs']:,} of {arguments.size:,} pairs: the catalogue has no more new queries.")
    print(f"{output}: {counts['pairs']:,} pairs of {counts['queries']:,} queries")
    for name, count in counts["label"].items():
        print(f"  {name:<20} {count:>9,}  {count / counts['pairs']:6.1%}")
    print(f"Next: python -m recipes.teacher.scripted --pairs {output} --output {output / 'completions.parquet'}")


def _columns(contract: Any) -> list[str]:
    """Columns that the bazaar fills."""
    return [name for name in contract.columns if name in {"brand", "source"} or contract.columns[name].required]


def _counts(values: pd.Series) -> dict[str, int]:
    return {str(name): int(count) for name, count in values.value_counts().sort_index().items()}


if __name__ == "__main__":
    run(main)
