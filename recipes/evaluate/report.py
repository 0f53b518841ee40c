"""Show the metrics of one run: a table for the terminal and the confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLUMNS = {
    "rows": "pairs",
    "queries": "queries",
    "accuracy": "acc",
    "macro_f1": "mF1",
    "ndcg": "nDCG",
    "ndcg_contested": "nDCG*",
    "map": "MAP",
    "mrr": "MRR",
    "roc_auc": "AUC",
    "ece": "ECE",
}


def format_metrics(metrics: Mapping[str, Any]) -> str:
    """Lay out what `evaluate_predictions` returns in 80 columns: a line a slice, then a line a class."""
    import pandas as pd

    slices = {"overall": metrics["overall"], **metrics["locales"]}
    table = {name: {header: _cell(values[key]) for key, header in COLUMNS.items()} for name, values in slices.items()}
    classes = {
        name: {header: _cell(value) for header, value in values.items()}
        for name, values in metrics["overall"]["per_class"].items()
    }
    return (
        f"{pd.DataFrame(table).T.to_string()}\n"
        f"nDCG*: the {metrics['overall']['ndcg_contested_queries']} queries with products of different gains.\n\n"
        f"{pd.DataFrame(classes).T.to_string()}"
    )


def _cell(value: int | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def plot_confusion(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw the overall confusion matrix: colour is the share of the gold class, the text also gives the pairs."""
    import numpy as np
    from matplotlib.figure import Figure

    counts = np.array(metrics["overall"]["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    labels = metrics["labels"]
    size = 1.6 + 0.85 * len(labels)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*counts.shape):
        axes.text(
            column,
            row,
            f"{shares[row, column]:.0%}\n{counts[row, column]:,}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if shares[row, column] > 0.55 else "black",
        )
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(
        range(len(labels)), [f"{label} ({total:,})" for label, total in zip(labels, counts.sum(axis=1), strict=True)]
    )
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold (pairs)")
    overall = metrics["overall"]
    axes.set_title(
        f"accuracy {overall['accuracy']:.1%} · macro-F1 {overall['macro_f1']:.1%} · {overall['rows']:,} pairs",
        fontsize=10,
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.savefig(path, dpi=150)
