"""The paper's pilot on one slice of pairs: each perspective alone, their oracle, their vote, and how they agree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.schemas import PERSPECTIVES, LabelSchema
from recipes.teacher.measures import Measured, agreement, measure, oracle, pass_at_k, vote

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Answers = Mapping[str, NDArray[np.int64]]


def evaluate_answers(
    answers: Answers,
    gold: NDArray[np.int64],
    query: NDArray[np.int64],
    schema: LabelSchema,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Measure one slice of pairs.

    Args:
        answers: Perspective -> class indices `(samples, pairs)`, unread answers `len(schema.names)`; the number of
            samples may differ by perspective.
        gold: Class indices `(pairs,)`.
        query: Index of each pair's query, from 0 without a gap `(pairs,)`.
        schema: Classes.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        What `metrics.json` holds for the slice. What the samples do not allow is None, with the reason in `undefined`.
    """
    classes = len(schema.names)
    right = {name: rows == gold for name, rows in answers.items()}
    joint = [name for name in PERSPECTIVES if name in answers]
    votes = {f"vote {name}": rows for name, rows in answers.items() if len(rows) > 1}
    if len(joint) > 1:
        in_turn = itertools.zip_longest(*(answers[name] for name in joint))  # first samples, then second ones, ...
        votes["vote"] = np.stack([rows for sample in in_turn for rows in sample if rows is not None])
    elected = {key: vote(rows, classes) for key, rows in votes.items()}

    one = np.ones(len(gold))
    ratios: dict[str, tuple[NDArray[Any], NDArray[Any]]] = {
        key: (winners == gold, one) for key, (winners, _) in elected.items()
    }
    runs: dict[str, Sequence[NDArray[np.int64]]] = {
        f"macro-F1 {key}": [winners] for key, (winners, _) in elected.items()
    }
    for name, rows in right.items():
        accuracy = rows.mean(axis=0)
        ratios[f"accuracy {name}"] = (accuracy, one)
        runs[f"macro-F1 {name}"] = list(answers[name])
        for k in range(1, len(rows) + 1):
            ratios[f"pass@{k} {name}"] = (pass_at_k(rows.sum(axis=0), len(rows), k), one)
        for label in np.unique(gold):
            ratios[f"accuracy {name} on {schema.names[label]}"] = (accuracy * (gold == label), gold == label)
    if len(joint) > 1:
        ratios["oracle"] = (oracle([right[name] for name in joint]), one)
    measured = measure(ratios, runs, gold, query, classes, draws, seed)

    def voted(key: str) -> dict[str, Any] | None:
        if key not in votes:
            return None
        tied = float(elected[key][1].mean())
        return {"accuracy": measured.of(key), "macro_f1": measured.of(f"macro-F1 {key}"), "ties": tied}

    frequent = np.bincount(gold, minlength=classes)
    return {
        "pairs": len(gold),
        "queries": int(query.max()) + 1,
        "constant_answers": _constant_answers(frequent, schema),
        "perspectives": {
            name: {
                "samples": len(rows),
                "unparsed": float((rows == classes).mean()),
                "accuracy": measured.of(f"accuracy {name}"),
                "macro_f1": measured.of(f"macro-F1 {name}"),
                "pass_at_k": {str(k): measured.of(f"pass@{k} {name}") for k in range(1, len(rows) + 1)},
                "vote": voted(f"vote {name}"),
                "per_class": {
                    label: {"pairs": int(count), **measured.of(f"accuracy {name} on {label}")} if count else None
                    for label, count in zip(schema.names, frequent, strict=True)
                },
            }
            for name, rows in answers.items()
        },
        "together": _together(answers, gold, joint, measured, classes) | {"vote": voted("vote")}
        if len(joint) > 1
        else None,
        "undefined": _undefined(answers, joint),
    }


def _constant_answers(frequent: NDArray[np.int64], schema: LabelSchema) -> list[dict[str, Any]]:
    order = np.argsort(-frequent, kind="stable")
    return [
        {
            "labels": [schema.names[label] for label in order[:size]],
            "any_right": float(frequent[order[:size]].sum() / frequent.sum()),
        }
        for size in (1, 2)
    ]


def _together(
    answers: Answers, gold: NDArray[np.int64], joint: Sequence[str], measured: Measured, classes: int
) -> dict[str, Any]:
    """Compare the three perspectives with each other, and what they reach together with the best one alone."""
    budget = len(joint)
    best = measured.best([f"accuracy {name}" for name in joint])
    differences = [measured.difference("oracle", best), measured.difference("vote", best)]
    if able := [f"pass@{budget} {name}" for name in joint if len(answers[name]) >= budget]:
        differences.append(measured.difference("oracle", measured.best(able)))
    first = np.stack([answers[name][0] for name in joint])  # (perspectives, pairs)
    agree = (first == first[0]).all(axis=0) & (first[0] < classes)
    named = sum((first == label).any(axis=0) for label in range(classes))
    return {
        "perspectives": list(joint),
        "oracle": measured.of("oracle"),
        "labels_named": float(np.mean(named)),
        "best_single": best.removeprefix("accuracy "),
        "differences": differences,
        "agreement": {
            f"{a} / {b}": agreement(answers[a][0], answers[b][0], classes) for a, b in itertools.combinations(joint, 2)
        },
        "all_agree": {
            "share": float(agree.mean()),
            "accuracy": float((first[0] == gold)[agree].mean()) if agree.any() else None,
        },
        "conflict": float((first != gold).any(axis=0).mean()),
    }


def _undefined(answers: Answers, joint: Sequence[str]) -> dict[str, str]:
    reasons = {}
    if len(joint) < 2:
        found = ", ".join(joint) or "none of them"
        reasons["oracle, vote and agreement"] = f"need two of {', '.join(PERSPECTIVES)}; there is {found}"
    budget = max(len(joint), 2)
    if few := [f"{name} has {len(answers[name])}" for name in joint if len(answers[name]) < budget]:
        reasons[f"pass@{budget}"] = f"needs {budget} samples of a perspective; {', '.join(few)}"
    if few := [name for name, rows in answers.items() if len(rows) == 1]:
        reasons["vote within a perspective"] = f"needs two samples of it; {', '.join(few)} has one"
    return reasons
