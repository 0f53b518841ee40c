"""How well a teacher answers: accuracy, macro-F1, pass@k, oracle, vote and agreement, with intervals over queries.

Answers are class indices; an answer that could not be read is one class more (`num_classes`), which no gold label is:
it counts as wrong, and as no vote.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evaluate.significance import (
    bootstrap_p_value,
    draw_queries,
    interval,
    metrics_of_draws,
    query_statistics,
)
from recipes.schemas import PERSPECTIVES, LabelSchema

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Written into metrics.json.
CONVENTIONS = {
    "accuracy": "Mean over samples and pairs; with one sample a pair, of that. An unread answer is wrong.",
    "macro_f1": "As in recipes.evaluate.run, of each sample on its own, then the mean over samples.",
    "pass_at_k": "Mean over pairs of 1 - C(n-c, k) / C(n, k): n samples, c right (arXiv 2107.03374, eq. 1).",
    "oracle": (
        "Whether any perspective is right, one sample each: mean over pairs of 1 - product over perspectives of "
        "(1 - c/n). Three perspectives cost three samples, so it is set against pass@3 of a single one."
    ),
    "vote": (
        "Self-consistency: the label that most samples name, unread answers aside. Of tied labels, the one named "
        "first: by sample, then in the order of perspectives."
    ),
    "per_class": "Accuracy on the pairs of one gold class (its recall).",
    "agreement": "First samples, pairs where both were read: share of equal labels, and Cohen's kappa.",
    "conflict": "Share of pairs on which at least one perspective is wrong, first samples (eq. 4).",
    "interval": "95 %, percentiles of a bootstrap that draws queries with all their pairs.",
}


def pass_at_k(right: NDArray[np.int64], samples: int, k: int) -> NDArray[np.float64]:
    """Estimate the chance that at least one of `k` samples is right, without bias: 1 - C(n-c, k) / C(n, k).

    Args:
        right: c, right samples of each pair `(pairs,)`.
        samples: n, samples of each pair.
        k: At most `samples`.

    Example:
        Of 5 samples 0, 1, 2, 5 are right. One right: 3 of 5 drawn miss it with C(4,3)/C(5,3) = 4/10.

        >>> pass_at_k(np.array([0, 1, 2, 5]), samples=5, k=3).tolist()
        [0.0, 0.6, 0.9, 1.0]
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k = {k}: expected 1 to {samples}, the number of samples.")
    chances = [1 - math.comb(samples - c, k) / math.comb(samples, k) for c in range(samples + 1)]
    return np.array(chances)[right]


def vote(answers: NDArray[np.int64], num_classes: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the label that most votes name `(pairs,)`, and where that was a tie, which the earliest vote decides.

    Args:
        answers: Votes in order `(votes, pairs)`; `num_classes` is no vote.
        num_classes: Classes of the label schema; also the result where nobody voted.

    Example:
        >>> winners, tied = vote(np.array([[2, 0, 3], [1, 1, 3], [1, 2, 0]]), num_classes=3)
        >>> winners.tolist(), tied.tolist()
        ([1, 0, 0], [False, True, False])
    """
    counts = np.stack([(answers == label).sum(axis=0) for label in range(num_classes)])  # (classes, pairs)
    most = counts.max(axis=0)
    is_winner = np.vstack([counts == most, most == 0])  # the last row: nobody voted
    is_winner[:-1] &= most > 0
    # Whether each vote is for one of the winners; the first such vote names the result.
    for_winner = is_winner[answers, np.arange(answers.shape[1])]
    return answers[for_winner.argmax(axis=0), np.arange(answers.shape[1])], is_winner.sum(axis=0) > 1


def agreement(one: NDArray[np.int64], other: NDArray[np.int64], num_classes: int) -> dict[str, Any]:
    """Compare two perspectives' labels `(pairs,)` where both were read; kappa is None where it is 0 / 0."""
    from sklearn.metrics import cohen_kappa_score

    read = (one < num_classes) & (other < num_classes)
    one, other = one[read], other[read]
    # With one label on both sides chance agrees always, and nothing is left to measure.
    defined = len(np.union1d(one, other)) > 1
    return {
        "pairs": int(read.sum()),
        "equal": float((one == other).mean()) if len(one) else None,
        "kappa": float(cohen_kappa_score(one, other)) if defined else None,
    }


def evaluate_answers(
    answers: Mapping[str, NDArray[np.int64]],
    gold: NDArray[np.int64],
    query: NDArray[np.int64],
    schema: LabelSchema,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Measure one slice of pairs.

    Args:
        answers: Perspective -> class indices `(samples, pairs)`; the number of samples may differ by perspective.
        gold: `(pairs,)`.
        query: Index of each pair's query, from 0 without a gap `(pairs,)`.
        schema: Classes.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        What `metrics.json` holds for the slice. What the samples do not allow is None, with the reason in `undefined`.
    """
    classes = len(schema.names)
    joint = [name for name in PERSPECTIVES if name in answers]
    undefined: dict[str, str] = {}
    right = {name: rows == gold for name, rows in answers.items()}
    counts = {name: rows.sum(axis=0) for name, rows in right.items()}
    samples = {name: len(rows) for name, rows in answers.items()}

    # Every measure but macro-F1 is a sum over pairs divided by another: name -> values of the pairs, and which count.
    everything = np.ones(len(gold))
    ratios: dict[tuple[Any, ...], tuple[NDArray[Any], NDArray[Any]]] = {}
    runs = {name: list(rows) for name, rows in answers.items()}  # what macro-F1 is the mean over
    ties: dict[str, float] = {}
    for name, n in samples.items():
        ratios["accuracy", name] = (counts[name] / n, everything)
        for k in range(1, n + 1):
            ratios["pass_at_k", name, k] = (pass_at_k(counts[name], n, k), everything)
        for label in np.unique(gold):
            ratios["per_class", name, label] = (counts[name] / n * (gold == label), gold == label)
    voters = {name: answers[name] for name in answers if samples[name] > 1}
    if len(joint) > 1:
        ratios["oracle", "joint"] = (
            1 - np.prod([1 - counts[name] / samples[name] for name in joint], axis=0),
            everything,
        )
        together = itertools.zip_longest(*(answers[name] for name in joint))
        voters["joint"] = np.stack([row for rows in together for row in rows if row is not None])
    else:
        undefined["oracle, vote, agreement"] = (
            f"need two of {', '.join(PERSPECTIVES)}; found {', '.join(joint) or 'none'}"
        )
    for name, votes in voters.items():
        winners, tied = vote(votes, classes)
        ratios["vote", name] = ((winners == gold).astype(float), everything)
        runs[f"vote {name}"] = [winners]
        ties[name] = float(tied.mean())
    k = max(len(joint), 2)
    if few := [f"{name} {samples[name]}" for name in joint if samples[name] < k]:
        undefined[f"pass@{k}"] = f"needs {k} samples a pair; there are: {', '.join(few)}"
    if few := [name for name, n in samples.items() if n == 1]:
        undefined["vote within a perspective"] = f"needs two samples a pair; there is one for {', '.join(few)}"

    point, drawn = _bootstrap(ratios, runs, gold, query, classes, draws, seed)

    def measured(*key: Any) -> dict[str, Any]:
        return {"value": point[key], "interval": interval(drawn[key])}

    def difference(first: tuple[Any, ...], second: tuple[Any, ...]) -> dict[str, Any]:
        between = drawn[first] - drawn[second]
        return {
            "of": " ".join(map(str, first)),
            "to": " ".join(map(str, second)),
            "value": point[first] - point[second],
            "interval": interval(between),
            "p": bootstrap_p_value(between),
        }

    def voted(name: str) -> dict[str, Any] | None:
        if name not in voters:
            return None
        return {
            "accuracy": measured("vote", name),
            "macro_f1": measured("macro_f1", f"vote {name}"),
            "ties": ties[name],
        }

    frequent = np.bincount(gold, minlength=classes)
    order = np.argsort(-frequent, kind="stable")
    result: dict[str, Any] = {
        "pairs": len(gold),
        "queries": int(query.max()) + 1,
        "constant_answers": [
            {
                "labels": [schema.names[i] for i in order[:size]],
                "any_right": float(frequent[order[:size]].sum() / len(gold)),
            }
            for size in (1, 2)
        ],
        "perspectives": {
            name: {
                "samples": n,
                "unparsed": float((answers[name] == classes).mean()),
                "accuracy": measured("accuracy", name),
                "macro_f1": measured("macro_f1", name),
                "pass_at_k": {str(k): measured("pass_at_k", name, k) for k in range(1, n + 1)},
                "vote": voted(name),
                "per_class": {
                    label: {"pairs": int(frequent[i]), **measured("per_class", name, i)} if frequent[i] else None
                    for i, label in enumerate(schema.names)
                },
            }
            for name, n in samples.items()
        },
        "vote": voted("joint"),
        "oracle": None,
        "differences": [],
    }
    if len(joint) > 1:
        best = max(joint, key=lambda name: point["accuracy", name])
        result["best_single"] = best
        result["oracle"] = {**measured("oracle", "joint"), "perspectives": joint}
        result["differences"] = [
            difference(("oracle", "joint"), ("accuracy", best)),
            difference(("vote", "joint"), ("accuracy", best)),
        ]
        if able := [name for name in joint if samples[name] >= k]:
            best = max(able, key=lambda name: point["pass_at_k", name, k])
            result["differences"].append(difference(("oracle", "joint"), ("pass_at_k", best, k)))
        first = {name: answers[name][0] for name in joint}
        result["agreement"] = {
            f"{a} / {b}": agreement(first[a], first[b], classes) for a, b in itertools.combinations(joint, 2)
        }
        equal = np.all([rows == first[joint[0]] for rows in first.values()], axis=0) & (first[joint[0]] < classes)
        result["all_agree"] = {"share": float(equal.mean()), "accuracy": _mean(first[joint[0]][equal] == gold[equal])}
        result["conflict"] = float(np.any([rows != gold for rows in first.values()], axis=0).mean())
    return {**result, "undefined": undefined}


def _mean(values: NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _bootstrap(
    ratios: Mapping[tuple[Any, ...], tuple[NDArray[Any], NDArray[Any]]],
    runs: Mapping[str, Sequence[NDArray[np.int64]]],
    gold: NDArray[np.int64],
    query: NDArray[np.int64],
    classes: int,
    draws: int,
    seed: int,
) -> tuple[dict[tuple[Any, ...], float], dict[tuple[Any, ...], NDArray[np.float64]]]:
    """Return each measure, and its value in every draw of queries `(draws,)`; all measures see the same draws."""
    queries = int(query.max()) + 1
    keys = list(ratios)
    sums = [
        np.stack([np.bincount(query, weights=ratios[key][side], minlength=queries) for key in keys], axis=1)
        for side in (0, 1)
    ]  # numerators and denominators (queries, measures)
    predicted = np.stack([rows for name in runs for rows in runs[name]])
    # The class beyond the schema's is never gold: predicting it costs the recall of others and has no F1 of its own.
    statistics = query_statistics(query, gold, predicted, np.zeros((len(predicted), queries)), classes + 1)
    ends = np.cumsum([len(rows) for rows in runs.values()])

    def values(times_taken: NDArray[np.float64]) -> dict[tuple[Any, ...], NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):  # a draw without a pair of some class
            ratio = (times_taken @ sums[0]) / (times_taken @ sums[1])
        f1 = np.split(metrics_of_draws(times_taken, statistics)[:, 1], ends[:-1], axis=1)
        scores = {("macro_f1", name): part.mean(axis=1) for name, part in zip(runs, f1, strict=True)}
        return {**{key: ratio[:, column] for column, key in enumerate(keys)}, **scores}

    point = {key: float(value[0]) for key, value in values(np.ones((1, queries))).items()}
    parts = [values(times_taken) for times_taken in draw_queries(queries, draws, seed)]
    return point, {key: np.concatenate([part[key] for part in parts]) for key in point}
