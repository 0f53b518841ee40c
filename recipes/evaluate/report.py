"""Show results: tables for the terminal and for markdown, the confusion matrix and the comparison as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


TITLES = {"accuracy": "accuracy", "macro_f1": "macro-F1", "ndcg": "nDCG"}


def format_slice(name: str, comparison: Mapping[str, Any], markdown: bool) -> str:
    """Lay out one slice of what `compare` returns: the systems, then their differences to the baseline.

    The terminal's table fits 100 columns: long names of systems are cut there, not in markdown.
    """
    values = comparison["slices"][name]
    metrics = [metric for metric in TITLES if metric in values["systems"][comparison["baseline"]]["metrics"]]
    systems = [
        [system, str(len(result["seeds"])), *(mean_cell(result["metrics"][metric]) for metric in metrics)]
        for system, result in values["systems"].items()
    ]
    differences = [
        [
            system,
            *(difference_cell(result[metric]) for metric in metrics),
            format_p_value(result["mcnemar"]["p_holm"]) if "mcnemar" in result else "-",
        ]
        for system, result in values["differences"].items()
    ]
    titles = [TITLES[metric] for metric in metrics]
    counts = f"{values['pairs']:,} pairs, {values['queries']:,} queries"
    if "ndcg" in metrics:
        counts += f"; nDCG over {values['ndcg_queries']:,}, {values['ndcg_contested_queries']:,} with different gains"
    return "\n".join(
        [
            f"## {name} ({counts})",
            "",
            "All × 100: mean ± sd over seeds, 95 % interval by query bootstrap.",
            "",
            format_table(["system", "seeds", *titles], systems, markdown),
            "",
            f"Difference to {comparison['baseline']}, 95 % interval, p after Holm over {len(differences)} "
            f"{'system' if len(differences) == 1 else 'systems'}; McNemar: p on accuracy.",
            "",
            format_table(["system", *titles, "McNemar"], differences, markdown),
            "",
        ]
    )


def mean_cell(result: Mapping[str, Any]) -> str:
    """Return `mean ±sd [interval]`, × 100, of a metric of a system."""
    sd = "" if result["sd"] is None else f" ±{100 * result['sd']:.1f}"
    low, high = result["interval"]
    return f"{100 * result['mean']:.1f}{sd} [{100 * low:.1f}, {100 * high:.1f}]"


def difference_cell(result: Mapping[str, Any]) -> str:
    """Return `difference [interval] p`, × 100 but for the p-value after Holm."""
    low, high = result["interval"]
    return f"{100 * result['difference']:+.1f} [{100 * low:.1f}, {100 * high:.1f}] {format_p_value(result['p_holm'])}"


def format_p_value(value: float) -> str:
    """Return three digits, or that it is smaller."""
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool, columns: int = 100) -> str:
    """Lay out rows of cells; not as markdown, the first column is cut so that the table fits `columns`."""
    widths = [max(len(row[position]) for row in (header, *rows)) for position in range(len(header))]
    if not markdown:
        widths[0] = min(widths[0], max(8, columns - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines = [
        [cell if len(cell) <= width else f"{cell[: width - 1]}…" for cell, width in zip(row, widths, strict=True)]
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def plot_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Draw the overall slice: one panel a metric, one line a system with its mean, interval and seeds."""
    from matplotlib.figure import Figure

    values = comparison["slices"]["overall"]
    baseline = comparison["baseline"]
    systems = list(values["systems"])
    metrics = [metric for metric in TITLES if metric in values["systems"][baseline]["metrics"]]
    figure = Figure(figsize=(3.2 * len(metrics) + 1.4, 0.42 * len(systems) + 1.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0], metrics, strict=True):
        for height, system in enumerate(systems):
            result = values["systems"][system]["metrics"][metric]
            differs = system != baseline and values["differences"][system][metric]["p_holm"] < 0.05
            color = "#6b7280" if system == baseline else "#1d4ed8"
            low, high = (100 * end for end in result["interval"])
            axes.hlines(height, low, high, color=color, linewidth=2, alpha=0.55)
            if len(result["by_seed"]) > 1:
                seeds = [100 * value for value in result["by_seed"]]
                axes.plot(seeds, [height + 0.22] * len(seeds), ".", color=color, markersize=4, alpha=0.6)
            axes.plot(100 * result["mean"], height, "o", color=color, markerfacecolor=color if differs else "white")
        axes.axvline(
            100 * values["systems"][baseline]["metrics"][metric]["mean"], color="#6b7280", linestyle=":", linewidth=1
        )
        axes.set_title(f"{TITLES[metric]} × 100", fontsize=10)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_yticks(range(len(systems)), systems)
    axes.set_ylim(len(systems) - 0.4, -0.6)
    figure.supxlabel(
        f"Line: 95 % interval over {values['queries']:,} queries. Small dots: seeds, where there are several. "
        f"Filled: differs from {baseline}, p < 0.05 after Holm.",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
