"""What `recipes.evaluate.faithfulness` measures over all completions, and how it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.evaluate.shares import markdown_table, percent, ratios
from recipes.rationales.claims import KINDS
from recipes.teacher.report import COLORS, OTHER_COLOR

if TYPE_CHECKING:
    import pandas as pd

    from recipes.schemas import LabelSchema

# Measure of a completion -> column of the judged table (1 or 0), or how it is made.
SHARES = {
    "makes something up": "hallucinates",
    "names a verdict": "names_verdict",
    "names another verdict than it concludes with": "other_verdict",
    "verdict is right": "right",
    "near-duplicate": "duplicate",
    "faithful": "faithful",
}


def measure(judged: pd.DataFrame, schema: LabelSchema, draws: int, seed: int) -> dict[str, Any]:
    """Measure the table of `recipes.evaluate.faithfulness.judge`, each perspective and all together.

    Returns:
        `groups`: perspective or `all` -> `shares` (see `SHARES`), `claims` (kind -> how many of the claims stand
        nowhere), `words`, `words_right_minus_wrong`, `verdicts` (class -> share of verdicts minus share of gold);
        `together`: how often verdicts of a pair's perspectives differ, and are the best and the worst class at once.
    """
    query = judged.groupby(["locale", "query"], sort=False).ngroup()
    frame = judged.assign(
        _query=query,
        hallucinates=(judged["invented"] != "").astype(int),
        names_verdict=(judged["named"] != "").astype(int),
        duplicate=judged["duplicate_of"].notna().astype(int),
    )
    names = ["all", *sorted(frame["perspective"].unique())]
    groups = {}
    for name in names:
        part = frame if name == "all" else frame[frame["perspective"] == name]
        groups[name] = _group(part, schema, draws, seed)
    return {"rationales": len(judged), "groups": groups, "together": _together(frame, schema, draws, seed)}


def _group(part: pd.DataFrame, schema: LabelSchema, draws: int, seed: int) -> dict[str, Any]:
    import numpy as np

    one = np.ones(len(part))
    right, words = part["right"].to_numpy(), part["words"].to_numpy()
    labels = schema.names
    numerators = [
        *(part[column] for column in SHARES.values()),
        *(part[f"invented_{kind}"] for kind in KINDS),
        words,
        words * right,
        words * (1 - right),
        *((part["predicted_label"] == label).astype(int) for label in labels),
        *((part["label"] == label).astype(int) for label in labels),
    ]
    denominators = [
        *[one] * len(SHARES),
        *(part[f"claims_{kind}"] for kind in KINDS),
        one,
        right,
        1 - right,
        *[one] * (2 * len(labels)),
    ]
    found = ratios(numerators, denominators, part["_query"], draws, seed)
    at, kinds = len(SHARES), len(KINDS)
    after = at + kinds + 3
    return {
        "shares": {name: found.entry(place) for place, name in enumerate(SHARES)},
        "claims": {kind: found.entry(at + place) for place, kind in enumerate(KINDS)},
        "words": found.entry(at + kinds),
        "words_right_minus_wrong": found.difference(at + kinds + 1, at + kinds + 2),
        "verdicts": {
            label: found.difference(after + place, after + len(labels) + place) for place, label in enumerate(labels)
        },
    }


def _together(frame: pd.DataFrame, schema: LabelSchema, draws: int, seed: int) -> dict[str, Any] | None:
    """Compare the first samples of each pair's perspectives; None where no pair has two that could be read."""
    import numpy as np

    first = frame.sort_values("sample_index").drop_duplicates(["pair_id", "perspective"])
    first = first[first["predicted_label"].notna()]
    gains = first["predicted_label"].map(dict(zip(schema.names, schema.gains, strict=True)))
    by_pair = first.assign(gain=gains).groupby("pair_id")
    table = by_pair.agg(
        query=("_query", "first"), many=("perspective", "nunique"), verdicts=("predicted_label", "nunique"),
        low=("gain", "min"), high=("gain", "max"),
    )  # fmt: skip
    table = table[table["many"] > 1]
    if table.empty:
        return None
    extremes = (table["low"] == min(schema.gains)) & (table["high"] == max(schema.gains))
    found = ratios([table["verdicts"] > 1, extremes], [np.ones(len(table))] * 2, table["query"], draws, seed)
    return {"verdicts differ": found.entry(0), "best and worst class at once": found.entry(1)}


def table(report: Mapping[str, Any]) -> str:
    """Lay out the report in markdown."""
    groups = report["groups"]
    kinds = [kind for kind in KINDS if groups["all"]["claims"][kind]["value"] is not None]
    verdicts = groups["all"]["verdicts"]
    lines = [
        f"{report['rationales']:,} rationales of {groups['all']['shares']['faithful']['queries']:,} queries; shares "
        "× 100, 95 % interval over queries.",
        "",
        markdown_table(
            ["", *groups], [[name, *(percent(group["shares"][name]) for group in groups.values())] for name in SHARES]
        ),
        "",
        "Of the claims of a kind, those that stand in neither query nor title:",
        "",
        markdown_table(
            ["claims", "number of them", *groups],
            [
                [kind, f"{groups['all']['claims'][kind]['rows']:,}",
                 *(percent(group["claims"][kind]) for group in groups.values())]
                for kind in kinds
            ],
        ),
        "",
        "Verdicts of a class minus gold labels of it (label bias), and length:",
        "",
        markdown_table(
            ["", *groups],
            [
                *([label, *(percent(g["verdicts"][label], sign="+") for g in groups.values())] for label in verdicts),
                ["words", *(_plain(group["words"]) for group in groups.values())],
                ["words, right minus wrong", *(_plain(g["words_right_minus_wrong"], "+") for g in groups.values())],
            ],
        ),
        "",
    ]  # fmt: skip
    if report["together"]:
        lines += [f"- {name}: {percent(entry)} of pairs" for name, entry in report["together"].items()]
    return "\n".join([*lines, ""])


def _plain(entry: Mapping[str, Any], sign: str = "") -> str:
    if entry["value"] is None:
        return "-"
    low, high = entry["interval"]
    return f"{entry['value']:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def plot(report: Mapping[str, Any], judged: pd.DataFrame, path: Path) -> None:
    """Draw what is made up by perspective, the label bias, and the lengths of right and wrong rationales."""
    from matplotlib.figure import Figure

    groups = {name: group for name, group in report["groups"].items() if name != "all"}
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    made_up, bias, lengths = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 1])
    panels = (
        (made_up, ["any", *KINDS], "made up × 100 (any: of rationales; else: of claims)"),
        (bias, list(report["groups"]["all"]["verdicts"]), "share of verdicts minus share of gold × 100"),
    )
    for axes, ticks, title in panels:
        for order, (name, group) in enumerate(groups.items()):
            entries = group["claims"] | {"any": group["shares"]["makes something up"]} | group["verdicts"]
            color = COLORS.get(name, OTHER_COLOR)
            for place, tick in enumerate(ticks):
                entry = entries[tick]
                if entry["value"] is None:
                    continue
                x = place + 0.18 * (order - (len(groups) - 1) / 2)
                low, high = (100 * end for end in entry["interval"])
                axes.vlines(x, low, high, color=color, linewidth=2, alpha=0.5)
                axes.plot(x, 100 * entry["value"], "o", color=color, markersize=4)
            axes.plot([], [], "o", color=color, label=name.replace("_", " "))
        axes.set_xticks(range(len(ticks)), ticks, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.grid(axis="y", color="#e5e7eb")
        axes.set_axisbelow(True)
    bias.axhline(0, color=OTHER_COLOR, linewidth=1)
    made_up.legend(fontsize=8, frameon=False, loc="upper left")
    bins = range(0, int(judged["words"].max()) + 3, 2)
    for value, label, color in ((1, "verdict right", "#1d4ed8"), (0, "verdict wrong", "#d97706")):
        words = judged["words"][judged["right"] == value]
        lengths.hist(words, bins=bins, density=True, histtype="step", color=color, label=label, linewidth=1.5)
    lengths.set_title("words of a rationale (densities)", fontsize=10)
    lengths.legend(fontsize=8, frameon=False)
    for axes in (made_up, bias, lengths):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
