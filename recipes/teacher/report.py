"""Show what `recipes.teacher.evaluate` measured: a markdown table, and a chart by class and perspective."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLORS = {
    "user_intent": "#1d4ed8",
    "structured_analysis": "#059669",
    "business_rule": "#d97706",
    "unified": "#7c3aed",
}
OTHER_COLOR = "#6b7280"


def table(metrics: Mapping[str, Any]) -> str:
    """Lay out all slices in markdown."""
    slices = {"overall": metrics["overall"], **metrics["locales"]}
    return "\n".join(_slice(name, values) for name, values in slices.items())


def _slice(name: str, values: Mapping[str, Any]) -> str:
    rows = []
    for perspective, result in values["perspectives"].items():
        rows.append((perspective, result["accuracy"], result["macro_f1"], f"{100 * result['unparsed']:.1f}"))
        rows += [
            (f"{perspective}, pass@{k}", passed, None, "")
            for k, passed in result["pass_at_k"].items()
            if k in ("3", "5") and result["samples"] >= int(k)
        ]
        if result["vote"]:
            label = f"{perspective}, vote of {result['samples']}"
            rows.append((label, result["vote"]["accuracy"], result["vote"]["macro_f1"], ""))
    together = values["together"]
    if together:
        vote = together["vote"]
        rows.append(("vote of the perspectives", vote["accuracy"], vote["macro_f1"], ""))
        rows.append(("any perspective right (oracle)", together["oracle"], None, ""))
    lines = [
        f"## {name} ({values['pairs']:,} pairs, {values['queries']:,} queries)",
        "",
        "All × 100, 95 % interval over queries.",
        "",
        "| | accuracy | macro-F1 | unparsed |",
        "|---|---|---|---|",
        *(f"| {label} | {_cell(accuracy)} | {_cell(f1)} | {unparsed} |" for label, accuracy, f1, unparsed in rows),
    ]
    majority, two = values["constant_answers"]
    lines.append(f"| always {majority['labels'][0]} | {100 * majority['any_right']:.1f} | | |")
    lines.append(f"| oracle of two constants, {' and '.join(two['labels'])} | {100 * two['any_right']:.1f} | | |")
    lines.append("")
    if together:
        lines += _together(together)
    lines += [f"- not computed: {what}: {why}" for what, why in values["undefined"].items()]
    return "\n".join([*lines, ""])


def _together(together: Mapping[str, Any]) -> list[str]:
    lines = [f"- {change['of']} - {change['to']}: {_cell(change, sign='+')}" for change in together["differences"]]
    for names, result in together["agreement"].items():
        equal = "-" if result["equal"] is None else f"{100 * result['equal']:.1f}"
        kappa = "-" if result["kappa"] is None else f"{result['kappa']:.2f}"
        lines.append(f"- {names}: equal on {equal} % of {result['pairs']:,} pairs, kappa {kappa}")
    all_agree = together["all_agree"]
    right = "" if all_agree["accuracy"] is None else f", and right on {100 * all_agree['accuracy']:.1f} % of these"
    return [
        *lines,
        f"- all perspectives agree on {100 * all_agree['share']:.1f} % of pairs{right}",
        f"- at least one perspective is wrong on {100 * together['conflict']:.1f} % of pairs (eq. 4)",
        f"- they name {together['labels_named']:.2f} different labels a pair; their vote is tied on "
        f"{100 * together['vote']['ties']:.1f} %",
    ]


def _cell(result: Mapping[str, Any] | None, sign: str = "") -> str:
    if result is None:
        return ""
    low, high = result["interval"]
    return f"{100 * result['value']:{sign}.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def plot(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw the overall slice: left the pilot, right accuracy by gold class and perspective (the paper's Figure 3)."""
    from matplotlib.figure import Figure

    values = metrics["overall"]
    perspectives = values["perspectives"]
    classes = [name for name in metrics["labels"] if any(p["per_class"][name] for p in perspectives.values())]
    pilot = [(name, result["accuracy"], COLORS.get(name, OTHER_COLOR)) for name, result in perspectives.items()]
    for name, result in perspectives.items():
        if "3" in result["pass_at_k"]:
            pilot.append((f"{name}, pass@3", result["pass_at_k"]["3"], COLORS.get(name, OTHER_COLOR)))
    if values["together"]:
        pilot.append(("vote of the perspectives", values["together"]["vote"]["accuracy"], OTHER_COLOR))
        pilot.append(("any perspective right", values["together"]["oracle"], "black"))

    height = max(0.36 * len(pilot), 3.0)
    figure = Figure(figsize=(6.4 + 1.5 * len(classes), height + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1.1 * len(classes)])
    for row, (_, result, color) in enumerate(pilot):
        _point(left, result, row, color, horizontal=True)
    left.set_yticks(range(len(pilot)), [name.replace("_", " ") for name, _, _ in pilot])
    left.set_ylim(len(pilot) - 0.5, -0.5)
    for constant in values["constant_answers"]:
        left.axvline(100 * constant["any_right"], color=OTHER_COLOR, linestyle=":", linewidth=1, zorder=0)
    left.set_title("accuracy × 100 (dotted: always the 1 or 2 commonest labels)", fontsize=10)
    for order, (name, result) in enumerate(perspectives.items()):
        color = COLORS.get(name, OTHER_COLOR)
        offset = 0.18 * (order - (len(perspectives) - 1) / 2)
        for column, label in enumerate(classes):
            _point(right, result["per_class"][label], column + offset, color, horizontal=False)
        right.plot([], [], "o", color=color, label=name.replace("_", " "))
    first = next(iter(perspectives.values()))["per_class"]
    ticks = [f"{name}\n{first[name]['pairs']:,} pairs" for name in classes]
    right.set_xticks(range(len(classes)), ticks, fontsize=9)
    right.set_ylim(0, 100)
    right.set_title("accuracy × 100 by gold class", fontsize=10)
    right.legend(fontsize=8, frameon=False)
    for axes, axis in ((left, "x"), (right, "y")):
        axes.grid(axis=axis, color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"Lines: 95 % intervals over {values['queries']:,} queries.", fontsize=8)
    figure.savefig(path, dpi=150)


def _point(axes: Any, result: Mapping[str, Any], place: float, color: str, horizontal: bool) -> None:
    low, high = (100 * end for end in result["interval"])
    line = axes.hlines if horizontal else axes.vlines
    line(place, low, high, color=color, linewidth=2, alpha=0.55)
    value = 100 * result["value"]
    axes.plot(*((value, place) if horizontal else (place, value)), "o", color=color)
