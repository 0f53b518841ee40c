"""Make preference pairs for DPO: a right rationale before a wrong one, under the perspective-free prompt.

    # The paper's: conflict set (eq. 4), chosen from 5 passes over all perspectives
    python -m recipes.teacher.preferences --pairs runs/esci/pairs --completions runs/esci/completions.parquet \
        --labels esci --output runs/esci/teacher/preferences.parquet
    # Best-SingleCoT's, from the passes of one perspective; as many of the paper's; lengths balanced
    python -m recipes.teacher.preferences ... --select single --output runs/esci/teacher/preferences_single.parquet
    python -m recipes.teacher.preferences ... --same_size_as runs/esci/teacher/preferences_single.parquet --output ...
    python -m recipes.teacher.preferences ... --balance_lengths true --output ...
    # CRSD's: the best and the worst by a reward of several dimensions (recipes/teacher/reward.py)
    python -m recipes.teacher.preferences ... --select reward --output ...

A pair is in the conflict set if a perspective is wrong about it in one of its passes. Each failing perspective gives
one preference pair: rejected, a wrong rationale of it; chosen, a right one of any perspective (`single`: the same).
What was drawn depends on the seed and on nothing else. Writes the contract `preferences` and OUTPUT.report.json, with
the lengths of both sides: DPO takes a difference in length for a reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import PERSPECTIVES, PREFERENCES, write
from recipes.teacher.judged import (
    Judged,
    JudgedArguments,
    answer,
    by_pair,
    draw,
    judge,
    one_perspective,
    wanted_size,
)
from recipes.teacher.reward import brevity, count_words, faithfulness, label_correctness, reward, rule_adherence

if TYPE_CHECKING:
    import pandas as pd


@dataclass(kw_only=True)
class PreferencesArguments(JudgedArguments):
    """Options of `python -m recipes.teacher.preferences`."""

    select: Literal["cross", "single", "reward"] = field(
        default="cross", metadata={"help": "cross: the paper's. single: within one perspective. reward: CRSD's."}
    )
    passes: int = field(default=5, metadata={"help": "Samples of each perspective that are looked at."})
    balance_lengths: bool = field(
        default=False, metadata={"help": "Choose the right and the wrong rationale that are closest in length."}
    )
    tokenizer: str | None = field(default=None, metadata={"help": "Count its tokens (None: words)."})
    label_weight: float = field(default=1.0, metadata={"help": "Reward: of the right label."})
    faithfulness_weight: float = field(default=0.5, metadata={"help": "Reward: of faithfulness to query and title."})
    rules_weight: float = field(default=0.25, metadata={"help": "Reward: of adherence to the business rules."})
    brevity_weight: float = field(default=0.25, metadata={"help": "Reward: of brevity."})
    min_margin: float = field(default=0.1, metadata={"help": "Reward: of chosen over rejected, at least."})


def main() -> None:
    """Run the verb."""
    prefer(parse(PreferencesArguments, __doc__))


def prefer(arguments: PreferencesArguments) -> pd.DataFrame:
    """Read, pair up, render and write; return the rows.

    Raises:
        UserError: The input breaks its contract, or the conflict set is empty.
    """
    import pandas as pd

    weights = {name: getattr(arguments, f"{name}_weight") for name in ("label", "faithfulness", "rules", "brevity")}
    if arguments.passes < 1 or min(weights.values()) < 0 or not sum(weights.values()):
        raise UserError("passes: expected 1 or more; weights: 0 or more, and not all 0.")
    size = wanted_size(arguments.size, arguments.same_size_as)
    length = token_counter(arguments.tokenizer)
    judged = judge(arguments)
    rows = judged.rows[judged.rows["sample_index"] < arguments.passes]
    if arguments.select == "single":
        rows = one_perspective(rows, arguments.perspective)
    elif arguments.select == "cross":
        rows = rows[rows["perspective"].isin(PERSPECTIVES)]
    if arguments.select == "reward":
        found = list(by_reward(rows.assign(reward=rewards(rows, judged, weights)), arguments.min_margin))
    else:
        found = list(conflicts(rows, arguments.seed, length if arguments.balance_lengths else None))
    if not found:
        raise UserError(_why_empty(rows, arguments))
    chosen, rejected = (
        draw(pd.DataFrame(side), size, arguments.seed, "preference pairs") for side in zip(*found, strict=True)
    )
    frame = pd.DataFrame(
        {
            "prompt": [judged.prompt(row) for row in chosen.itertuples()],
            "chosen": [answer(row.rationale, row.predicted_label) for row in chosen.itertuples()],
            "rejected": [answer(row.rationale, row.predicted_label) for row in rejected.itertuples()],
            "pair_id": list(chosen["pair_id"]),
            "chosen_perspective": list(chosen["perspective"]),
            "rejected_perspective": list(rejected["perspective"]),
        }
    )
    path = write(frame, arguments.output, PREFERENCES)
    report = {
        "preference_pairs": len(frame),
        "pairs": int(frame["pair_id"].nunique()),
        "left_out": {reason: number for reason, number in judged.left_out.items() if number},
        "lengths": length_report(chosen["rationale"], rejected["rationale"], length)
        | {"unit": "words" if arguments.tokenizer is None else f"tokens of {arguments.tokenizer}"},
        "arguments": to_dict(arguments),
    }
    write_json(path.with_name(f"{path.name}.report.json"), report)
    lengths = report["lengths"]
    print(f"{len(frame):,} preference pairs of {report['pairs']:,} pairs; left out: {report['left_out']}")
    print(
        f"{lengths['unit']}: chosen {lengths['chosen']}, rejected {lengths['rejected']} on average; the chosen one is "
        f"longer in {lengths['chosen_longer']:.1%}, shorter in {lengths['chosen_shorter']:.1%}"
    )
    print(f"wrote {path}\nnext: python -m recipes.teacher.dpo --adapter SFT_ADAPTER --data {path} --output DIR")
    return frame


def conflicts(rows: pd.DataFrame, seed: int, length: Callable[[str], int] | None = None) -> Iterator[tuple[Any, Any]]:
    """Yield (chosen, rejected) for each failing perspective of each pair of the conflict set (eq. 4).

    Args:
        rows: Judged completions.
        seed: Decides, with pair and perspective, what is drawn.
        length: Where given, the two that are closest in length are taken instead; the draw decides between equals.
    """
    for group in by_pair(rows):
        right = [row for row in group if row.right]
        if not right:
            continue
        for perspective in dict.fromkeys(row.perspective for row in group if not row.right):
            generator = random.Random(f"{seed} {group[0].pair_id} {perspective}")
            wrong = [row for row in group if row.perspective == perspective and not row.right]
            right, wrong = (generator.sample(side, k=len(side)) for side in (right, wrong))
            if length is None:
                yield right[0], wrong[0]
            else:
                yield min(
                    product(right, wrong), key=lambda two: abs(length(two[0].rationale) - length(two[1].rationale))
                )


def rewards(rows: pd.DataFrame, judged: Judged, weights: dict[str, float]) -> list[float]:
    """Score every completion."""
    names = judged.labels.names
    return [
        reward(
            {
                "label": label_correctness(row.predicted_label, row.label),
                "faithfulness": faithfulness(row.rationale, row.query, row.product_title, names),
                "rules": rule_adherence(
                    row.rationale,
                    row.predicted_label,
                    [rule for rule in judged.book.rules if not rule.locales or row.locale in rule.locales],
                ),
                "brevity": brevity(row.rationale),
            },
            weights,
        )
        for row in rows.itertuples()
    ]


def by_reward(rows: pd.DataFrame, min_margin: float) -> Iterator[tuple[Any, Any]]:
    """Yield the best right completion of each pair before its worst of all, where the margin is large enough.

    Two right ones may make a pair (one invents, the other does not); a wrong one is never chosen.
    """
    for group in by_pair(rows):
        ranked = sorted(group, key=lambda row: -row.reward)
        right = [row for row in ranked if row.right]
        if right and right[0].reward - ranked[-1].reward >= min_margin:
            yield right[0], ranked[-1]


def length_report(chosen: pd.Series, rejected: pd.Series, length: Callable[[str], int]) -> dict[str, float]:
    """Compare the lengths of both sides: means, and how often the chosen one is longer or shorter."""
    chosen, rejected = chosen.map(length).to_numpy(), rejected.map(length).to_numpy()
    return {
        "chosen": round(float(chosen.mean()), 1),
        "rejected": round(float(rejected.mean()), 1),
        "mean_difference": round(float((chosen - rejected).mean()), 2),
        "mean_absolute_difference": round(float(abs(chosen - rejected).mean()), 2),
        "chosen_longer": float((chosen > rejected).mean()),
        "chosen_shorter": float((chosen < rejected).mean()),
    }


def token_counter(tokenizer: str | None) -> Callable[[str], int]:
    """Return a function that measures a text in tokens, or in words."""
    if tokenizer is None:
        return count_words
    from recipes.teacher.tuning import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


def _why_empty(rows: pd.DataFrame, arguments: PreferencesArguments) -> str:
    right = rows.groupby("pair_id")["right"]
    return (
        f"the conflict set is empty: of {rows['pair_id'].nunique():,} pairs with {len(rows):,} completions, "
        f"{int(right.all().sum()):,} are right throughout and {int((~right.any()).sum()):,} wrong throughout, so there "
        f"is nothing to prefer ({arguments.select}). Generate more passes, or take pairs that the teacher finds harder."
    )


if __name__ == "__main__":
    run(main)
