"""How well a teacher answers: accuracy, macro-F1, pass@k, oracle, vote and agreement, with intervals over queries.

Answers are class indices; an answer that could not be read is one class more (`num_classes`), which no gold label is:
it counts as wrong, and as no vote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evaluate.significance import draw_queries, interval, metrics_of_draws, query_statistics

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
    "labels_named": "Different labels that the first samples of a pair's perspectives name, mean over pairs.",
    "constant_answers": "What the one and the two most frequent gold labels, said of every pair, would get right.",
    "best_single": "The perspective with the highest accuracy on these very pairs, so its accuracy flatters it.",
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


def oracle(right: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Chance of each pair `(pairs,)` that one sample a perspective holds a right one: 1 - product of (1 - c/n).

    Args:
        right: Of each perspective, which samples are right `(samples, pairs)`.

    Example:
        One perspective is right in 1 of 2 samples, the other in 0 of 1; then 1 of 2 and 1 of 1.

        >>> oracle([np.array([[True, True], [False, False]]), np.array([[False, True]])]).tolist()
        [0.5, 1.0]
    """
    return 1 - np.prod([1 - rows.mean(axis=0) for rows in right], axis=0)


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


@dataclass(frozen=True)
class Measured:
    """Measures of a slice, and the same measures in every draw of queries `(draws,)`: all see the same draws."""

    point: Mapping[str, float]
    drawn: Mapping[str, NDArray[np.float64]]

    def of(self, key: str) -> dict[str, Any]:
        """Return one measure with its interval."""
        return {"value": self.point[key], "interval": interval(self.drawn[key])}

    def difference(self, first: str, second: str) -> dict[str, Any]:
        """Return `first` - `second` with its interval."""
        between = interval(self.drawn[first] - self.drawn[second])
        return {"of": first, "to": second, "value": self.point[first] - self.point[second], "interval": between}

    def best(self, keys: Sequence[str]) -> str:
        """Return the key of the highest measure, the first of equals."""
        return max(keys, key=lambda key: self.point[key])


def measure(
    ratios: Mapping[str, tuple[NDArray[Any], NDArray[Any]]],
    runs: Mapping[str, Sequence[NDArray[np.int64]]],
    gold: NDArray[np.int64],
    query: NDArray[np.int64],
    num_classes: int,
    draws: int,
    seed: int,
) -> Measured:
    """Compute measures and bootstrap them over queries.

    Args:
        ratios: Name -> values of the pairs, and their weights: the measure is one sum divided by the other.
        runs: Name of a macro-F1 -> answers `(pairs,)` of each run that it is the mean over.
        gold: Class indices `(pairs,)`.
        query: Index of each pair's query, from 0 without a gap `(pairs,)`.
        num_classes: Classes of the label schema.
        draws: Of queries.
        seed: Of the draws.
    """
    queries = int(query.max()) + 1
    numerators, denominators = (
        np.stack([np.bincount(query, weights=sides[side], minlength=queries) for sides in ratios.values()], axis=1)
        for side in (0, 1)
    )  # (queries, ratios)
    predicted = np.stack([rows for name in runs for rows in runs[name]])
    # The class beyond the schema's is never gold: to answer it costs the recall of others and has no F1 of its own.
    statistics = query_statistics(query, gold, predicted, np.zeros((len(predicted), queries)), num_classes + 1)
    ends = np.cumsum([len(rows) for rows in runs.values()])

    def of_draws(times_taken: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):  # a draw without a pair of some class: NaN, left out of its interval
            values = (times_taken @ numerators) / (times_taken @ denominators)
        f1 = np.split(metrics_of_draws(times_taken, statistics)[:, 1], ends[:-1], axis=1)
        return {
            **dict(zip(ratios, values.T, strict=True)),
            **{name: part.mean(axis=1) for name, part in zip(runs, f1, strict=True)},
        }

    point = of_draws(np.ones((1, queries)))
    parts = [of_draws(times_taken) for times_taken in draw_queries(queries, draws, seed)]
    return Measured(
        point={key: float(value[0]) for key, value in point.items()},
        drawn={key: np.concatenate([part[key] for part in parts]) for key in point},
    )
