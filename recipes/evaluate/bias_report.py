"""Show what `recipes.evaluate.bias` found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.evaluate.shares import markdown_table, percent


def flagged(brands: Mapping[str, Any]) -> list[str]:
    """Name the brands that differ from the others after Holm, p below 0.05.

    >>> flagged({"Acme": {"p_holm": 0.01}, "Zed": {"p_holm": 0.2}})
    ['Acme']
    """
    return [brand for brand, entry in brands.items() if entry["p_holm"] < 0.05]


def table(report: Mapping[str, Any]) -> str:
    """Lay out the report in markdown."""
    lines = [f"{report['pairs']:,} pairs. Filtered means {report['filtered']}. × 100; 95 % intervals over queries."]
    swaps = report["swaps"]
    if swaps is None:
        lines.append("- No brand could be swapped: no title holds its brand where the query names none.")
    else:
        lines += [
            f"- {swaps['tried']:,} brand swaps in {swaps['pairs']:,} pairs whose query names no brand: the score "
            f"changes by {percent(swaps['change'], '+')}, in size {percent(swaps['absolute_change'])}; "
            f"filtered or not changes for {percent(swaps['decision_flips'])}.",
            f"- Brands put in: {len(report['put_in'])} with enough queries, "
            f"{', '.join(flagged(report['put_in'])) or 'none'} with a change that is not chance (Holm, 0.05).",
        ]
    if "filtered_wrongly" in report:
        lines.append(f"- Relevant products filtered: {percent(report['filtered_wrongly'])}.")
    party = report["third_party"]
    if party is not None:
        lines.append(
            f"- Relevant accessories filtered: third-party {percent(party['third'])} of {party['third']['rows']:,}, "
            f"of the device's maker {percent(party['first'])} of {party['first']['rows']:,}; "
            f"difference {percent(party['difference'], '+')}."
        )
        if "change" in party:
            lines.append(
                f"- The device's maker in place of the third party: the score changes by "
                f"{percent(party['change'], '+')} ({party['change']['rows']:,} titles)."
            )
    rows = [
        [brand, f"{entry['products']:,}", f"{entry['queries']:,}", _wilson(entry), f"{100 * entry['expected']:.1f}",
         f"{entry['p_holm']:.3f}"]
        for brand, entry in sorted(report["brands"].items(), key=lambda item: -item[1]["value"])
    ]  # fmt: skip
    header = ["brand", "relevant products", "queries", "filtered [Wilson]", "if brands did not matter", "p (Holm)"]
    return "\n".join([*lines, "", *([markdown_table(header, rows), ""] if rows else [])])


def _wilson(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{100 * entry['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draw how often each brand's relevant products are filtered, and what putting in a brand does to the score."""
    from matplotlib.figure import Figure

    panels = [
        ("brands", "relevant products filtered × 100 (Wilson intervals)", report.get("filtered_wrongly")),
        ("put_in", "change of the score × 100 where the brand is put in", {"value": 0.0}),
    ]
    rows = max(1, *(min(len(report[name]), 20) for name, _, _ in panels))
    figure = Figure(figsize=(11, 0.24 * rows + 1.4), layout="constrained")
    for axes, (name, title, line) in zip(figure.subplots(1, 2), panels, strict=True):
        entries = sorted(report[name].items(), key=lambda item: -abs(item[1]["value"]))[:20]
        for place, (_, entry) in enumerate(entries):
            color = "#dc2626" if entry["p_holm"] < 0.05 else "#1d4ed8"
            axes.hlines(place, *(100 * end for end in entry["interval"]), color=color, linewidth=2, alpha=0.5)
            axes.plot(100 * entry["value"], place, "o", color=color, markersize=4)
        if line and line["value"] is not None:
            axes.axvline(100 * line["value"], color="#6b7280", linestyle=":", linewidth=1)
        axes.set_yticks(range(len(entries)), [brand[:28] for brand, _ in entries], fontsize=8)
        axes.set_ylim(max(len(entries), 1) - 0.5, -0.5)
        if not entries:
            axes.text(0.5, 0.5, "no brand has enough", transform=axes.transAxes, ha="center", color="#6b7280")
            axes.set_xticks([])
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("Red: differs from the other brands, p < 0.05 after Holm. At most 20 brands a side.", fontsize=8)
    figure.savefig(path, dpi=150)
