"""Shares of rows with intervals over queries: what the audits (robustness, faithfulness, bias) report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evaluate.significance import bootstrap_p_value, draw_queries, interval

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


FEWEST_QUERIES = 10  # draws of fewer say nothing of how much a share could differ


@dataclass(frozen=True)
class Ratios:
    """Several ratios of sums over the same rows, and what they are in samples of the queries.

    Attributes:
        rows: Sum of each denominator, the number of rows where these are 0 and 1 `(ratios,)`.
        queries: Queries with a row of each denominator `(ratios,)`.
        values: The ratios; NaN where the denominator is 0 `(ratios,)`.
        drawn: The same in every sample of queries `(draws, ratios)`.
    """

    rows: NDArray[np.float64]
    queries: NDArray[np.int64]
    values: NDArray[np.float64]
    drawn: NDArray[np.float64]

    def entry(self, position: int) -> dict[str, Any]:
        """Return value, 95 % interval, rows and queries of one ratio, as a report holds them; None where undefined."""
        return _entry(self.values[position], self.drawn[:, position]) | {
            "rows": int(self.rows[position]),
            "queries": int(self.queries[position]),
        }

    def difference(self, one: int, other: int) -> dict[str, Any]:
        """Return ratio `one` minus ratio `other` with its interval and two-sided p-value, on the same draws."""
        drawn = self.drawn[:, one] - self.drawn[:, other]
        entry = _entry(self.values[one] - self.values[other], drawn)
        defined = drawn[~np.isnan(drawn)]
        p = None if entry["value"] is None else bootstrap_p_value(defined)
        return entry | {"p": p, "queries": int(min(self.queries[one], self.queries[other]))}


def ratios(
    numerators: Sequence[ArrayLike],
    denominators: Sequence[ArrayLike],
    query: ArrayLike,
    draws: int = 10_000,
    seed: int = 0,
) -> Ratios:
    """Divide sums over rows, and do it again for samples of queries drawn with replacement.

    Rows of one query are correlated, so queries are drawn, with all their rows; every ratio sees the same draws.

    Args:
        numerators: What is summed above the line, each `(rows,)`: hits as 0 and 1, or any number.
        denominators: What is summed below it, each `(rows,)`; rows that a ratio is not about have 0 in both.
        query: What tells the queries apart `(rows,)`.
        draws: Bootstrap draws.
        seed: Of the draws.

    Example:
        Two of three rows of query a are hits, none of the one row of query b.

        >>> result = ratios([[1, 1, 0, 0]], [[1, 1, 1, 1]], ["a", "a", "a", "b"], draws=200)
        >>> float(result.values[0]), result.entry(0)["interval"]
        (0.5, [0.0, 0.6666666666666666])
    """
    _, codes = np.unique(np.asarray(query).astype(str), return_inverse=True)
    queries = int(codes.max()) + 1 if len(codes) else 0
    columns = [np.asarray(column, dtype=np.float64) for column in (*numerators, *denominators)]
    sums = np.stack([np.bincount(codes, weights=column, minlength=queries) for column in columns], axis=1)
    count = len(numerators)
    drawn = np.concatenate([times @ sums for times in draw_queries(queries, draws, seed)])
    total = sums.sum(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = np.where(total[count:] > 0, total[:count] / total[count:], np.nan)
        samples = np.where(drawn[:, count:] > 0, drawn[:, :count] / drawn[:, count:], np.nan)
    return Ratios(total[count:], (sums[:, count:] > 0).sum(axis=0), values, samples)


def percent(entry: dict[str, Any], sign: str = "") -> str:
    """Write an entry × 100 with its interval, or the number of queries where these are too few for one.

    >>> percent({"value": 0.125, "interval": [0.1, 0.2], "queries": 40}), percent({"value": None, "interval": None})
    ('12.5 [10.0, 20.0]', '-')
    >>> percent({"value": 0.125, "interval": [0.1, 0.2], "queries": 2})
    '12.5 (2 queries)'
    """
    if entry["value"] is None:
        return "-"
    if entry["queries"] < FEWEST_QUERIES:
        return (
            f"{100 * entry['value']:{sign}.1f} ({entry['queries']} {'query' if entry['queries'] == 1 else 'queries'})"
        )
    low, high = entry["interval"]
    return f"{100 * entry['value']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def _entry(value: float, drawn: NDArray[np.float64]) -> dict[str, Any]:
    if np.isnan(value):
        return {"value": None, "interval": None}
    return {"value": float(value), "interval": list(interval(drawn))}
