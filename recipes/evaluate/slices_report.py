"""Show what `recipes.evaluate.slices` found: a line a slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.evaluate.shares import markdown_table

PALETTE = ("#6b7280", "#1d4ed8", "#059669", "#d97706", "#7c3aed", "#dc2626")


def table(report: Mapping[str, Any]) -> str:
    """Lay out accuracy and macro-F1 of every system and slice, and the difference of accuracy to the baseline."""
    baseline = report["baseline"]
    systems = list(report["slices"]["all"]["all"]["systems"])
    others = [name for name in systems if name != baseline]
    header = ["slice", "pairs", "queries", *systems, *(f"{name} - {baseline}" for name in others)]
    lines = []
    for way, parts in report["slices"].items():
        for name, values in parts.items():
            cells = [
                f"{_cell(values['systems'][system]['metrics']['accuracy'])} / "
                f"{100 * values['systems'][system]['metrics']['macro_f1']['mean']:.1f}"
                for system in systems
            ]
            cells += [_difference(values["differences"][system]["accuracy"]) for system in others]
            title = name if way == "all" else f"{way}: {name}"
            lines.append([title, f"{values['pairs']:,}", f"{values['queries']:,}", *cells])
    left_out = ", ".join(f"{count} of {way}" for way, count in report["left_out"].items())
    return "\n".join(
        [
            "Accuracy with its 95 % interval over queries / macro-F1, × 100; differences are of accuracy.",
            "",
            markdown_table(header, lines),
            "",
            *([f"Left out, with too few queries: {left_out}.", ""] if left_out else []),
        ]
    )


def _cell(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval"]
    return f"{100 * metric['mean']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _difference(metric: Mapping[str, Any]) -> str:
    low, high = metric["interval"]
    return f"{100 * metric['difference']:+.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw accuracy by slice, a colour a system."""
    from matplotlib.figure import Figure

    parts = [
        (name if way == "all" else f"{way}: {name}", values)
        for way, group in report["slices"].items()
        for name, values in group.items()
    ]
    systems = list(parts[0][1]["systems"])
    figure = Figure(figsize=(7.5, len(parts) * (0.2 + 0.08 * len(systems)) + 1.2), layout="constrained")
    axes = figure.subplots()
    for order, system in enumerate(systems):
        color = PALETTE[order % len(PALETTE)]
        for row, (_, values) in enumerate(parts):
            metric = values["systems"][system]["metrics"]["accuracy"]
            place = row + 0.6 * ((order + 0.5) / len(systems) - 0.5)
            axes.hlines(place, *(100 * end for end in metric["interval"]), color=color, linewidth=2, alpha=0.5)
            axes.plot(100 * metric["mean"], place, "o", color=color, markersize=4)
        axes.plot([], [], "o", color=color, label=system)
    axes.set_yticks(range(len(parts)), [f"{name} ({values['queries']:,})" for name, values in parts], fontsize=8)
    axes.set_ylim(len(parts) - 0.5, -0.5)
    axes.set_title("accuracy × 100 (queries); lines: 95 % intervals over queries", fontsize=10)
    axes.grid(axis="x", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
