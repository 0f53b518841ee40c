"""Perturb pairs: small changes of query or title, those that leave the label as it is and those that do not.

A perturbation is a pure function of a `Pair` and a `random.Random`; it returns the changed pair, or None where it does
not apply (no word to misspell, no brand in the title). `perturb` applies several to a table of pairs. What it skips is
counted: a perturbation that does not apply, that changes nothing, or that empties a text.

Kinds that change the label say what it is now where they can: the bazaar's pairs carry the structures behind them
(`Pair.ask`, `Pair.offer`), which are changed with the text, and the rules then give the new label. Elsewhere only
relevant pairs are changed, so that they must not stay relevant.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.data.bazaar_rules import Ask, Offer, ask_from_json, label, offer_from_json
from recipes.data.perturb_changing import (
    accessory_words,
    attribute_change,
    brand_swap,
    negation,
    number_change,
)
from recipes.data.perturb_preserving import (
    brand_swap_unnamed,
    case,
    code_switching,
    emoji,
    keyword_stuffing,
    long_title,
    query_in_title,
    title_order,
    typo,
    typo_title,
    units,
    word_order,
)

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema


@dataclass(frozen=True)
class Pair:
    """A pair as a perturbation sees it.

    Attributes:
        query: As typed.
        title: As written.
        locale: Decides the words.
        relevant: Whether its label is one of the relevant classes.
        brand: Of the product, where it is known.
        rivals: Other brands that the same need could be met by.
        ask: The structure behind the query, for pairs of the bazaar.
        offer: The structure behind the product, for pairs of the bazaar.
    """

    query: str
    title: str
    locale: str
    relevant: bool = True
    brand: str | None = None
    rivals: tuple[str, ...] = ()
    ask: Ask | None = None
    offer: Offer | None = None

    def with_texts(self, query: str | None = None, title: str | None = None) -> Pair:
        """Return the pair with another query or title, the structures as they are."""
        return replace(self, query=self.query if query is None else query, title=self.title if title is None else title)


Perturbation = Callable[[Pair, random.Random], "Pair | None"]

PRESERVING: Mapping[str, Perturbation] = {
    "typo": typo,
    "typo_title": typo_title,
    "case": case,
    "word_order": word_order,
    "title_order": title_order,
    "keyword_stuffing": keyword_stuffing,
    "query_in_title": query_in_title,
    "brand_swap_unnamed": brand_swap_unnamed,
    "code_switching": code_switching,
    "units": units,
    "emoji": emoji,
    "long_title": long_title,
}
# Kinds that look at the label: trained with, what they add to a text would give the label away.
LABEL_BOUND = frozenset({"query_in_title"})
CHANGING: Mapping[str, Perturbation] = {
    "brand_swap": brand_swap,
    "negation": negation,
    "number_change": number_change,
    "attribute_change": attribute_change,
    "accessory_words": accessory_words,
}
KINDS: Mapping[str, Perturbation] = {**PRESERVING, **CHANGING}


@dataclass
class Perturbed:
    """What `perturb` made of a table of pairs.

    Attributes:
        pairs: One row a changed pair and kind: `row` (position in the table), `kind`, `query`, `product_title`, and
            `label`: the label that is right now; null where it is only known that no relevant class is.
        skipped: Kind -> why -> pairs: `does not apply`, `changes nothing`, `empties a text`.
    """

    pairs: pd.DataFrame
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)


def perturb(
    frame: pd.DataFrame,
    schema: LabelSchema,
    kinds: Mapping[str, Perturbation] = KINDS,
    seed: int = 0,
    structures: pd.DataFrame | None = None,
) -> Perturbed:
    """Apply each kind to each pair.

    A pair's result depends on its pair_id, the kind and the seed alone, not on the other rows.

    Args:
        frame: Contract pairs, labels by class name.
        schema: Says which classes are relevant.
        kinds: Name -> perturbation.
        seed: Of everything that is drawn.
        structures: Contract structures, for pairs of the bazaar.

    Raises:
        UserError: Some pairs have structures and others have none.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    skipped = {kind: {"does not apply": 0, "changes nothing": 0, "empties a text": 0} for kind in kinds}
    pairs = to_pairs(frame, schema, structures)
    for kind, apply in kinds.items():
        for row, (pair_id, pair, gold) in enumerate(zip(frame["pair_id"], pairs, frame["label"], strict=True)):
            changed = apply(pair, random.Random(f"{kind} {seed} {pair_id}"))
            if changed is None:
                skipped[kind]["does not apply"] += 1
            elif (changed.query, changed.title) == (pair.query, pair.title):
                skipped[kind]["changes nothing"] += 1
            elif not changed.query.strip() or not changed.title.strip():
                skipped[kind]["empties a text"] += 1
            else:
                now = gold if kind not in CHANGING else _new_label(pair, changed)
                texts = {"query": changed.query, "product_title": changed.title}
                rows.append({"row": row, "kind": kind, **texts, "label": now})
    columns = ["row", "kind", "query", "product_title", "label"]
    return Perturbed(pd.DataFrame(rows, columns=columns).astype({"row": "int64"}), skipped)


def _new_label(pair: Pair, changed: Pair) -> str | None:
    if changed.ask is None or changed.offer is None:
        return None
    if (changed.ask, changed.offer) == (pair.ask, pair.offer):
        raise AssertionError("a perturbation that changes the label must change the structures with the text")
    return label(changed.ask, changed.offer)


def to_pairs(frame: pd.DataFrame, schema: LabelSchema, structures: pd.DataFrame | None = None) -> list[Pair]:
    """Turn rows into `Pair`s; rivals are the brands of the query's other products, or of the bazaar's category.

    Raises:
        UserError: Some pairs have structures and others have none.
    """
    known = None if structures is None else structures.set_index("pair_id")
    if known is not None and not frame["pair_id"].isin(known.index).all():
        missing = frame["pair_id"][~frame["pair_id"].isin(known.index)].iloc[0]
        raise UserError(
            f"structures.parquet has no row for pair {missing!r}. Both are made by recipes.data.bazaar: keep them "
            "together, or move structures.parquet away to do without."
        )
    brands = frame["brand"].astype(object).where(frame["brand"].notna(), "") if "brand" in frame else [""] * len(frame)
    of_query: dict[tuple[str, str], list[str]] = {}
    for locale, query, brand in zip(frame["locale"], frame["query"], brands, strict=True):
        if brand.strip():
            of_query.setdefault((locale, query), []).append(brand.strip())
    pairs = []
    columns = (frame["pair_id"], frame["query"], frame["product_title"], frame["locale"], frame["label"], brands)
    for pair_id, query, title, locale, gold, brand in zip(*columns, strict=True):
        ask = offer = None
        rivals: Sequence[str] = of_query.get((locale, query), ())
        if known is not None:
            ask = ask_from_json(known.at[pair_id, "query_structure"])
            offer = offer_from_json(known.at[pair_id, "product_structure"])
            rivals = _makers(offer)
        own = brand.strip() or None
        others = tuple(sorted({name for name in rivals if own and name.casefold() != own.casefold()}))
        pairs.append(Pair(query, title, locale, gold in schema.relevant, own, others, ask, offer))
    return pairs


def _makers(offer: Offer) -> list[str]:
    """List the brands that make this kind of product in the bazaar."""
    from recipes.data.bazaar_catalogue import load_catalogue

    catalogue = load_catalogue()
    category = catalogue.categories[offer.category]
    return list(category.brands) if category.host is None else list(catalogue.words["accessory_brands"])


def augment(frame: pd.DataFrame, schema: LabelSchema, share: float, kinds: Sequence[str], seed: int) -> pd.DataFrame:
    """Change a share of the rows in place, each by one perturbation that leaves its label as it is.

    The rows and their perturbations are drawn once, from the seed; `pair_id`, and with it the embedding that guides
    the pair, stays. A drawn row to which none of the kinds applies is left as it is.

    Args:
        frame: Contract pairs.
        schema: Says which classes are relevant.
        share: Of the rows, from 0 to 1.
        kinds: Names in `PRESERVING` to draw from; empty: all but `LABEL_BOUND`.
        seed: Of the draws.

    Raises:
        UserError: The share is outside 0 to 1, or a kind is not one of `PRESERVING`.
    """
    import pandas as pd

    if not 0 <= share <= 1:
        raise UserError(f"augment: expected a share from 0 to 1, got {share}.")
    if unknown := [kind for kind in kinds if kind not in PRESERVING]:
        raise UserError(
            f"augment_kinds: {unknown[0]!r} is not a perturbation that leaves the label as it is; "
            f"choose from {', '.join(PRESERVING)}."
        )
    names = list(kinds) or [kind for kind in PRESERVING if kind not in LABEL_BOUND]
    queries, titles = frame["query"].tolist(), frame["product_title"].tolist()
    for row, (pair_id, pair) in enumerate(zip(frame["pair_id"], to_pairs(frame, schema), strict=True)):
        rng = random.Random(f"augment {seed} {pair_id}")
        if rng.random() >= share:
            continue
        for kind in rng.sample(names, len(names)):
            changed = PRESERVING[kind](pair, rng)
            if changed is not None and changed != pair and changed.query.strip() and changed.title.strip():
                queries[row], titles[row] = changed.query, changed.title
                break
    changed = frame.copy()
    changed["query"] = pd.array(queries, dtype=frame["query"].dtype)
    changed["product_title"] = pd.array(titles, dtype=frame["product_title"].dtype)
    return changed
