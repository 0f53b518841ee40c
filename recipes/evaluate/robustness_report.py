"""Show what `recipes.evaluate.robustness` measured: a table, and a picture of flips and of who was fooled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.evaluate.shares import FEWEST_QUERIES, markdown_table, percent

PALETTE = ("#6b7280", "#1d4ed8", "#059669", "#d97706", "#7c3aed", "#dc2626")


def table(report: Mapping[str, Any]) -> str:
    """Lay out all systems in markdown, kinds that leave the label as it is apart from those that change it."""
    systems = report["systems"]
    preserving = [
        [kind, f"{values['flip']['rows']:,}", name, percent(values["flip"]), percent(values["drop"], sign="+")]
        for kind in next(iter(systems.values()))["preserving"]
        for name, values in ((name, system["preserving"][kind]) for name, system in systems.items())
    ]
    changing = [
        [kind, f"{values['applied']:,}", name, f"{values['fooled']['rows']:,}", percent(values["fooled"]),
         percent(values["after"])]
        for kind in next(iter(systems.values()))["changing"]
        for name, values in ((name, system["changing"][kind]) for name, system in systems.items())
    ]  # fmt: skip
    accuracies = ", ".join(f"{name} {percent(system['accuracy'])}" for name, system in systems.items())
    lines = [
        f"{report['pairs']:,} pairs of {report['queries']:,} queries; × 100, 95 % interval over queries. "
        f"Accuracy as they are: {accuracies}.",
        "",
    ]
    if preserving:
        lines += [
            "The label stays: how many predictions flip, and the accuracy lost on these pairs.",
            "",
            markdown_table(["kind", "pairs", "system", "flips", "drop"], preserving),
            "",
        ]
    if changing:
        lines += [
            "The label changes: of the pairs rightly taken as relevant before, how many still are; accuracy on the new "
            "label where it is known.",
            "",
            markdown_table(["kind", "pairs", "system", "relevant before", "fooled", "accuracy"], changing),
            "",
        ]
    empty = {kind: why["empties a text"] for kind, why in report["skipped"].items() if why["empties a text"]}
    if empty:
        lines += [f"Left out because a text would be empty: {empty}.", ""]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw flips on the left, fooled predictions on the right: one line a kind and system, with its interval."""
    from matplotlib.figure import Figure

    systems = report["systems"]
    panels = [("preserving", "flip", "label stays: flips × 100"), ("changing", "fooled", "label changes: fooled × 100")]
    panels = [panel for panel in panels if next(iter(systems.values()))[panel[0]]]
    rows = max(len(next(iter(systems.values()))[group]) for group, _, _ in panels)
    height = rows * (0.16 + 0.14 * len(systems)) + 1.4
    figure = Figure(figsize=(4.6 * len(panels), height), layout="constrained")
    for axes, (group, measure, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        kinds = list(next(iter(systems.values()))[group])
        for order, (name, system) in enumerate(systems.items()):
            color = PALETTE[order % len(PALETTE)]
            offset = 0.7 * ((order + 0.5) / len(systems) - 0.5)
            for place, kind in enumerate(kinds):
                entry = system[group][kind][measure]
                if entry["value"] is not None and entry["queries"] >= FEWEST_QUERIES:
                    low, high = (100 * end for end in entry["interval"])
                    axes.hlines(place + offset, low, high, color=color, linewidth=2, alpha=0.5)
                    axes.plot(100 * entry["value"], place + offset, "o", color=color, markersize=4)
            axes.plot([], [], "o", color=color, label=name)
        axes.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
        axes.set_ylim(len(kinds) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel(
        f"Lines: 95 % intervals over queries, for kinds of {FEWEST_QUERIES} or more.",
        fontsize=8,
    )
    figure.savefig(path, dpi=150)
