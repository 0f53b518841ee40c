"""Show what `recipes.evaluate.probe` measured: a table, and a picture like Figure 4 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.evaluate.report import format_p_value, format_table

COLORS = {"h_cls": "#9ca3af", "r_qp": "#1d4ed8", "projected": "#60a5fa"}


def format_probe(result: Mapping[str, Any], markdown: bool) -> str:
    """Lay out the means and differences, then F1 by keyword, in at most 100 columns for up to three models."""
    vectors = [(model, vector) for model, found in result["models"].items() for vector in found]
    if not result["keywords"]:
        return "\n".join(["No keyword could be probed.", *result["skipped"]])
    means = [
        [f"{model} {vector}", _mean(result["models"][model][vector])]
        + (_difference(result["differences"][model][vector]) if vector != "h_cls" else ["", "", ""])
        for model, vector in vectors
    ]
    means += [
        [f"{model} r_qp - {next(iter(result['models']))} r_qp", "", *_difference(difference)]
        for model, difference in result["between_models"].items()
    ]
    rows = [
        [keyword, f"{facts['positives']}/{facts['pairs']}", f"{facts['always']:.3f}"]
        + [f"{_average(result['models'][model][vector]['keywords'][keyword]):.3f}" for model, vector in vectors]
        for keyword, facts in result["keywords"].items()
    ]
    header = ["keyword", "has it", "always", *(f"{model} {vector}" for model, vector in vectors)]
    pairs = result["pairs"]
    lines = [
        f"{len(rows)} keywords; probes fitted on {pairs['fit']:,} pairs and scored on {pairs['scored']:,} pairs of "
        f"{result['queries_scored']:,} queries"
        + (", each run on those that it was not fitted on" if result["same_split"] else ""),
        "",
        format_table(["mean", "F1 [95 % interval]", "minus h_cls", "p", "t-test over keywords"], means, markdown),
        "",
        format_table(header, rows, markdown),
        "",
        *(f"Skipped: {text}." for text in result["skipped"]),
    ]  # fmt: skip
    return "\n".join(lines)


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _mean(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['mean_f1']:.3f} [{low:.3f}, {high:.3f}]"


def _difference(found: Mapping[str, Any]) -> list[str]:
    low, high = found["interval"]
    return [
        f"{found['difference']:+.3f} [{low:.3f}, {high:.3f}]",
        format_p_value(found["p"]),
        format_p_value(found["t_test_over_keywords_p"]),
    ]


def plot_probe(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel a model: F1 by keyword, a bar a vector, sd over runs; a tick for saying yes to every pair."""
    import numpy as np
    from matplotlib.figure import Figure

    keywords, models = list(result["keywords"]), result["models"]
    figure = Figure(figsize=(max(6.0, 0.62 * len(keywords) + 1.5), 2.7 * len(models) + 0.8), layout="constrained")
    for axes, (model, vectors) in zip(
        figure.subplots(len(models), 1, sharex=True, sharey=True, squeeze=False)[:, 0], models.items(), strict=True
    ):
        width = 0.8 / len(vectors)
        for number, (vector, found) in enumerate(vectors.items()):
            values = np.array([found["keywords"][keyword] for keyword in keywords]).reshape(len(keywords), -1)
            places = np.arange(len(keywords)) + (number - (len(vectors) - 1) / 2) * width
            label = f"{vector} {found['mean_f1']:.3f}" if keywords else vector
            axes.bar(places, values.mean(axis=1), width, yerr=values.std(axis=1), color=COLORS[vector], label=label,
                     error_kw={"elinewidth": 0.8})  # fmt: skip
        always = [result["keywords"][keyword]["always"] for keyword in keywords]
        axes.hlines(always, np.arange(len(keywords)) - 0.45, np.arange(len(keywords)) + 0.45, color="black",
                    linewidth=1, label="yes to every pair")  # fmt: skip
        axes.set_title(model, fontsize=10)
        axes.set_ylabel("F1")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    axes.set_xticks(range(len(keywords)), keywords, rotation=35, ha="right")
    figure.savefig(path, dpi=150)
