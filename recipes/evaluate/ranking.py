"""Measure a run as a ranker and as a filter: nDCG, MAP, MRR, precision at k by locale, and filtering curves.

    python -m recipes.evaluate.ranking --predictions runs/esci/bench/gat-0/evaluation-test --output runs/esci/ranking
    python -m recipes.evaluate.ranking --predictions EVALUATION --model STUDENT --output DIR    # as calibrated

Products are ranked by expected gain, Σ P(c)·gain(c); with `--model`, of the probabilities that
recipes.evaluate.calibrate fitted. nDCG, MAP and MRR are those of metrics.json, by trec_eval through ir-measures;
precision at k too, over the queries with a relevant product and at least k products. A filter drops all products below
a score: the curve says what share of the relevant ones that loses. Writes ranking.json and filtering.png to `--output`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run
from recipes.record import sha256, write_json
from recipes.schemas import PREDICTIONS, LabelSchema, load_labels, make_folder, read

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

LOST = (0.005, 0.01, 0.02, 0.05, 0.1)
POINTS = 200


@dataclass
class RankingArguments:
    """Options of `recipes.evaluate.ranking`."""

    predictions: str = field(metadata={"help": "Predictions (parquet), or the folder of recipes.evaluate.run."})
    output: str = field(metadata={"help": "Folder to write ranking.json and filtering.png to."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    model: str | None = field(default=None, metadata={"help": "Calibrated student whose scaling is applied first."})
    cutoffs: list[int] = field(default_factory=lambda: [1, 3, 5, 10], metadata={"help": "k of precision at k."})


def measure(arguments: RankingArguments) -> dict[str, Any]:
    """Rank, filter and write; return what ranking.json holds.

    Raises:
        UserError: The predictions break their contract, or the student is not calibrated.
    """
    from recipes.evaluate.metrics import CONVENTIONS, ranking, ranking_by_query, to_arrays
    from recipes.evaluate.scaling import Scaling

    if not arguments.cutoffs or min(arguments.cutoffs) < 1:
        raise UserError(f"--cutoffs {arguments.cutoffs}: expected whole numbers of at least 1.")
    file = Path(arguments.predictions)
    file = file / "predictions.parquet" if file.is_dir() else file
    predictions = read(file, PREDICTIONS)
    schema = load_labels(arguments.labels)
    predictions["label"] = schema.canonical_column(predictions["label"], file)
    _, _, probabilities = to_arrays(predictions, schema, str(file))
    if arguments.model is not None:
        fitted = Path(arguments.model, "calibration.json")
        if not fitted.is_file():
            raise UserError(f"{fitted}: no such file. Calibrate the student first: recipes.evaluate.calibrate.")
        record = json.loads(fitted.read_text(encoding="utf-8"))
        scaling = Scaling(record["temperature"], record["class_scales"], record["class_biases"])
        probabilities = scaling.apply(probabilities)
        predictions["probabilities"] = list(probabilities)
    output = make_folder(arguments.output)
    scores = probabilities @ schema.gains
    relevant = predictions["label"].isin(schema.relevant).to_numpy()
    queries = ranking_by_query(predictions, schema, str(file))
    precision = precision_by_query(predictions, scores, relevant, arguments.cutoffs)
    locales = predictions["locale"].to_numpy()
    result: dict[str, Any] = {"gains": dict(zip(schema.names, schema.gains, strict=True)), "relevant": schema.relevant}
    slices = {"overall": None, **{locale: locale for locale in sorted(set(locales))}}
    result["slices"] = {}
    for name, locale in slices.items():
        rows = slice(None) if locale is None else locales == locale
        chosen = slice(None) if locale is None else (queries["locale"] == locale).to_numpy()
        result["slices"][name] = {
            **ranking(queries[chosen]),
            "precision": {
                str(k): {"value": _mean(precision[k][chosen]), "queries": int(precision[k][chosen].notna().sum())}
                for k in arguments.cutoffs
            },
            "filtering": filtering(scores[rows], relevant[rows]),
        }
    result |= {
        "conventions": {name: CONVENTIONS[name] for name in ("score", "ndcg", "ndcg_contested", "map", "mrr")},
        "predictions_sha256": sha256(file),
        "command": command_line("recipes.evaluate.ranking", arguments),
    }
    write_json(output / "ranking.json", result)
    plot_filtering(result["slices"], schema, output / "filtering.png")
    return result


def precision_by_query(
    predictions: pd.DataFrame, scores: NDArray[np.float64], relevant: NDArray[np.bool_], cutoffs: list[int]
) -> pd.DataFrame:
    """Return precision at each k, a row a query in order of first appearance; NaN as the module says."""
    import pandas as pd
    from ir_measures import P, iter_calc

    from recipes.evaluate.metrics import document_ids

    groups = predictions.groupby(["locale", "query"], sort=False).ngroup()
    frame = pd.DataFrame(
        {
            "query_id": groups.astype(str).to_numpy(),
            "doc_id": document_ids(predictions["pair_id"]),
            "score": scores,
            "relevance": relevant.astype(int),
        }
    )
    measures = {P @ k: k for k in cutoffs}
    values = [
        (int(value.query_id), measures[value.measure], value.value)
        for value in iter_calc(
            list(measures), frame[["query_id", "doc_id", "relevance"]], frame[["query_id", "doc_id", "score"]]
        )
    ]
    table = pd.DataFrame(values, columns=["query", "k", "value"]).pivot(index="query", columns="k", values="value")
    table = table.reindex(range(groups.max() + 1))
    sizes = groups.value_counts().reindex(table.index)
    has_relevant = frame.groupby(groups.to_numpy())["relevance"].max().reindex(table.index) > 0
    return pd.DataFrame({k: table[k].where(has_relevant & (sizes >= k)) for k in cutoffs})


def filtering(scores: NDArray[np.float64], relevant: NDArray[np.bool_]) -> dict[str, Any]:
    """Follow a threshold upwards over the scores.

    Returns:
        `curve`: `threshold`, `filtered` (share of products with a lower score), `relevant_lost` and `others_filtered`
        (of the relevant and of the others), at most `POINTS` points; `at`: share lost at most -> the farthest point of
        the whole curve that keeps it. Without relevant products, or without others, no curve: None.

    Example:
        >>> import numpy as np
        >>> found = filtering(np.array([0.1, 0.2, 0.6, 0.9]), np.array([False, True, False, True]))
        >>> [point["filtered"] for point in found["curve"]], found["at"]["0.1"]["threshold"]
        ([0.0, 0.25, 0.5, 0.75], 0.2)
    """
    import numpy as np

    if not 0 < relevant.sum() < len(relevant):
        return {"curve": None, "at": None}
    thresholds = np.unique(scores)
    lower = [
        np.searchsorted(np.sort(part), thresholds, side="left") / len(part)
        for part in (scores, scores[relevant], scores[~relevant])
    ]
    points = [
        dict(zip(("threshold", "filtered", "relevant_lost", "others_filtered"), map(float, values), strict=True))
        for values in zip(thresholds, *lower, strict=True)
    ]
    kept = np.unique(np.linspace(0, len(points) - 1, min(POINTS, len(points))).round().astype(int))
    allowed = {str(lost): int((lower[1] <= lost).sum()) - 1 for lost in LOST}
    return {
        "curve": [points[place] for place in kept],
        "at": {lost: points[place] for lost, place in allowed.items()},
    }


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None


def plot_filtering(slices: dict[str, Any], schema: LabelSchema, path: Path) -> None:
    """Draw the share of relevant products lost against the share of products filtered, a line a slice."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="#9ca3af", linewidth=1, linestyle=":", label="at random")
    shown = {name: values for name, values in slices.items() if values["filtering"]["curve"] is not None}
    shown = shown if len(shown) != 2 else {"overall": shown["overall"]}  # one locale is the whole
    for number, (name, values) in enumerate(shown.items()):
        curve = values["filtering"]["curve"]
        axes.plot(
            [100 * point["filtered"] for point in curve],
            [100 * point["relevant_lost"] for point in curve],
            color="#0f766e" if name == "overall" else None,
            linewidth=2.2 if name == "overall" else 1.2,
            label=name,
            zorder=10 - number,
        )
    axes.set_xlabel("products filtered, %")
    axes.set_ylabel(f"lost of {' and '.join(schema.relevant)}, %")
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def format_result(result: dict[str, Any], cutoffs: list[int]) -> str:
    """Lay the measures out, a line a slice, then what a filter loses."""

    def cell(value: float | None) -> str:
        return f"{'-' if value is None else f'{value:.3f}':>8}"

    head = "".join(f"{name:>8}" for name in ("queries", "nDCG", "nDCG*", "MAP", "MRR", *(f"P@{k}" for k in cutoffs)))
    lines = [f"{'':10}{head}"]
    for name, values in result["slices"].items():
        scores = [values[key] for key in ("ndcg", "ndcg_contested", "map", "mrr")]
        scores += [values["precision"][str(k)]["value"] for k in cutoffs]
        lines.append(f"{name:10}{values['queries']:>8}{''.join(map(cell, scores))}")
    overall = result["slices"]["overall"]["filtering"]["at"]
    for lost, point in (overall or {}).items():
        lines.append(
            f"losing at most {float(lost):5.1%} of the relevant filters {point['filtered']:.1%} of all products and "
            f"{point['others_filtered']:.1%} of the others"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure from the command line."""
    arguments = parse(RankingArguments, __doc__)
    print(format_result(measure(arguments), arguments.cutoffs))
    print(f"\nWrote {arguments.output}/ranking.json and filtering.png.")
    print("Next: python -m recipes.evaluate.calibrate --model STUDENT ... turns a share that may be lost into tiers")


if __name__ == "__main__":
    run(main)
