"""What the card of a dataset says in numbers and plots: balance, agreement of perspectives, lengths."""

from __future__ import annotations

import io
import itertools
from typing import TYPE_CHECKING, Any

from recipes.publish.dataset_checks import Source
from recipes.schemas import PERSPECTIVES, SPLITS, LabelSchema

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# How many perspectives predict the gold label.
RIGHT = {3: "all", 2: "two", 1: "one", 0: "none"}
# File in figures/ -> what it shows, for those who do not see it.
PLOTS = {
    "labels.png": "Share of each class in each split",
    "locales.png": "Share of each class in each locale",
    "agreement.png": "Share of pairs on which all, two, one or none of the perspectives predict the gold label",
    "lengths.png": "Lengths of queries, titles and rationales in characters",
}
COLORS = ("#1d4ed8", "#0891b2", "#16a34a", "#ca8a04", "#dc2626", "#7c3aed", "#db2777", "#6b7280")


def statistics(source: Source, labels: LabelSchema) -> dict[str, Any]:
    """Measure a dataset.

    Returns:
        `splits`: pairs, queries, titles and rationales of each. `labels`: pairs by class and split. `locales`: pairs by
        locale and class. `lengths`: mean, median, 95th percentile and maximum, in characters, of each text.
        `agreement`: see `agreement`. `predict_another_label`: rationales whose verdict is not the gold label.
    """
    pairs, rationales = source.pairs, source.rationales

    def counts(rows: pd.DataFrame, by: str, values: list[str]) -> dict[str, int]:
        return {value: int((rows[by] == value).sum()) for value in values}

    texts = {"query": pairs["query"].drop_duplicates(), "product_title": pairs["product_title"].drop_duplicates()}
    texts |= {name: rationales["rationale"][rationales["perspective"] == name] for name in PERSPECTIVES}
    return {
        "splits": {
            split: {
                "pairs": len(rows),
                "queries": rows["query"].nunique(),
                "titles": rows["product_title"].nunique(),
                "rationales": int((rationales["split"] == split).sum()),
            }
            for split, rows in ((split, pairs[pairs["split"] == split]) for split in SPLITS)
        },
        "labels": {label: counts(pairs[pairs["label"] == label], "split", list(SPLITS)) for label in labels.names},
        "locales": {
            str(locale): counts(rows, "label", labels.names) for locale, rows in pairs.groupby("locale", sort=True)
        },
        "lengths": {name: _lengths(values.str.len()) for name, values in texts.items()},
        "completions": len(source.completions),
        "rationales": len(rationales),
        "predict_another_label": int((rationales["predicted_label"] != rationales["label"]).sum()),
        "agreement": agreement(source.completions, labels),
    }


def _lengths(values: pd.Series) -> dict[str, float]:
    return {
        "mean": round(float(values.mean()), 1),
        "median": float(values.median()),
        "p95": round(float(values.quantile(0.95)), 1),
        "max": int(values.max()),
    }


def agreement(completions: pd.DataFrame, labels: LabelSchema) -> dict[str, Any]:
    """Compare the verdicts of the three perspectives, first samples only, over the pairs that have all three.

    A completion without a verdict counts as a verdict of its own, "unparsed", which is never right.

    Args:
        completions: Contract completions with `label`, the samples of a pair and perspective in their order.
        labels: The classes.

    Returns:
        `pairs`; `right`: share of pairs on which all, two, one or none of the perspectives predict the gold label, and
        `right_by_label`; `accuracy` of each perspective and `accuracy_by_label`; `kappa`: Cohen's kappa of each two
        perspectives over all classes (`overall`) and of each class against the rest. A kappa is None where both give
        one and the same answer throughout.
    """
    first = completions.drop_duplicates(["pair_id", "perspective"])
    verdicts = first.assign(predicted_label=first["predicted_label"].fillna("unparsed"))
    verdicts = verdicts.pivot(index="pair_id", columns="perspective", values="predicted_label").dropna()
    gold = first.drop_duplicates("pair_id").set_index("pair_id")["label"].loc[verdicts.index]
    right = verdicts.eq(gold, axis=0)
    number = right.sum(axis=1)

    def shares(rows: pd.Series) -> dict[str, float]:
        return {name: round(float((rows == count).mean()), 4) for count, name in RIGHT.items()}

    present = [name for name in labels.names if (gold == name).any()]
    return {
        "pairs": len(verdicts),
        "right": shares(number),
        "right_by_label": {name: shares(number[gold == name]) for name in present},
        "accuracy": {name: round(float(right[name].mean()), 4) for name in PERSPECTIVES},
        "accuracy_by_label": {
            label: {name: round(float(right.loc[gold == label, name].mean()), 4) for name in PERSPECTIVES}
            for label in present
        },
        "kappa": {
            f"{one} and {other}": {
                "overall": _kappa(verdicts[one], verdicts[other]),
                **{name: _kappa(verdicts[one] == name, verdicts[other] == name) for name in labels.names},
            }
            for one, other in itertools.combinations(PERSPECTIVES, 2)
        },
    }


def _kappa(one: pd.Series, other: pd.Series) -> float | None:
    from sklearn.metrics import cohen_kappa_score

    if one.nunique() == 1 and one.equals(other.rename(one.name)):
        return None  # 0 / 0: no disagreement is possible by chance
    return round(float(cohen_kappa_score(one, other)), 4)


def plots(source: Source, measured: dict[str, Any], labels: LabelSchema) -> dict[str, bytes]:
    """Draw the plots of the card: file name -> a small PNG, the same for the same data."""
    from matplotlib.figure import Figure

    def figure(rows: int) -> tuple[Figure, Axes]:
        drawn = Figure(figsize=(7, 0.34 * rows + 1.3), layout="constrained")
        return drawn, drawn.subplots()

    by_split, by_split_axes = figure(len(SPLITS))
    _stack(by_split_axes, {split: {name: measured["labels"][name][split] for name in labels.names} for split in SPLITS})
    by_locale, by_locale_axes = figure(len(measured["locales"]))
    _stack(by_locale_axes, measured["locales"])
    agreed = measured["agreement"]
    right, right_axes = figure(1 + len(agreed["right_by_label"]))
    _stack(right_axes, {"all pairs": agreed["right"], **agreed["right_by_label"]}, "perspectives that are right")
    lengths, axes = figure(7)
    for name, color in zip(PERSPECTIVES, COLORS, strict=False):
        texts = source.rationales["rationale"][source.rationales["perspective"] == name]
        axes.hist(texts.str.len(), bins=40, histtype="step", linewidth=1.5, color=color, label=name)
    for name, color in (("query", COLORS[-1]), ("product_title", COLORS[3])):
        texts = source.pairs[name].drop_duplicates()
        axes.hist(texts.str.len(), bins=40, histtype="step", linestyle="--", color=color, label=name)
    axes.set_xlabel("characters")
    axes.set_ylabel("texts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    return {name: _png(drawn) for name, drawn in zip(PLOTS, (by_split, by_locale, right, lengths), strict=True)}


def _stack(axes: Axes, rows: dict[str, dict[str, float]], title: str | None = None) -> None:
    """Draw one bar a row, cut into the shares of its parts."""
    for height, parts in enumerate(rows.values()):
        total, left = sum(parts.values()), 0.0
        for (name, value), color in zip(parts.items(), itertools.cycle(COLORS)):
            share = 100 * value / total
            axes.barh(height, share, left=left, color=color, label=name if height == 0 else None)
            left += share
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of pairs")
    axes.spines[:].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=8, title=title, title_fontsize=8
    )


def _png(figure: Figure) -> bytes:
    content = io.BytesIO()
    # Without the name and version of the program: the same data give the same bytes.
    figure.savefig(content, format="png", dpi=110, metadata={"Software": None})
    return content.getvalue()
