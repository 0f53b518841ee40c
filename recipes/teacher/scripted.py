"""The bazaar's scripted teacher: three perspectives that reason over the structures behind the pairs.

    python -m recipes.teacher.scripted --pairs runs/bazaar --output runs/bazaar/completions.parquet
    python -m recipes.teacher.scripted --pairs runs/bazaar --output runs/bazaar/completions.parquet --samples 5 --seed 1
    python -m recipes.teacher.scripted --pairs runs/rule/new --output runs/rule/new.parquet \
        --rules recipes/rules/changed/aliexpress6_compatible.yaml

It takes the place of a large language model where there is none: no weights, no network, thousands of pairs a
second. Each perspective sees the structures through its own eyes (`scripted_views.py`), so each is wrong in its own
way, as the three prompts of the paper are; then the rules of `recipes.data.bazaar_rules` decide on what was seen. The
wording comes from `scripted.yaml`. Writes the contract `completions`, as `recipes.teacher.generate` does.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.data.bazaar_policy import follow
from recipes.data.bazaar_rules import (
    STRONGLY_RELEVANT,
    STRUCTURES,
    Ask,
    Decision,
    Offer,
    ask_from_json,
    offer_from_json,
)
from recipes.record import write_json
from recipes.schemas import COMPLETIONS, PERSPECTIVES, load_labels, make_folder, read, read_pairs, write
from recipes.teacher.books import Rule, load_rules
from recipes.teacher.scripted_views import NO_VALUE, judge

if TYPE_CHECKING:
    import pandas as pd

MODEL = "scripted-teacher"
WORDS = (20, 45)


@dataclass
class ScriptedArguments:
    """Options of `python -m recipes.teacher.scripted`."""

    pairs: str = field(metadata={"help": "Folder made by recipes.data.bazaar."})
    output: str = field(metadata={"help": "Parquet file to write (contract: completions)."})
    samples: int = field(default=1, metadata={"help": "Completions a pair and perspective."})
    seed: int = field(default=0, metadata={"help": "Of wording and of what each perspective overlooks."})
    rules: str | None = field(
        default=None,
        metadata={"help": "Business rules that say which label follows: a name in recipes/rules, or a YAML file (None: "
                          "those the bazaar was made by). Label the pairs by them too: recipes.data.relabel."},
    )  # fmt: skip


@functools.cache
def templates() -> dict[str, Any]:
    """Read the wording."""
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def prompt_hash(perspective: str, rules: Sequence[Rule] = ()) -> str:
    """Identify the version of a perspective's wording and rules, as a prompt's hash does for a language model."""
    parts = [perspective, templates()[perspective], *(asdict(rule) for rule in rules)]
    wording = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(wording.encode()).hexdigest()[:16]


def rationale(decision: Decision, ask: Ask, offer: Offer, query: str, perspective: str, rng: random.Random) -> str:
    """Put a decision into words: 20 to 45 of them, the verdict at the end.

    Args:
        decision: What was decided.
        ask: What the perspective saw of the query.
        offer: What the perspective saw of the product.
        query: As typed.
        perspective: Whose words to use.
        rng: Chooses among them.
    """
    wording = templates()[perspective]
    evidence = wording["evidence"].get(decision.aspect, wording["evidence"]["attribute"])
    if decision.aspect == "rule":  # an edited rule changed what follows from the evidence
        evidence = templates()["rule"][perspective]
    need = " or ".join(ask.categories)
    if len(ask.categories) > 2:  # a brand alone was asked for
        need = f"{ask.brand} product" if ask.brand else "product of some brand"
    title = [value[0] for name, value in offer.attributes.items() if name not in offer.implied]
    title = [value for value in [offer.brand, offer.model, *title] if value and value != NO_VALUE]
    rng.shuffle(title)
    agreed = [name for name in (ask.model or ask.family or ask.brand, ask.fits_model) if name]
    agreed += [value for name, value in ask.attributes.items() if value in offer.attributes.get(name, ())]
    typed = query.split()
    slots = {
        "query": query if len(typed) <= 6 else " ".join([*typed[:6], "…"]),
        "need": need,
        "a_need": _with_article(need),
        "product": offer.category,
        "a_product": _with_article(offer.category),
        "asked": decision.asked,
        "offered": decision.offered,
        "attribute": decision.aspect,
        "title": _listed(title[:3]),
        "agreed": _listed(agreed[:3] or [offer.category]),
        "verdict": decision.label if decision.label == STRONGLY_RELEVANT else _with_article(decision.label),
    }
    while True:
        opening, reason, aside, ending = (
            rng.choice(choices) for choices in (wording["openings"], evidence, wording["asides"], wording["endings"])
        )
        body = f"{opening}; {reason}" if rng.random() < 0.5 else f"{opening}; {reason}. {aside}"
        text = f"{body}, {ending}".format(**slots)
        if WORDS[0] <= len(text.split()) <= WORDS[1]:
            return text[0].upper() + text[1:]


def complete(
    pairs: pd.DataFrame, structures: pd.DataFrame, samples: int = 1, seed: int = 0, rules: Sequence[Rule] = ()
) -> pd.DataFrame:
    """Write the completions of every pair: perspectives in order, samples within each.

    Args:
        pairs: Contract pairs.
        structures: Contract structures, one row a pair.
        samples: Completions a pair and perspective.
        seed: Of everything that is drawn.
        rules: Which labels follow (recipes.data.bazaar_policy); none: the bazaar's own.

    Raises:
        UserError: A pair has no structures.
    """
    import pandas as pd
    from tqdm import tqdm

    known = structures.set_index("pair_id")
    missing = ~pairs["pair_id"].isin(known.index)
    if missing.any():
        row = int(missing.to_numpy().argmax())
        raise UserError(
            f"pair {pairs['pair_id'].iloc[row]!r} has no row in structures.parquet; the scripted teacher only knows "
            f"pairs that recipes.data.bazaar made. For other pairs use recipes.teacher.generate."
        )
    aligned = known.loc[pairs["pair_id"]]
    hashes = {perspective: prompt_hash(perspective, rules) for perspective in PERSPECTIVES}

    def rows() -> Iterator[dict[str, Any]]:
        columns = (aligned["query_structure"], aligned["product_structure"], aligned["query_kind"], aligned["misspelt"])
        together = zip(pairs["pair_id"], pairs["query"], pairs["locale"], *columns, strict=True)
        together = tqdm(together, total=len(pairs), desc="scripted teacher", unit=" pairs", delay=1)
        for pair_id, query, locale, wanted, product, kind, misspelt in together:
            ask, offer = ask_from_json(wanted), offer_from_json(product)
            for perspective in PERSPECTIVES:
                for sample in range(samples):
                    decision, *seen = judge(ask, offer, kind, misspelt == "true", perspective, pair_id, sample, seed)
                    decision = follow(decision, *seen, rules, locale)
                    rng = random.Random(f"words {seed} {pair_id} {perspective} {sample}")
                    words = rationale(decision, *seen, query, perspective, rng)
                    answer = json.dumps({"label": decision.label})
                    yield {
                        "pair_id": pair_id,
                        "perspective": perspective,
                        "sample_index": sample,
                        "prompt_hash": hashes[perspective],
                        "model": MODEL,
                        "sampling": json.dumps({"seed": seed, "samples": samples}),
                        "text": f"<think>{words}</think>\n{answer}",
                        "rationale": words,
                        "predicted_label": decision.label,
                        "parse_error": None,
                    }

    return pd.DataFrame(list(rows()), columns=list(COMPLETIONS.columns))


def figures(completions: pd.DataFrame, pairs: pd.DataFrame) -> dict[str, float]:
    """Measure the first samples: accuracy of each perspective, of any of the three, and how many rationales differ."""
    first = completions[completions["sample_index"] == 0]
    verdicts = first.pivot(index="pair_id", columns="perspective", values="predicted_label").loc[pairs["pair_id"]]
    right = verdicts.eq(pairs["label"].to_numpy(), axis=0)
    accuracies = {perspective: float(right[perspective].mean()) for perspective in PERSPECTIVES}
    oracle = float(right.any(axis=1).mean())
    return {**accuracies, "any of the three": oracle, "distinct": completions["rationale"].nunique() / len(completions)}


def main() -> None:
    """Write the completions of a bazaar."""
    import pandas as pd

    arguments = parse(ScriptedArguments, __doc__)
    if arguments.samples < 1:
        raise UserError(f"samples: {arguments.samples}; expected 1 or more.")
    folder = Path(arguments.pairs)
    splits = read_pairs(folder)
    structures = folder / "structures.parquet"
    if not structures.is_file():
        raise UserError(
            f"{structures}: no such file. The scripted teacher only knows pairs that recipes.data.bazaar made; "
            f"for other pairs use recipes.teacher.generate."
        )
    rules = () if arguments.rules is None else load_rules(arguments.rules, load_labels("aliexpress6"))
    make_folder(Path(arguments.output).parent)
    pairs = pd.concat(splits.values(), ignore_index=True)
    completions = complete(pairs, read(structures, STRUCTURES), arguments.samples, arguments.seed, rules)
    path = write(completions, arguments.output, COMPLETIONS)
    recorded = {"command": command_line("recipes.teacher.scripted", arguments), "arguments": to_dict(arguments)}
    write_json(path.with_name(f"{path.name}.report.json"), recorded)
    print(f"{arguments.output}: {len(completions):,} completions of {len(pairs):,} pairs")
    for name, share in figures(completions, pairs).items():
        print(f"  {name:<20} {share:6.1%}")
    print(f"Next: python -m recipes.rationales.build --pairs {folder} --completions {arguments.output} --output DIR")


def _with_article(name: str) -> str:
    """Put an article before a name; plurals become a set, so that the verb can stay singular.

    >>> _with_article("air fryer"), _with_article("curtains"), _with_article("stylus")
    ('an air fryer', 'a set of curtains', 'a stylus')
    """
    if name.endswith("s") and not name.endswith(("us", "ss")):
        return f"a set of {name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _listed(names: list[str]) -> str:
    """Join names as English does.

    >>> _listed(["navy", "128GB", "Aro 12"]), _listed([])
    ('navy, 128GB and Aro 12', 'little else')
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])) if names else "little else"


if __name__ == "__main__":
    run(main)
