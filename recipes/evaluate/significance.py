"""Intervals and tests for systems scored on the same pairs: query bootstrap, exact McNemar, Holm.

Rows of one query are correlated, so the bootstrap draws queries, with all their rows. A metric of a draw is then a
function of sums over the drawn queries, so a draw is a vector of how often each query was taken and 10,000 draws of
dozens of runs are one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.schemas import LabelSchema

METRICS = ("accuracy", "macro_f1", "ndcg")
DRAWS_AT_ONCE = 500  # 500 draws x 10,000 queries x 8 bytes: 40 MB


@dataclass
class QueryStatistics:
    """What the metrics need to know of each query, for all runs on the same pairs.

    Attributes:
        gold: Rows of each gold class `(queries, classes)`.
        correct: Of those, rows predicted right `(queries, runs, classes)`.
        predicted: Rows predicted as each class `(queries, runs, classes)`.
        ndcg: nDCG of the query `(queries, runs)`; NaN where the query has no product of positive gain.
    """

    gold: NDArray[np.float64]
    correct: NDArray[np.float64]
    predicted: NDArray[np.float64]
    ndcg: NDArray[np.float64]

    def select(self, queries: NDArray[np.bool_]) -> QueryStatistics:
        """Keep some queries, e.g. those of one locale."""
        return QueryStatistics(self.gold[queries], self.correct[queries], self.predicted[queries], self.ndcg[queries])

    def of_runs(self, runs: Sequence[int]) -> QueryStatistics:
        """Keep some runs, in this order."""
        return QueryStatistics(self.gold, self.correct[:, runs], self.predicted[:, runs], self.ndcg[:, runs])


def query_statistics(
    query: NDArray[np.int64],
    gold: NDArray[np.int64],
    predicted: NDArray[np.int64],
    ndcg: NDArray[np.float64],
    num_classes: int,
) -> QueryStatistics:
    """Count rows by query.

    Args:
        query: Index of each row's query, from 0 without a gap `(rows,)`.
        gold: Gold class of each row `(rows,)`.
        predicted: Predicted classes `(runs, rows)`.
        ndcg: nDCG of each query `(runs, queries)`.
        num_classes: Classes of the label schema.
    """
    shape = (ndcg.shape[1], num_classes)

    def count(classes: NDArray[np.int64], weights: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
        cells = query * num_classes + classes
        return np.bincount(cells, weights=weights, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)

    return QueryStatistics(
        gold=count(gold),
        correct=np.stack([count(gold, weights=run == gold) for run in predicted], axis=1),
        predicted=np.stack([count(run) for run in predicted], axis=1),
        ndcg=ndcg.T,
    )


def metrics_of_draws(times_taken: NDArray[np.float64], statistics: QueryStatistics) -> NDArray[np.float64]:
    """Compute the metrics of samples of queries.

    Args:
        times_taken: How often each query is in each sample `(draws, queries)`; all ones gives the metrics themselves.
        statistics: See `QueryStatistics`.

    Returns:
        `(draws, METRICS, runs)`; NaN where a sample has no query with an nDCG.
    """
    draws, _ = times_taken.shape
    queries, runs, classes = statistics.correct.shape

    def total(counts: NDArray[np.float64]) -> NDArray[np.float64]:
        return (times_taken @ counts.reshape(queries, runs * classes)).reshape(draws, runs, classes)

    gold = (times_taken @ statistics.gold)[:, None, :]  # (draws, 1, classes)
    correct = total(statistics.correct)
    f1 = 2 * correct / np.maximum(gold + total(statistics.predicted), 1)
    has_ndcg = ~np.isnan(statistics.ndcg[:, 0])  # depends on gold gains only: the same for every run
    with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is promised
        ndcg = (times_taken[:, has_ndcg] @ statistics.ndcg[has_ndcg]) / times_taken[:, has_ndcg].sum(1, keepdims=True)
    return np.stack([correct.sum(2) / gold.sum(2), (f1 * (gold > 0)).sum(2) / (gold > 0).sum(2), ndcg], axis=1)


def bootstrap(statistics: QueryStatistics, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Draw queries with replacement and yield the metrics `(some draws, METRICS, runs)` until there are `draws`.

    Every run sees the same draws, so differences between runs are paired.
    """
    for times_taken in draw_queries(len(statistics.gold), draws, seed):
        yield metrics_of_draws(times_taken, statistics)


def draw_queries(queries: int, draws: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Draw queries with replacement and yield how often each was taken `(some draws, queries)`, `draws` in all."""
    generator = np.random.default_rng(seed)
    for start in range(0, draws, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, draws - start)
        taken = generator.integers(queries, size=(size, queries)) + queries * np.arange(size)[:, None]
        times_taken = np.bincount(taken.ravel(), minlength=size * queries).reshape(size, queries)
        yield times_taken.astype(np.float64)


def interval(draws: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the draws in which the metric is defined."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def intervals(
    predictions: pd.DataFrame, schema: LabelSchema, draws: int = 10_000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Percentile intervals of one run's metrics over queries drawn with replacement, overall and per locale.

    Args:
        predictions: A table of the `PREDICTIONS` contract.
        schema: Classes and gains.
        draws: Bootstrap draws.
        seed: Of the draws.
        level: Of the intervals.

    Returns:
        `level`, `draws`, `seed`, `overall` and `locales` (locale -> slice); a slice is metric -> [low, high], without
        nDCG where no query has one.
    """
    from recipes.evaluate.metrics import ranking_by_query, to_arrays

    gold, predicted, _ = to_arrays(predictions, schema)
    ranking = ranking_by_query(predictions, schema)
    query = predictions.groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    statistics = query_statistics(query, gold, predicted[None], ranking["ndcg"].to_numpy()[None], len(schema.names))
    locales = ranking["locale"].to_numpy()

    def of(chosen: NDArray[np.bool_]) -> dict[str, list[float]]:
        drawn = np.concatenate(list(bootstrap(statistics.select(chosen), draws, seed)))[:, :, 0]  # (draws, METRICS)
        defined = [not np.isnan(drawn[:, position]).all() for position in range(len(METRICS))]
        return {
            metric: list(interval(drawn[:, position], level))
            for position, metric in enumerate(METRICS)
            if defined[position]
        }

    return {
        "level": level,
        "draws": draws,
        "seed": seed,
        "overall": of(np.ones(len(locales), dtype=bool)),
        "locales": {locale: of(locales == locale) for locale in sorted(set(locales))},
    }


def bootstrap_p_value(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value that the percentile interval inverts: twice the share of draws on the other side of zero.

    Never 0: one draw is added on either side. Two identical systems have p = 1.

    Example:
        >>> bootstrap_p_value(np.array([0.0, 0.0, 0.0]))
        1.0
        >>> bootstrap_p_value(np.array([0.1] * 38 + [-0.1]))  # 2 * (1 + 1) / (39 + 1)
        0.1
    """
    # Sums over queries in another order differ in the last digits: 1e-12 is no difference.
    differences = np.round(differences[~np.isnan(differences)], 12)
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, float(2 * (tail + 1) / (len(differences) + 1)))


def exact_mcnemar(right: NDArray[np.bool_], baseline_right: NDArray[np.bool_]) -> float:
    """p-value of the exact McNemar test on the pairs that only one of two runs classifies right `(rows,)`.

    Example:
        Three pairs only the first gets right, none only the second: 2 * (1/2)^3.

        >>> exact_mcnemar(np.array([True, True, True, False]), np.array([False, False, False, False]))
        0.25
    """
    from statsmodels.stats.contingency_tables import mcnemar

    table = [
        [int(np.sum(right & baseline_right)), int(np.sum(right & ~baseline_right))],
        [int(np.sum(~right & baseline_right)), int(np.sum(~right & ~baseline_right))],
    ]
    return float(mcnemar(table, exact=True).pvalue)


def combine_p_values(p_values: Sequence[float]) -> float:
    """One p-value from the same test on each of several seeds: twice the median, whatever their dependence.

    The seeds share the test pairs, so tests that assume independence (Fisher's, pooling) would overstate. Twice the
    median is valid under any dependence (Rüger 1978). A single seed keeps its own p-value.

    Example:
        >>> combine_p_values([0.03]), combine_p_values([0.01, 0.02, 0.5])
        (0.03, 0.04)
    """
    return float(p_values[0]) if len(p_values) == 1 else min(1.0, 2 * float(np.median(p_values)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm-adjusted p-values of one family, in the order given.

    Example:
        0.01 * 3; then max(that, 0.03 * 2); then max(that, 0.04 * 1).

        >>> [round(p, 4) for p in holm([0.03, 0.01, 0.04])]
        [0.06, 0.03, 0.06]
    """
    # statsmodels' multipletests collects garbage on every call, a fifth of a second in a process that holds torch;
    # the tests check this against it.
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values)[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted.tolist()


def binomial_interval(successes: int, of: int, level: float = 0.95) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a rate of independent rows.

    >>> tuple(round(end, 4) for end in binomial_interval(2, 100))
    (0.0024, 0.0704)
    """
    from scipy.stats import binomtest

    ends = binomtest(successes, of).proportion_ci(level, method="exact")
    return float(ends.low), float(ends.high)
