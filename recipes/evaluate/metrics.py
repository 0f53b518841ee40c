"""Metrics of relevance predictions: pure functions over the `PREDICTIONS` table; `CONVENTIONS` defines each."""

from __future__ import annotations

import math
from fractions import Fraction
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np

from recipes.arguments import UserError
from recipes.schemas import LabelSchema

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

ECE_BINS = 15

# Written into metrics.json, because each of these is computed in several ways in the field.
CONVENTIONS = {
    "macro_f1": (
        "Mean F1 of the classes that occur in the gold labels of the slice: overall, per locale and in every bootstrap "
        "draw of compare. A class never predicted has F1 0. A class without gold rows could only score 0, so it is "
        "left out, though predicting it still costs the recall of the others."
    ),
    "score": "What products are ranked by: the expected gain, sum over classes of probability times gain.",
    "ndcg": (
        "trec_eval's: linear gains, log2 discount, all judged products of a query, no cut-off. A query is one (locale, "
        "query) as written; ndcg_queries counts those with a product of positive gain, the others are skipped."
    ),
    "ndcg_contested": (
        "ndcg over the queries with products of different gains: a query whose products all have one gain scores 1 "
        "whatever the model does."
    ),
    "map": "Mean average precision of the relevant classes; queries without a relevant product are skipped.",
    "mrr": "Mean reciprocal rank of the first product of a relevant class, over the queries of map.",
    "roc_auc": "Relevant classes against the rest, by the summed probability of the relevant classes, over pairs.",
    "nll": "Negative log likelihood of the gold class, in nats.",
    "brier": "Squared distance between probabilities and one-hot label, summed over classes (0 to 2).",
    "ece": f"Expected calibration error of the top class, {ECE_BINS} bins of equal width, closed on the right.",
    "classwise_ece": (
        f"Mean over classes of the calibration error of the class's probability, {ECE_BINS} bins of equal width, "
        "closed on the right."
    ),
    "confusion_matrix": "Rows are gold classes, columns predicted ones, both in the order of labels.",
}


def evaluate_predictions(predictions: pd.DataFrame, schema: LabelSchema, source: str = "predictions") -> dict[str, Any]:
    """Compute every metric, overall and per locale.

    Args:
        predictions: A table of the `PREDICTIONS` contract; probabilities in the order of the schema's classes.
        schema: Classes, gains and which classes are relevant.
        source: What error messages call the table.

    Returns:
        A dict that `json.dump` takes: `labels`, `conventions`, `overall`, and `locales` (locale -> slice). A slice
        holds the metrics; one that is not defined there is None, with the reason under `undefined`.

    Raises:
        UserError: The table is empty, or its labels or probabilities do not fit the schema.
    """
    gold, predicted, probabilities = to_arrays(predictions, schema, source)
    queries = ranking_by_query(predictions, schema, source)
    locales = predictions["locale"].to_numpy()

    def of(locale: str | None) -> dict[str, Any]:
        rows = slice(None) if locale is None else locales == locale
        return {
            **classification(gold[rows], predicted[rows], probabilities[rows], schema),
            **ranking(queries if locale is None else queries[queries["locale"] == locale]),
        }

    return {
        "schema": schema.name,
        "labels": schema.names,
        "gains": dict(zip(schema.names, schema.gains, strict=True)),
        "relevant": schema.relevant,
        "conventions": CONVENTIONS,
        "overall": _name_undefined(of(None)),
        "locales": {locale: _name_undefined(of(locale)) for locale in sorted(set(locales))},
    }


def to_arrays(
    predictions: pd.DataFrame, schema: LabelSchema, source: str = "predictions"
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Turn a predictions table into gold and predicted class indices `(rows,)` and probabilities `(rows, classes)`.

    Raises:
        UserError: The table is empty, a label is outside the schema, or a row of probabilities has another length
            than the schema, a number outside 0-1, or does not sum to one.
    """
    if not len(predictions):
        raise UserError(f"{source}: no rows. Expected at least one prediction.")
    gold, predicted = (
        schema.canonical_column(predictions[column], source).map(schema.label2id).to_numpy(np.int64)
        for column in ("label", "predicted_label")
    )
    probabilities = np.asarray(predictions["probabilities"].tolist(), dtype=np.float64)
    if probabilities.shape[1:] != (len(schema.names),):
        raise UserError(
            f"{source}: column 'probabilities' has {probabilities.shape[-1]} numbers a row; "
            f"expected {len(schema.names)}, one for each class of {schema.name!r}: {', '.join(schema.names)}."
        )
    # 1e-3: probabilities stored as float16 or rounded to four digits are fine, logits are not.
    sums = probabilities.sum(axis=1)
    good = (np.abs(sums - 1) <= 1e-3) & (probabilities >= 0).all(axis=1) & (probabilities <= 1 + 1e-3).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise UserError(
            f"{source}: row {row} (pair {predictions['pair_id'].iloc[row]!r}), column 'probabilities': "
            f"{probabilities[row].round(4).tolist()} sums to {sums[row]:.4g}; expected numbers from 0 to 1 that sum to "
            "one (apply softmax to logits first)."
        )
    return gold, predicted, probabilities / sums[:, None]


def classification(
    gold: NDArray[np.int64], predicted: NDArray[np.int64], probabilities: NDArray[np.float64], schema: LabelSchema
) -> dict[str, Any]:
    """Metrics over pairs, each row counting once: class indices `(rows,)` and probabilities `(rows, classes)`."""
    from sklearn.metrics import (
        accuracy_score,
        confusion_matrix,
        f1_score,
        log_loss,
        precision_recall_fscore_support,
        roc_auc_score,
    )

    # Indices, not names: scikit-learn sorts names, and would pair them with the wrong columns of probabilities.
    classes = np.arange(len(schema.names))
    present = np.unique(gold)
    relevant = [schema.label2id[name] for name in schema.relevant]
    is_relevant = np.isin(gold, relevant)
    per_class = precision_recall_fscore_support(gold, predicted, labels=classes, zero_division=0)
    return {
        "rows": len(gold),
        "accuracy": float(accuracy_score(gold, predicted)),
        "macro_f1": float(f1_score(gold, predicted, labels=present, average="macro", zero_division=0)),
        "macro_f1_classes": [schema.names[index] for index in present],
        "roc_auc": float(roc_auc_score(is_relevant, probabilities[:, relevant].sum(axis=1)))
        if 0 < is_relevant.sum() < len(gold)
        else None,
        "nll": float(log_loss(gold, probabilities, labels=classes)),
        "brier": float(((probabilities - np.eye(len(classes))[gold]) ** 2).sum(axis=1).mean()),
        "ece": expected_calibration_error(gold, probabilities),
        "classwise_ece": classwise_calibration_error(gold, probabilities),
        "per_class": {
            name: {"precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(support)}
            for name, precision, recall, f1, support in zip(schema.names, *per_class, strict=True)
        },
        "confusion_matrix": confusion_matrix(gold, predicted, labels=classes).tolist(),
    }


def expected_calibration_error(
    gold: NDArray[np.int64], probabilities: NDArray[np.float64], bins: int = ECE_BINS
) -> float:
    """Mean over rows of |accuracy - confidence| of the row's bin; bins of equal width over the top probability.

    Example:
        Two rows at 0.9 of which one is right, and one right row at 0.6:
        2/3·|0.5 - 0.9| + 1/3·|1 - 0.6| = 0.4.

        >>> p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
        >>> round(expected_calibration_error(np.array([0, 1, 1]), p), 6)
        0.4
    """
    return _calibration_error(probabilities.argmax(axis=1) == gold, probabilities.max(axis=1), bins)


def classwise_calibration_error(
    gold: NDArray[np.int64], probabilities: NDArray[np.float64], bins: int = ECE_BINS
) -> float:
    """Mean over classes of the calibration error of that class's probability (arXiv 1910.12656, section 2).

    Example:
        Class 0 at 0.9, 0.9, 0.4 for gold 0, 1, 1: 2/3·|0.5 - 0.9| + 1/3·|0 - 0.4| = 0.4; class 1 is its mirror.

        >>> p = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
        >>> round(classwise_calibration_error(np.array([0, 1, 1]), p), 6)
        0.4
    """
    classes = range(probabilities.shape[1])
    return float(np.mean([_calibration_error(gold == index, probabilities[:, index], bins) for index in classes]))


def _calibration_error(right: NDArray[np.bool_], confidence: NDArray[np.float64], bins: int) -> float:
    # Right-closed: 0.2 belongs to (2/15, 3/15], float32's 0.20000000298 too, hence the rounding.
    bin_of_row = np.ceil(np.round(confidence * bins, 6)).astype(int)
    gaps = np.bincount(bin_of_row, weights=right - confidence, minlength=bins + 1)
    return float(np.abs(gaps).sum() / len(right))


def ranking_by_query(predictions: pd.DataFrame, schema: LabelSchema, source: str = "predictions") -> pd.DataFrame:
    """Rank the products of each query by expected gain.

    Returns:
        One row a query, in order of first appearance: `locale`, `query`, `products`, `contested` (at least two
        different gains), `ndcg` (NaN without a positive gain), `average_precision` and `reciprocal_rank` (NaN
        without a relevant product).
    """
    import pandas as pd
    from ir_measures import AP, RR, iter_calc, nDCG

    gold, _, probabilities = to_arrays(predictions, schema, source)
    gains = np.asarray(schema.gains)
    # trec_eval takes integers. nDCG with linear gains does not change when all gains are multiplied by one number.
    scale = math.lcm(*(Fraction(str(gain)).denominator for gain in schema.gains))
    relevance = np.array([round(gain * scale) for gain in schema.gains])
    groups = predictions.groupby(["locale", "query"], sort=False)
    frame = pd.DataFrame(
        {
            "query_id": groups.ngroup().astype(str).to_numpy(),
            "doc_id": document_ids(predictions["pair_id"]),
            "score": probabilities @ gains,
            "gain": gains[gold],
            "graded": relevance[gold],
            "binary": np.isin(gold, [schema.label2id[name] for name in schema.relevant]).astype(int),
        }
    )
    by_query = frame.groupby("query_id", sort=False)
    table = pd.DataFrame(
        {
            "products": by_query.size(),
            "contested": by_query["gain"].nunique() > 1,
            "has_gain": by_query["gain"].max() > 0,
            "has_relevant": by_query["binary"].max() > 0,
        }
    )
    run = frame[["query_id", "doc_id", "score"]]
    for columns, judged, known in (
        ({nDCG: "ndcg"}, "graded", "has_gain"),
        ({AP: "average_precision", RR: "reciprocal_rank"}, "binary", "has_relevant"),
    ):
        qrels = frame[["query_id", "doc_id", judged]].rename(columns={judged: "relevance"})
        values = pd.DataFrame(
            [(value.query_id, columns[value.measure], value.value) for value in iter_calc(list(columns), qrels, run)],
            columns=["query_id", "measure", "value"],
        ).pivot(index="query_id", columns="measure", values="value")
        table[values.columns] = values.reindex(table.index).where(table[known])
    names = predictions[["locale", "query"]].drop_duplicates().reset_index(drop=True)
    return pd.concat([names, table.drop(columns=["has_gain", "has_relevant"]).reset_index(drop=True)], axis=1)


def document_ids(pair_ids: pd.Series) -> list[str]:
    """Name documents for trec_eval, which breaks ties by their names.

    A digest keeps the numbering of the pairs, which may follow their labels, out of the ranking.
    """
    return [blake2b(pair.encode(), digest_size=8).hexdigest() for pair in pair_ids]


def ranking(queries: pd.DataFrame) -> dict[str, Any]:
    """Average the table of `ranking_by_query` over its queries, those where a measure is defined."""
    judged = queries["ndcg"].notna()
    return {
        "queries": len(queries),
        "ndcg": _mean(queries["ndcg"]),
        "ndcg_queries": int(judged.sum()),
        "ndcg_queries_several_products": int((judged & (queries["products"] > 1)).sum()),
        "ndcg_contested": _mean(queries["ndcg"][queries["contested"]]),
        "ndcg_contested_queries": int(queries["contested"].sum()),
        "map": _mean(queries["average_precision"]),
        "mrr": _mean(queries["reciprocal_rank"]),
        "map_queries": int(queries["average_precision"].notna().sum()),
    }


def _mean(values: pd.Series) -> float | None:
    # fsum: the same value in whatever order the rows come.
    defined = values.dropna()
    return math.fsum(defined) / len(defined) if len(defined) else None


def _name_undefined(metrics: dict[str, Any]) -> dict[str, Any]:
    reasons = {
        "roc_auc": "needs relevant pairs and others",
        "ndcg": "no query has a product of positive gain",
        "ndcg_contested": "no query has products of different gains",
        "map": "no query has a relevant product",
        "mrr": "no query has a relevant product",
    }
    return {**metrics, "undefined": {name: reason for name, reason in reasons.items() if metrics[name] is None}}
