"""Choose among completions what the teacher is tuned on, all under one perspective-free prompt.

    # The paper's MPCoT: what predicts the gold label (eq. 1), over all perspectives (eq. 2)
    python -m recipes.teacher.sft_data --pairs runs/esci/pairs --completions runs/esci/completions.parquet \
        --labels esci --output runs/esci/teacher/mpcot.parquet
    # Best-SingleCoT, and S-CoT size-matched (from more samples of that perspective)
    python -m recipes.teacher.sft_data ... --select single --output runs/esci/teacher/single.parquet
    python -m recipes.teacher.sft_data ... --select single --same_size_as runs/esci/teacher/mpcot.parquet --output ...
    # ProgressiveCoT: three files for three successive runs of recipes.teacher.sft
    python -m recipes.teacher.sft_data ... --select expert_explanation --output ...
    python -m recipes.teacher.sft_data ... --select rule_adherence --output ...
    python -m recipes.teacher.sft_data ... --select decision_reflection --output ...

ProgressiveCoT follows LREF (arXiv 2503.09223), whose full text was not at hand. Our reading: the stages train the same
pairs under the same prompt, one after the other, each from the adapter of the stage before. `expert_explanation`: what
structured analysis explains, attribute by attribute. `rule_adherence`: what business rules decide. In
`decision_reflection` the reasoning begins with a verdict, a wrong one where a perspective was wrong, reflects on it
with a right rationale of another perspective, and decides. A pair takes part in the stages that it has a right
completion for.

Writes the contract `sft` and, beside it, OUTPUT.report.json: what was kept, and why the rest was not.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import write_json
from recipes.schemas import PERSPECTIVES, SFT, write
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

if TYPE_CHECKING:
    import pandas as pd

STAGES = ("expert_explanation", "rule_adherence", "decision_reflection")
REFLECTION = "{draft}\nFirst verdict: {first}.\nReflecting on that verdict: {reason}\nThe verdict {outcome} {label}."


@dataclass(kw_only=True)
class SftDataArguments(JudgedArguments):
    """Options of `python -m recipes.teacher.sft_data`."""

    select: Literal["union", "single", "expert_explanation", "rule_adherence", "decision_reflection"] = field(
        default="union", metadata={"help": "union: MPCoT. single: one perspective. Else: a stage of ProgressiveCoT."}
    )
    samples: int | None = field(
        default=None, metadata={"help": "Right samples kept of a pair and perspective (None: all that differ)."}
    )


def main() -> None:
    """Run the verb."""
    collect(parse(SftDataArguments, __doc__))


def collect(arguments: SftDataArguments) -> pd.DataFrame:
    """Read, select, render and write; return the rows.

    Raises:
        UserError: The input breaks its contract, or a perspective that is needed is never right.
    """
    from tqdm import tqdm

    if arguments.samples is not None and arguments.samples < 1:
        raise UserError(f"samples: {arguments.samples}; expected 1 or more.")
    size = wanted_size(arguments.size, arguments.same_size_as)
    judged = judge(arguments)
    rows = draw(select(judged, arguments), size, arguments.seed, "rationales")
    frame = rows.assign(
        prompt=[judged.prompt(row) for row in tqdm(rows.itertuples(), "Rendering prompts", len(rows), delay=1)],
        completion=[answer(row.rationale, row.label) for row in rows.itertuples()],
    )[["prompt", "completion", "pair_id", "perspective"]]
    path = write(frame, arguments.output, SFT)
    report = summary(rows, judged) | {"arguments": to_dict(arguments)}
    write_json(path.with_name(f"{path.name}.report.json"), report)
    for name, numbers in report["perspectives"].items():
        print(f"{name:>20}: {numbers['rows']:,} rationales, {numbers['mean_words']} words on average")
    print(f"wrote {path}: {len(frame):,} rows of {report['pairs']:,} pairs; left out: {report['left_out']}")
    print(f"next: python -m recipes.teacher.sft --data {path} --model Qwen/Qwen3-14B --output DIR")
    return frame


def select(judged: Judged, arguments: SftDataArguments) -> pd.DataFrame:
    """Choose right completions (eq. 1): of all perspectives (eq. 2), of one, or for a stage.

    Raises:
        UserError: A perspective that is needed has no completion, or none that predicts the gold label.
    """
    rows = judged.rows
    if arguments.select == "single":
        rows = one_perspective(rows, arguments.perspective)
    elif arguments.select != "union":
        needed = {"expert_explanation": PERSPECTIVES[1], "rule_adherence": PERSPECTIVES[2]}.get(arguments.select)
        rows = rows[rows["perspective"].isin(PERSPECTIVES if needed is None else (needed,))]
    else:
        rows = rows[rows["perspective"].isin(PERSPECTIVES)]
        _check_every_perspective(rows)
    right = rows[rows["right"]].drop_duplicates(["pair_id", "perspective", "rationale"])
    if right.empty:
        raise UserError(
            f"{arguments.select}: none of {len(rows):,} completions predicts the gold label, so nothing can be learnt "
            "from them. Is --labels the schema they were made with? Look at recipes.teacher.evaluate."
        )
    judged.left_out["predicts another label"] = int((~rows["right"]).sum())
    if arguments.select == "decision_reflection":
        right = reflect(rows, right, arguments.seed)
    if arguments.samples is not None:
        right = right.groupby(["pair_id", "perspective"], sort=False).head(arguments.samples)
    return right.reset_index(drop=True)


def _check_every_perspective(rows: pd.DataFrame) -> None:
    """Refuse a union that would silently be one of fewer perspectives."""
    for name in PERSPECTIVES:
        part = rows[rows["perspective"] == name]
        if part.empty:
            raise UserError(f"union: no completion of {name!r}; generate it, or take --select single.")
        if not part["right"].any():
            raise UserError(
                f"union: none of the {len(part):,} completions of {name!r} predicts the gold label. Look at its prompt "
                "(recipes.teacher.prompts) and its label names, or take --select single."
            )


def reflect(rows: pd.DataFrame, right: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Write a reasoning that revises or confirms a first verdict, one a pair.

    The draft is drawn from the wrong completions of the pair, else from the right ones of a perspective other than the
    reason's; a pair with a single right completion and no wrong one has nothing to reflect on and is left out.
    """
    import pandas as pd

    drafts = {group[0].pair_id: group for group in by_pair(rows)}
    reflected = []
    for group in by_pair(right):
        pair_id = group[0].pair_id
        choose = random.Random(f"{seed} {pair_id}").choice
        reason = choose(group)
        wrong = [row for row in drafts[pair_id] if not row.right]
        others = wrong or [row for row in drafts[pair_id] if row.perspective != reason.perspective]
        if not others:
            continue
        draft = choose(others)
        text = REFLECTION.format(
            draft=draft.rationale,
            first=draft.predicted_label,
            reason=reason.rationale,
            outcome="stays" if draft.right else "changes to",
            label=reason.label,
        )
        reflected.append(reason._replace(rationale=text, perspective="decision_reflection"))
    if not reflected:
        raise UserError("decision_reflection: every pair has one completion only; it takes two to reflect.")
    return pd.DataFrame(reflected)


def summary(rows: pd.DataFrame, judged: Judged) -> dict[str, Any]:
    """Count rows by perspective and by label."""
    words = rows["rationale"].str.split().str.len()
    return {
        "rows": len(rows),
        "pairs": int(rows["pair_id"].nunique()),
        "left_out": {reason: number for reason, number in judged.left_out.items() if number},
        "rows_by_label": {name: int((rows["label"] == name).sum()) for name in judged.labels.names},
        "perspectives": {
            name: {"rows": len(part), "mean_words": round(float(part.mean()), 1)}
            for name, part in words.groupby(rows["perspective"], sort=False)
        },
    }


if __name__ == "__main__":
    run(main)
