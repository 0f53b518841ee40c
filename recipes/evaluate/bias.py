"""Audit a student for bias by brand: swapped brands, third-party accessories, brands that are filtered wrongly.

    python -m recipes.evaluate.bias --model runs/esci/bench/gat-0 --pairs runs/esci/pairs \
        --output runs/esci/bench/gat-0/evaluation-test
    python -m recipes.evaluate.bias --model runs/demo/students/lrkd-gat-0 --pairs runs/demo/bazaar \
        --labels aliexpress6 --output runs/demo/students/lrkd-gat-0/evaluation-test

- Swaps: the brand in the title is exchanged for others that meet the same need (other products of the query; in the
  bazaar, makers of the category), where the query names none. The score should not change.
- Filtered wrongly: relevant products below `--filtered_below`; without it those of tier 0 or 1 where the student has
  tiers, else those predicted as the class of the lowest gain. Each brand is compared with the other relevant products
  of the same queries (exact, see `within_queries`), Holm over the brands; Wilson intervals, because most brands have
  few products and one or none of them filtered, where drawing queries says nothing.
- Third parties: relevant accessories of another maker than the device's against those of its own maker (in the bazaar
  by structure, elsewhere by "for BRAND" in the title), and the score where the device's maker is put in.

Everything else has 95 % intervals over queries. Writes bias.json, bias.md and bias.png. In the folder of an evaluation,
`recipes.publish.package` takes them into the student's card.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import sha256, weights_sha256, write_json
from recipes.schemas import load_labels, make_folder, read, read_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.data.perturb import Pair

_DEVICE = re.compile(r"(?:\bfor|\bfits|\bcompatible with|\bpara|\bcompatible con|\bpour)\s+(?:the\s+)?", re.IGNORECASE)


@dataclass
class BiasArguments:
    """Options of `recipes.evaluate.bias`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub id of a student."})
    pairs: str = field(metadata={"help": "Folder of pairs with the column `brand`, one parquet file a split."})
    output: str = field(metadata={"help": "Folder to write to: the student's evaluation, for its card."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    filtered_below: float | None = field(default=None, metadata={"help": "Expected gain below which products go."})
    swaps: int = field(default=3, metadata={"help": "Other brands that a pair is tried with, at most."})
    fewest: int = field(default=10, metadata={"help": "Relevant products that a brand must have to be tested."})
    limit: int | None = field(default=None, metadata={"help": "So many pairs only, drawn by seed."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    max_length: int = field(default=128, metadata={"help": "Tokens of query and title together."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the swaps and of the bootstrap."})


def bias(arguments: BiasArguments) -> dict[str, Any]:
    """Read, swap, score, measure and write; return what bias.json holds.

    Raises:
        UserError: An option or a file is not what it should be, or the pairs name no brand.
    """
    import numpy as np
    import pandas as pd

    from recipes.data.bazaar_rules import STRUCTURES
    from recipes.data.perturb import to_pairs
    from recipes.evaluate.bias_report import plot, table
    from recipes.evaluate.predict import load, predict, schema_order
    from recipes.evaluate.scaling import Scaling

    for option in ("swaps", "fewest", "limit", "batch_size", "max_length", "draws"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1.")
    schema = load_labels(arguments.labels)
    file = Path(arguments.pairs, f"{arguments.split}.parquet")
    frame = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    if arguments.limit is not None and arguments.limit < len(frame):
        frame = frame.sample(arguments.limit, random_state=arguments.seed).reset_index(drop=True)
    if "brand" not in frame or frame["brand"].isna().all():
        raise UserError(f"{file}: no pair has a `brand`, so there is nothing to audit. Prepare the pairs with brands.")
    frame["label"] = schema.canonical_column(frame["label"], file)
    structures = Path(arguments.pairs, "structures.parquet")
    pairs = to_pairs(frame, schema, read(structures, STRUCTURES) if structures.is_file() else None)
    model, tokenizer = load(arguments.model, schema, device=arguments.device)
    order = schema_order(model.config.id2label, schema, arguments.model)
    output = make_folder(arguments.output)

    swapped = pd.concat([swap_brands(pairs, arguments.swaps, arguments.seed), first_party(pairs)], ignore_index=True)
    asked = pd.DataFrame({"query": frame["query"], "product_title": frame["product_title"]})
    texts = pd.concat([asked, swapped[["query", "product_title"]]], ignore_index=True)
    texts["pair_id"] = [*frame["pair_id"], *frame["pair_id"].to_numpy()[swapped["row"]]]
    settings = model.config.to_dict()
    # As served: tier thresholds are thresholds of calibrated gains.
    scaling = Scaling(settings.get("temperature") or 1.0, settings.get("class_scales"), settings.get("class_biases"))
    probabilities = predict(model, tokenizer, texts, arguments.batch_size, arguments.max_length)
    probabilities = scaling.apply(probabilities.astype(np.float64))[:, order]
    scores = probabilities @ np.array(schema.gains)
    below, rule = filter_rule(arguments.filtered_below, settings.get("tier_thresholds"))
    worst = int(np.argmin(schema.gains))
    filtered = probabilities.argmax(axis=1) == worst if below is None else scores < below
    rule = rule or f"predicted {schema.names[worst]}"

    report = {
        "command": command_line("recipes.evaluate.bias", arguments),
        "weights_sha256": weights_sha256(arguments.model),
        "pairs_sha256": sha256(file),
        "split": arguments.split,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "filtered": rule,
        "pairs": len(frame),
        **measure(frame, pairs, swapped, scores, filtered, arguments),
        "arguments": to_dict(arguments),
    }
    (output / "bias.md").write_text(table(report), encoding="utf-8")
    plot(report, output / "bias.png")
    write_json(output / "bias.json", report)
    return report


def filter_rule(below: float | None, thresholds: Sequence[float] | None) -> tuple[float | None, str | None]:
    """Return the score below which a product is filtered, and how that is said; None twice: no score decides.

    >>> filter_rule(0.3, None), filter_rule(None, [0.1, 0.4, 0.6, 0.8]), filter_rule(None, None)
    ((0.3, 'expected gain below 0.3'), (0.4, 'tier 0 or 1 (expected gain below 0.4)'), (None, None))
    """
    if below is not None:
        return below, f"expected gain below {below:g}"
    if thresholds is not None and len(thresholds) > 1:
        return thresholds[1], f"tier 0 or 1 (expected gain below {thresholds[1]:g})"
    return None, None


def swap_brands(pairs: Sequence[Pair], swaps: int, seed: int) -> pd.DataFrame:
    """Exchange the brand of each title, where the query names none, for up to `swaps` others.

    Returns:
        One row a swap: `row` (position in `pairs`), `query`, `product_title`, `what` ("swap"), `brand` put in.
    """
    import pandas as pd

    from recipes.data.perturb_preserving import brand_swap_unnamed

    rows = []
    for row, pair in enumerate(pairs):
        rng = random.Random(f"bias {seed} {row} {pair.title}")
        if brand_swap_unnamed(pair, rng) is None:
            continue
        for rival in rng.sample(pair.rivals, min(swaps, len(pair.rivals))):
            changed = brand_swap_unnamed(replace(pair, rivals=(rival,)), rng)
            if changed is not None and changed.title != pair.title:
                rows.append((row, pair.query, changed.title, "swap", rival))
    return pd.DataFrame(rows, columns=["row", "query", "product_title", "what", "brand"]).astype({"row": "int64"})


def first_party(pairs: Sequence[Pair]) -> pd.DataFrame:
    """Put the device's maker in the place of a third-party accessory's, where the query names no maker.

    Returns:
        As `swap_brands`, `what` being "first party".
    """
    import pandas as pd

    from recipes.data.perturb_words import find_word, replace_word

    brands = {pair.brand for pair in pairs if pair.brand}
    rows = []
    for row, pair in enumerate(pairs):
        device = device_brand(pair, brands)
        named = pair.ask.brand if pair.ask is not None else pair.brand and find_word(pair.query, pair.brand)
        if device is None or named or not pair.brand or device.casefold() == pair.brand.casefold():
            continue
        title = replace_word(pair.title, pair.brand, device)
        if title is not None:
            rows.append((row, pair.query, title, "first party", device))
    return pd.DataFrame(rows, columns=["row", "query", "product_title", "what", "brand"]).astype({"row": "int64"})


def device_brand(pair: Pair, brands: set[str]) -> str | None:
    """Return the brand of the device that an accessory is for, None for anything else."""
    if pair.offer is not None:
        return pair.offer.fits_brand if pair.offer.host else None
    for match in _DEVICE.finditer(pair.title):
        words = re.findall(r"[\w'&-]+", pair.title[match.end() : match.end() + 40])[:3]
        for count in (3, 2, 1):
            if len(words) >= count and (name := " ".join(words[:count])) in brands and len(name) > 2:
                return name
    return None


def measure(
    frame: pd.DataFrame,
    pairs: Sequence[Pair],
    swapped: pd.DataFrame,
    scores: NDArray[np.float64],
    filtered: NDArray[np.bool_],
    arguments: BiasArguments,
) -> dict[str, Any]:
    """Measure swaps, brands and third parties.

    Args:
        frame: Contract pairs.
        pairs: The same as `recipes.data.perturb.to_pairs` gives them.
        swapped: Of `swap_brands` and `first_party`.
        scores: Expected gain of the pairs, then of the swapped ones.
        filtered: Whether each would be filtered.
        arguments: `fewest`, `draws` and `seed`.

    Returns:
        `swaps`, `put_in` (brand -> change of the score), `brands` (brand -> how often filtered wrongly), `third_party`.
    """
    import numpy as np
    from statsmodels.stats.proportion import proportion_confint

    from recipes.evaluate.shares import FEWEST_QUERIES, ratios
    from recipes.evaluate.significance import holm

    draws, seed = arguments.draws, arguments.seed
    query = frame.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    row, count = swapped["row"].to_numpy(), len(frame)
    change = scores[count:] - scores[row]
    flipped = filtered[count:] != filtered[row]
    of_swap = (swapped["what"] == "swap").to_numpy()
    result: dict[str, Any] = {"swaps": None, "put_in": {}, "brands": {}, "third_party": None}
    if of_swap.any():
        hits = [change, np.abs(change), flipped]
        found = ratios([hit[of_swap] for hit in hits], [np.ones(of_swap.sum())] * 3, query[row[of_swap]], draws, seed)
        names = ("change", "absolute_change", "decision_flips")
        result["swaps"] = {name: found.entry(place) for place, name in enumerate(names)}
        result["swaps"]["pairs"] = int(np.unique(row[of_swap]).size)
        result["swaps"]["tried"] = int(of_swap.sum())
        brands = swapped["brand"].to_numpy()
        for brand in sorted(set(brands[of_swap])):
            chosen = of_swap & (brands == brand)
            if np.unique(query[row[chosen]]).size >= FEWEST_QUERIES:
                part = ratios([change[chosen], 0 * change[chosen]], [np.ones(chosen.sum())] * 2, query[row[chosen]],
                              draws, seed)  # fmt: skip
                result["put_in"][brand] = part.difference(0, 1) | {"swaps": int(chosen.sum())}
    _adjust(result["put_in"], holm)

    relevant = np.array([pair.relevant for pair in pairs])
    wrongly = filtered[:count]
    own = np.array([pair.brand or "" for pair in pairs])
    if relevant.any():
        result["filtered_wrongly"] = ratios([wrongly & relevant], [relevant], query, draws, seed).entry(0)
    for brand in sorted(set(own[relevant]) - {""}):
        chosen = relevant & (own == brand)
        if chosen.sum() >= arguments.fewest:
            low, high = proportion_confint(wrongly[chosen].sum(), chosen.sum(), method="wilson")
            expected, p = within_queries(wrongly[relevant], chosen[relevant], query[relevant])
            result["brands"][brand] = {
                "value": float(wrongly[chosen].mean()),
                "interval": [float(low), float(high)],
                "expected": expected,
                "p": p,
                "products": int(chosen.sum()),
                "queries": int(np.unique(query[chosen]).size),
            }
    _adjust(result["brands"], holm)

    known = {brand for brand in own if brand}
    devices = [device_brand(pair, known) for pair in pairs]
    known_maker = np.array([device is not None and brand != "" for device, brand in zip(devices, own, strict=True)])
    same = np.array([(device or "").casefold() == brand.casefold() for device, brand in zip(devices, own, strict=True)])
    third, first = relevant & known_maker & ~same, relevant & known_maker & same
    if third.any() or first.any():
        found = ratios([wrongly & third, wrongly & first], [third, first], query, draws, seed)
        party = {"third": found.entry(0), "first": found.entry(1), "difference": found.difference(0, 1)}
        if (~of_swap).any():
            party["change"] = ratios(
                [change[~of_swap]], [np.ones((~of_swap).sum())], query[row[~of_swap]], draws, seed
            ).entry(0)
        result["third_party"] = party
    return result


def within_queries(
    hits: NDArray[np.bool_], of_brand: NDArray[np.bool_], query: NDArray[np.int64]
) -> tuple[float, float]:
    """Compare a brand's products with the others of the same queries.

    Rows of one query share its difficulty, so they are compared within it: where brands do not matter, the hits of a
    query fall on its products at random, and how many of them are the brand's is hypergeometric. The p-value is that
    of the sum over queries, exact and two-sided (of all sums as unlikely as the observed one or less); with one query
    it is Fisher's exact test.

    Args:
        hits: Products that were filtered `(products,)`.
        of_brand: Which are the brand's `(products,)`.
        query: Each product's query `(products,)`.

    Returns:
        The share of the brand's products that would be hit if brands did not matter, and the p-value.
    """
    import numpy as np
    from scipy.stats import hypergeom

    distribution, expected = np.ones(1), 0.0
    for one in np.unique(query[of_brand]):
        inside = query == one
        total, hit, own = inside.sum(), hits[inside].sum(), (of_brand & inside).sum()
        distribution = np.convolve(distribution, hypergeom.pmf(np.arange(own + 1), total, hit, own))
        expected += own * hit / total
    observed = distribution[(hits & of_brand).sum()]
    p = distribution[distribution <= observed * (1 + 1e-9)].sum()
    return float(expected / of_brand.sum()), float(min(1.0, p))


def _adjust(brands: dict[str, Any], holm: Any) -> None:
    """Add `p_holm` over all brands of the table."""
    for entry, adjusted in zip(brands.values(), holm([one["p"] for one in brands.values()]), strict=True):
        entry["p_holm"] = adjusted


def main() -> None:
    """Audit a student from the command line."""
    arguments = parse(BiasArguments, __doc__)
    from recipes.evaluate.bias_report import table

    print(table(bias(arguments)))
    print(f"Wrote {arguments.output}/bias.json, bias.md and bias.png.")
    print(
        f"Next: python -m recipes.publish.package --kind student --source {arguments.model} "
        f"--evaluation {arguments.output} ... states it in the card, where metrics.json lies beside it."
    )


if __name__ == "__main__":
    run(main)
