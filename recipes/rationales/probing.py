"""Linear probes: how much of a label embeddings carry, cross-validated by query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes.arguments import UserError
from recipes.evaluate.significance import bootstrap, interval, metrics_of_draws, query_statistics

METRICS = ("accuracy", "macro_f1")


def check_folds(labels: np.ndarray, groups: np.ndarray, folds: int, source: str) -> None:
    """Refuse what cannot be cross-validated by query.

    Args:
        labels: Class of each row, `(rows,)`.
        groups: Query of each row, `(rows,)`.
        folds: Parts of the queries.
        source: What the error message calls the rows.

    Raises:
        UserError: One class, fewer queries than folds, or a fold whose training part has one class.
    """
    from sklearn.model_selection import GroupKFold

    queries = len(np.unique(groups))
    if queries < folds:
        raise UserError(f"{source}: {queries} queries cannot be cut into {folds} folds; lower --folds or add pairs.")
    if len(set(labels)) < 2:
        raise UserError(f"{source}: every row is {str(labels[0])!r}; a probe needs two classes. Add pairs of another.")
    for train, _ in GroupKFold(folds).split(labels, groups=groups):
        if len(set(labels[train])) < 2:
            raise UserError(
                f"{source}: {folds} folds by query leave one class, {str(labels[train][0])!r}, to learn from. The "
                "others stand in too few queries: lower --folds or add pairs."
            )


def probe_predictions(
    features: np.ndarray, labels: np.ndarray, groups: np.ndarray, folds: int, strength: float, balanced: bool
) -> np.ndarray:
    """Predict each row by a logistic regression that has seen no row of its query.

    Args:
        features: `(rows, size)`; each is scaled to mean 0 and variance 1 on the training part.
        labels: Class of each row, `(rows,)`.
        groups: Query of each row, `(rows,)`.
        folds: Parts of the queries (`GroupKFold`).
        strength: Inverse of the L2 penalty (scikit-learn's C).
        balanced: Weigh the classes alike, however rare.

    Returns:
        `(rows,)`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    weights = "balanced" if balanced else None
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, class_weight=weights, max_iter=1000))
    return cross_val_predict(probe, features, labels, groups=groups, cv=GroupKFold(folds))


def variance_between(embeddings: np.ndarray, labels: np.ndarray) -> float:
    r"""Return the share of the embeddings' variance that lies between the means of the classes.

    .. math:: \sum_c n_c \|\bar e_c - \bar e\|^2 \,/\, \sum_i \|e_i - \bar e\|^2

    A probe may look at whatever direction tells the label; the squared error of eq. 8 weighs every direction by its
    variance. This is how much of it is about the label.

    Args:
        embeddings: `(rows, size)`.
        labels: Class of each row, `(rows,)`.

    >>> variance_between(np.array([[1.0, 3.0], [1.0, -3.0], [-1.0, 3.0], [-1.0, -3.0]]), np.array(["a", "a", "b", "b"]))
    0.1
    """
    centred = embeddings - embeddings.mean(axis=0)
    between = sum(
        (labels == label).sum() * np.square(centred[labels == label].mean(axis=0)).sum() for label in set(labels)
    )
    return float(between / np.square(centred).sum())


def score(
    labels: np.ndarray, groups: np.ndarray, predictions: Mapping[str, np.ndarray], draws: int, seed: int = 0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Measure predictions of the same rows, with intervals over queries drawn with replacement.

    Args:
        labels: Class of each row, `(rows,)`.
        groups: Query of each row, `(rows,)`.
        predictions: Name -> `(rows,)`. The first is what the others are compared with.
        draws: Bootstrap draws, the same for all, so that differences are paired.
        seed: Of the draws.

    Returns:
        Name -> `accuracy` and `macro_f1` (the mean F1 of the classes that occur), each with `value`, `interval` (95 %),
        and `difference` and `difference_interval` to the first.
    """
    classes = sorted({*labels, *(value for values in predictions.values() for value in values)})
    position = {name: number for number, name in enumerate(classes)}
    queries = np.unique(groups, return_inverse=True)[1]
    gold = np.array([position[label] for label in labels])
    predicted = np.stack([[position[value] for value in values] for values in predictions.values()])
    no_ranking = np.full((len(predicted), queries.max() + 1), np.nan)
    statistics = query_statistics(queries, gold, predicted, no_ranking, len(classes))
    values = metrics_of_draws(np.ones((1, len(statistics.gold))), statistics)[0]  # (metrics, runs)
    drawn = np.concatenate(list(bootstrap(statistics, draws, seed)))  # (draws, metrics, runs)
    return {
        name: {
            metric: {
                "value": float(values[number, run]),
                "interval": list(interval(drawn[:, number, run])),
                "difference": float(values[number, run] - values[number, 0]),
                "difference_interval": list(interval(drawn[:, number, run] - drawn[:, number, 0])),
            }
            for number, metric in enumerate(METRICS)
        }
        for run, name in enumerate(predictions)
    }


def format_probes(results: Mapping[str, Any], label: str) -> str:
    """Lay out the probes for one label, `gold` or `verdict`, as a markdown table."""
    lines = [
        "| target | pairs | majority | query and title | target | target, balanced | target - query and title "
        "| variance |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        if label not in result:
            continue
        scores = result[label]
        cells = [
            name,
            f"{result['pairs']:,}",
            _pair(scores["majority"]),
            _pair(scores["query and title"]),
            _pair(scores["target"], with_interval=True),
            _pair(scores["target, balanced"], with_interval=True),
            " / ".join(_difference(scores["target"][metric]) for metric in METRICS),
            f"{100 * result['variance_between'][label]:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _pair(scores: Mapping[str, Any], with_interval: bool = False) -> str:
    def cell(result: Mapping[str, Any]) -> str:
        low, high = result["interval"]
        return f"{100 * result['value']:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if with_interval else "")

    return " / ".join(cell(scores[metric]) for metric in METRICS)


def _difference(result: Mapping[str, Any]) -> str:
    low, high = result["difference_interval"]
    return f"{100 * result['difference']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def plot_probes(results: Mapping[str, Any], labels: Sequence[str], path: Path) -> None:
    """Draw macro-F1 and accuracy of each target, beside query and title alone and the majority class."""
    from matplotlib.figure import Figure

    names = list(results)
    figure = Figure(figsize=(3.4 * 2 * len(labels) + 1.4, 0.4 * len(names) + 1.5), layout="constrained")
    panels = [(label, metric) for label in labels for metric in METRICS]
    for axes, (label, metric) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        for height, name in enumerate(names):
            if label not in results[name]:
                continue
            scores = {system: result[metric] for system, result in results[name][label].items()}
            low, high = scores["target"]["interval"]
            axes.hlines(height, 100 * low, 100 * high, color="#1d4ed8", linewidth=2, alpha=0.5)
            axes.plot(100 * scores["target"]["value"], height, "o", color="#1d4ed8")
            axes.plot(100 * scores["query and title"]["value"], height, "D", color="#6b7280", markerfacecolor="white")
            axes.plot(100 * scores["majority"]["value"], height, "|", color="#6b7280", markersize=10)
        axes.set_title(f"{label}: {metric.replace('_f1', '-F1')} × 100", fontsize=10)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    figure.supxlabel(
        "Dot: linear probe on the target, 95 % interval over queries. Diamond: query and title. Bar: majority class.",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
