"""Relevance of products to queries: accuracy, macro-F1, nDCG and expected calibration error in one.

    metric = evaluate.load("ORG/lrkd_relevance")
    metric.compute(predictions=probabilities, references=labels, queries=queries, gains=[1.0, 0.1, 0.01, 0.0])

It needs numpy, scikit-learn and `evaluate`, and nothing of the project it comes from.
"""

import datasets
import evaluate
import numpy as np
from sklearn.metrics import accuracy_score, f1_score

_DESCRIPTION = """
Metrics of a classifier that judges (query, product) pairs, from its class probabilities: accuracy and macro-F1 of the
most probable class, nDCG of the products of each query ranked by expected gain, and expected calibration error.
"""

_CITATION = """
@article{jarvelin2002cumulated,
    title = {Cumulated gain-based evaluation of {IR} techniques},
    author = {J{\\"a}rvelin, Kalervo and Kek{\\"a}l{\\"a}inen, Jaana},
    journal = {ACM Transactions on Information Systems}, volume = {20}, number = {4}, pages = {422--446}, year = {2002}
}
@inproceedings{guo2017calibration,
    title = {On Calibration of Modern Neural Networks},
    author = {Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
    booktitle = {Proceedings of the 34th International Conference on Machine Learning}, year = {2017}
}
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: Class probabilities of each pair, `(pairs, classes)`: numbers from 0 to 1 that sum to one.
    references: Index of the right class of each pair, from 0 `(pairs,)`.
    queries: What groups the pairs for nDCG `(pairs,)`: the query, or the locale and the query.
    gains: Gain of each class, 0 or more, in the order of the probabilities. None: `ndcg` is left out.
    bins: Bins of equal width of the calibration error. Default 15.

Returns:
    accuracy: Share of pairs whose most probable class is the right one.
    macro_f1: Mean F1 of the classes that occur in `references`; a class that is never predicted has F1 0.
    ndcg: Mean over queries of DCG / ideal DCG: linear gains, log2 discount, no cut-off. Products are ranked by expected
        gain, sum over classes of probability times gain; products of equal score share their discounts, so that no
        order of the rows helps. Queries without a product of positive gain are skipped. NaN if all are.
    ndcg_queries: How many queries `ndcg` is the mean of.
    ece: Mean over pairs of |accuracy - confidence| of the pair's bin; bins of the top probability, closed on the right.

Raises:
    ValueError: Probabilities that are none, a class index or a number of gains that does not fit.

Examples:
    >>> metric = evaluate.load("lrkd_relevance")
    >>> metric.compute(
    ...     predictions=[[0.9, 0.1], [0.2, 0.8], [0.4, 0.6]], references=[0, 1, 0], queries=["cup", "cup", "hat"],
    ...     gains=[1.0, 0.0],
    ... )
    {'accuracy': 0.6666666666666666, 'macro_f1': 0.6666666666666666, 'ece': 0.3, 'ndcg': 1.0, 'ndcg_queries': 2}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class LRKDRelevance(evaluate.Metric):
    """The module that `evaluate.load` returns."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float64")),
                    "references": datasets.Value("int64"),
                    "queries": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions, references, queries, gains=None, bins=15):  # noqa: ANN001, ANN202  evaluate's own
        probabilities, gold = _arrays(predictions, references)
        predicted = probabilities.argmax(axis=1)
        result = {
            "accuracy": float(accuracy_score(gold, predicted)),
            "macro_f1": float(f1_score(gold, predicted, labels=np.unique(gold), average="macro", zero_division=0)),
            "ece": expected_calibration_error(probabilities, gold, bins),
        }
        if gains is not None:
            gains = np.asarray(gains, dtype=np.float64)
            if gains.shape != probabilities.shape[1:] or not (gains >= 0).all():
                raise ValueError(f"gains: expected {probabilities.shape[1]} numbers from 0 up, got {gains.tolist()}.")
            of_query = ndcg_by_query(probabilities @ gains, gains[gold], np.asarray(queries))
            result["ndcg"] = float(np.mean(of_query)) if len(of_query) else float("nan")
            result["ndcg_queries"] = len(of_query)
        return result


def _arrays(predictions: list[list[float]], references: list[int]) -> tuple[np.ndarray, np.ndarray]:
    if not len(references):
        raise ValueError("predictions: no rows; expected at least one pair.")
    lengths = {len(row) for row in predictions}
    if len(lengths) != 1:
        raise ValueError(f"predictions: rows of {sorted(lengths)} numbers; expected one number for each class.")
    probabilities = np.asarray(predictions, dtype=np.float64)
    gold = np.asarray(references, dtype=np.int64)
    sums = probabilities.sum(axis=1)
    good = (np.abs(sums - 1) <= 1e-3) & (probabilities >= 0).all(axis=1)
    if not good.all():
        row = int(np.argmin(good))
        raise ValueError(
            f"predictions: row {row}: {probabilities[row].round(4).tolist()}; expected probabilities that sum to one "
            "(apply softmax to logits first)."
        )
    if gold.min() < 0 or gold.max() >= probabilities.shape[1]:
        row = int(np.argmax((gold < 0) | (gold >= probabilities.shape[1])))
        raise ValueError(
            f"references: row {row}: {gold[row]}; expected a class from 0 to {probabilities.shape[1] - 1}."
        )
    return probabilities / sums[:, None], gold


def expected_calibration_error(probabilities: np.ndarray, gold: np.ndarray, bins: int) -> float:
    """Return the error of probabilities `(pairs, classes)` against classes `(pairs,)`."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == gold
    # Closed on the right, 0.2 in (2/15, 3/15]: rounded, because float32's 0.2 lies above it.
    bin_of_pair = np.ceil(np.round(confidence * bins, 6)).astype(int)
    gaps = np.bincount(bin_of_pair, weights=right - confidence, minlength=bins + 1)
    return float(np.abs(gaps).sum() / len(gold))


def ndcg_by_query(scores: np.ndarray, gains: np.ndarray, queries: np.ndarray) -> list[float]:
    """Return nDCG of each query with a positive gain; scores, gains and queries `(pairs,)`."""
    found = []
    _, query_of_pair = np.unique(queries, return_inverse=True)
    order = np.argsort(query_of_pair, kind="stable")
    for pairs in np.split(order, np.flatnonzero(np.diff(query_of_pair[order])) + 1):
        gain, score = gains[pairs], scores[pairs]
        if not gain.max() > 0:
            continue
        discounts = 1 / np.log2(np.arange(len(pairs)) + 2)
        # Equal scores share the mean of the gains that stand on their ranks.
        _, tie, count = np.unique(-score, return_inverse=True, return_counts=True)
        mean_gain = np.bincount(tie, weights=gain) / count
        by_rank = mean_gain[np.sort(tie)]
        found.append(float(by_rank @ discounts / (np.sort(gain)[::-1] @ discounts)))
    return found
