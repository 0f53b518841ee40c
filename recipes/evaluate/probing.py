"""Fit the probes of `recipes.evaluate.probe` and measure them: one logistic regression a keyword, vector and run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.evaluate.significance import bootstrap_p_value, draw_queries, holm, interval

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Counts = dict[tuple[str, str], NDArray[np.float64]]

FIT_SHARE = 0.8


def fit_and_count(
    features: Mapping[str, Mapping[str, NDArray[np.float32]]],
    present: NDArray[np.bool_],
    lacking: NDArray[np.bool_],
    query: NDArray[np.int64],
    is_fit: NDArray[np.bool_],
    is_scored: NDArray[np.bool_],
    runs: int,
    class_weight: str,
    c: float,
    seed: int,
) -> tuple[Counts, list[tuple[int, str]]]:
    """Fit every probe in every run and count its hits by query.

    Args:
        features: Model -> vector -> `(pairs, size)`.
        present: Whether the rationale has the keyword `(keywords, pairs)`.
        lacking: Whether query and title lack it, so that the pair counts for this keyword `(keywords, pairs)`.
        query: Index of each pair's query `(pairs,)`.
        is_fit: Pairs to fit on `(pairs,)`.
        is_scored: Pairs to score on `(pairs,)`; of those that are both, a run scores what it is not fitted on.
        runs: Each draws `FIT_SHARE` of the queries to fit on.
        class_weight: `balanced` or `none`.
        c: Inverse strength of the L2 penalty.
        seed: Of the draws.

    Returns:
        (model, vector) -> true positives, and predicted plus actual positives, of each scored query
        `(2, keywords, runs, queries)`; and (keyword, reason) of the keywords that had one class alone in some run,
        whose counts are all zero.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from tqdm import tqdm

    generator = np.random.default_rng(seed)
    fit_queries, scored_queries = np.unique(query[is_fit]), np.unique(query[is_scored])
    row_of_query = np.searchsorted(scored_queries, query)  # of scored pairs only
    chosen = [
        np.isin(query, generator.choice(fit_queries, max(1, round(FIT_SHARE * len(fit_queries))), replace=False))
        for _ in range(runs)
    ]
    fits = [is_fit & drawn for drawn in chosen]
    scores = [is_scored & ~fit for fit in fits]
    skipped = []
    for keyword in range(len(present)):
        for pairs, what in ((fits, "fit"), (scores, "score")):
            numbers = [(int((present[keyword] & lacking[keyword] & rows).sum()),
                        int((lacking[keyword] & rows).sum())) for rows in pairs]  # fmt: skip
            if any(positives in (0, total) for positives, total in numbers):
                skipped.append((keyword, f"one class alone among the pairs to {what} on, in one run or more"))
                break
    usable = [keyword for keyword in range(len(present)) if keyword not in {index for index, _ in skipped}]
    counts: Counts = {}
    total = sum(map(len, features.values())) * runs * len(usable)
    with tqdm(total=total, unit="probe", desc="fit") as bar:
        for model, vectors in features.items():
            for vector, values in vectors.items():
                table = np.zeros((2, len(present), runs, len(scored_queries)))
                for number, (fit, scored) in enumerate(zip(fits, scores, strict=True)):
                    scaled = StandardScaler().fit(values[fit]).transform(values)
                    for keyword in usable:
                        rows = fit & lacking[keyword]
                        classifier = LogisticRegression(
                            solver="newton-cholesky",  # far fewer steps than lbfgs where pairs outnumber dimensions
                            C=c,
                            class_weight=None if class_weight == "none" else class_weight,
                        ).fit(scaled[rows], present[keyword, rows])
                        rows = scored & lacking[keyword]
                        predicted, gold = classifier.predict(scaled[rows]), present[keyword, rows]
                        for part, hits in enumerate((predicted & gold, predicted.astype(int) + gold)):
                            table[part, keyword, number] = np.bincount(
                                row_of_query[rows], weights=hits, minlength=len(scored_queries)
                            )
                        bar.update()
                counts[model, vector] = table
    return counts, skipped


def summarise(
    counts: Counts,
    keywords: Sequence[str],
    positive: NDArray[np.bool_],
    eligible: NDArray[np.bool_],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Turn counts by query into F1, tests and intervals.

    Args:
        counts: What `fit_and_count` returns.
        keywords: The keywords, in the order of the counts.
        positive: Scored pairs whose rationale has the keyword, `(keywords, pairs)`.
        eligible: Scored pairs whose query and title lack it, `(keywords, pairs)`.
        draws: Bootstrap draws of the scored queries.
        seed: Of the draws.

    Returns:
        `keywords` (name -> positives, pairs, `always`), `models` (name -> vector -> `mean_f1`, `interval`, and
        `keywords`: F1 of every run), `differences` (name -> other vector minus h_cls: difference, interval, p, the
        t-test over keywords, and of every keyword the t-test over runs, with Holm), `between_models` (name -> r_qp of
        the model minus that of the first).
    """
    used = [index for index in range(len(keywords)) if any(table[1, index].any() for table in counts.values())]
    f1 = {key: _f1(table.sum(axis=3)) for key, table in counts.items()}  # (keywords, runs)
    drawn: dict[tuple[str, str], list[NDArray[np.float64]]] = {key: [] for key in counts}
    queries = next(iter(counts.values())).shape[3]
    for times_taken in draw_queries(queries, draws, seed):
        for key, table in counts.items():
            # Run by run: 10 runs at once would be 10 times the memory.
            means = [
                _f1(table[:, used, number] @ times_taken.T).mean(axis=0)  # (draws,)
                for number in range(table.shape[2])
            ]
            drawn[key].append(np.mean(means, axis=0))
    samples = {key: np.concatenate(parts) for key, parts in drawn.items()}

    def difference(one: tuple[str, str], other: tuple[str, str]) -> dict[str, Any]:
        sample = samples[one] - samples[other]
        by_keyword = [float(f1[one][index].mean() - f1[other][index].mean()) for index in used]
        over_runs = [_paired_t_test(f1[one][index], f1[other][index]) for index in used]
        return {
            "difference": float(np.mean(by_keyword)),
            "interval": interval(sample),
            "p": bootstrap_p_value(sample),
            "t_test_over_keywords_p": _paired_t_test(f1[one][used].mean(axis=1), f1[other][used].mean(axis=1)),
            "keywords": {
                keywords[index]: {"difference": value, "t_test_over_runs_p": p, "t_test_over_runs_p_holm": adjusted}
                for index, value, p, adjusted in zip(used, by_keyword, over_runs, holm(over_runs), strict=True)
            },
        }

    models = list(dict.fromkeys(model for model, _ in counts))
    share = positive.sum(axis=1) / np.maximum(eligible.sum(axis=1), 1)
    return {
        "keywords": {
            keywords[index]: {
                "positives": int(positive[index].sum()),
                "pairs": int(eligible[index].sum()),
                "always": float(2 * share[index] / (1 + share[index])),
            }
            for index in used
        },
        "models": {
            model: {
                vector: {
                    "mean_f1": float(f1[model, vector][used].mean()) if used else None,
                    "interval": interval(samples[model, vector]) if used else None,
                    "keywords": {keywords[index]: f1[model, vector][index].tolist() for index in used},
                }
                for name, vector in counts
                if name == model
            }
            for model in models
        },
        "differences": {
            model: {
                vector: difference((model, vector), (model, "h_cls"))
                for name, vector in counts
                if name == model and vector != "h_cls"
            }
            for model in models
            if used
        },
        "between_models": {
            model: difference((model, "r_qp"), (models[0], "r_qp")) for model in models[1:] if used
        },
    }  # fmt: skip


def _f1(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """F1 of (true positives, predicted plus actual positives) `(2, ...)`; 0 where there are none of either."""
    return 2 * counts[0] / np.maximum(counts[1], 1)


def _paired_t_test(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """p-value of the paired t-test; 1 where nothing differs or there is but one pair of values."""
    from scipy.stats import ttest_rel

    return 1.0 if len(one) < 2 or (one == other).all() else float(ttest_rel(one, other).pvalue)
