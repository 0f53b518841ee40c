"""Temperature and vector scaling, and the thresholds between tiers: pure functions over arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from recipes.arguments import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SMALLEST = 1e-30  # of a probability, before its logarithm
TEMPERATURES = (0.05, 20.0)


@dataclass(frozen=True)
class Scaling:
    """How logits become probabilities: `LRKDConfig`'s fields of the same names."""

    temperature: float = 1.0
    class_scales: list[float] | None = None
    class_biases: list[float] | None = None

    def apply(self, probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return calibrated probabilities `(rows, classes)` of uncalibrated ones, as `LRKDConfig.calibrated` does.

        >>> Scaling(temperature=0.5).apply(np.array([[0.75, 0.25]]))
        array([[0.9, 0.1]])
        """
        logits = np.log(np.maximum(probabilities, SMALLEST)) / self.temperature
        if self.class_scales is not None:
            logits = logits - _logsumexp(logits)
            logits = logits * np.array(self.class_scales)
        if self.class_biases is not None:
            logits = logits + np.array(self.class_biases)
        return np.exp(logits - _logsumexp(logits))


def fit(gold: NDArray[np.int64], probabilities: NDArray[np.float64], method: str) -> Scaling:
    """Fit a scaling by the likelihood of the gold classes.

    Args:
        gold: Gold classes `(rows,)`.
        probabilities: Uncalibrated probabilities `(rows, classes)`.
        method: `temperature` (arXiv 1706.04599), one number; `vector`, a scale and a bias a class.

    Raises:
        UserError: The probabilities are the same in every row; a temperature runs away; for `vector`, a class has no
            row.
    """
    from scipy.optimize import minimize, minimize_scalar

    if np.ptp(probabilities, axis=0).max() < 1e-6:
        raise UserError("the probabilities are the same for every row: nothing to calibrate. Train the student first.")
    logits = np.log(np.maximum(probabilities, SMALLEST))
    rows, classes = logits.shape
    if method == "temperature":
        low, high = np.log(TEMPERATURES)
        found = minimize_scalar(
            lambda log_t: _nll(gold, logits / np.exp(log_t)),
            bounds=(low, high),
            method="bounded",
            options={"xatol": 1e-8},
        )
        if not low + 1e-3 < found.x < high - 1e-3:
            raise UserError(
                f"no temperature from {TEMPERATURES[0]} to {TEMPERATURES[1]} is best: the predictions are all right, "
                "or no better than chance. Calibrate on pairs that the student was not trained on."
            )
        return Scaling(temperature=float(np.exp(found.x)))
    one_hot = np.eye(classes)[gold]
    if not one_hot.any(axis=0).all():
        absent = np.flatnonzero(~one_hot.any(axis=0)).tolist()
        raise UserError(f"vector scaling: class {absent[0]} has no row, so its bias would run away.")

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scaled = logits * parameters[:classes] + parameters[classes:]
        error = np.exp(scaled - _logsumexp(scaled)) - one_hot  # (rows, classes)
        gradient = np.concatenate([(error * logits).sum(axis=0), error.sum(axis=0)]) / rows
        return _nll(gold, scaled), gradient

    start = np.concatenate([np.ones(classes), np.zeros(classes)])
    best = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000}).x
    biases = best[classes:] - best[classes:].mean()  # adding one number to all changes nothing
    return Scaling(1.0, best[:classes].tolist(), biases.tolist())


def held_out_nll(
    gold: NDArray[np.int64], probabilities: NDArray[np.float64], query: NDArray[np.int64], method: str, folds: int = 5
) -> float:
    """Return the likelihood of rows whose query the scaling was not fitted on: what chooses between the methods."""
    losses = np.empty(len(gold))
    for fold in range(folds):
        held = query % folds == fold
        if held.any() and not held.all():
            scaled = fit(gold[~held], probabilities[~held], method).apply(probabilities[held])
            losses[held] = -np.log(np.maximum(scaled[np.arange(held.sum()), gold[held]], SMALLEST))
        elif held.any():
            raise UserError("fewer than two queries: too few to choose a method by. Pass --method.")
    return float(losses.mean())


def upper_bound(lost: int, of: int, confidence: float) -> float:
    """Return the one-sided exact binomial (Clopper-Pearson) upper bound of a rate; the rate itself at confidence 0.

    >>> round(upper_bound(0, 100, 0.95), 4), upper_bound(2, 100, 0.0)
    (0.0295, 0.02)
    """
    from scipy.stats import beta

    if confidence == 0:
        return lost / of
    return 1.0 if lost == of else float(beta.ppf(confidence, lost + 1, of - lost))


def tier_thresholds(
    scores: NDArray[np.float64], relevant: NDArray[np.bool_], targets: Sequence[float], confidence: float
) -> list[float]:
    """Return for each target the largest threshold below which at most that share of the relevant rows lies.

    Args:
        scores: Expected gains `(rows,)`.
        relevant: Which rows must not be lost `(rows,)`.
        targets: Ascending shares: of boundary 1 (tier 0 lies below it), boundary 2 (tiers 0 and 1)...
        confidence: Of the exact binomial bound that has to keep the target; 0: the share on these rows has to.

    Raises:
        UserError: There is no relevant row; a target cannot be met with so few, or two boundaries fall together;
            says which, and what could be met.
    """
    kept = np.sort(scores[relevant])
    if not len(kept):
        raise UserError("tiers: no relevant product among the validation pairs, so no target can be checked.")
    if np.ptp(scores) < 1e-9:
        raise UserError("tiers: every product has the same score, so no threshold separates them.")
    thresholds: list[float] = []
    for number, target in enumerate(targets, start=1):
        bounds = np.array([upper_bound(lost, len(kept), confidence) for lost in range(len(kept))])
        allowed = int((bounds <= target).sum()) - 1  # relevant products that may be lost
        if allowed < 0:
            raise UserError(
                f"boundary {number}: that at most {target:.2%} of the relevant products lie below it cannot be shown "
                f"at confidence {confidence:g} with {len(kept)} of them: with none lost the bound is {bounds[0]:.2%}. "
                "Take that target or a larger one, more validation pairs, or a lower --confidence (0: none)."
            )
        # A product of the threshold's own score lies above it, so of equal scores none is lost.
        threshold = float(kept[allowed])
        if thresholds and threshold <= thresholds[-1]:
            raise UserError(
                f"boundaries {number - 1} and {number}: the targets {targets[number - 2]:.2%} and {target:.2%} both "
                f"give {threshold:.4f}, which leaves tier {number - 1} empty: {allowed} of {len(kept)} relevant "
                "products may be lost. Set the targets further apart, or use more validation pairs."
            )
        thresholds.append(threshold)
    return thresholds


def tiers(scores: NDArray[np.float64], thresholds: Sequence[float]) -> NDArray[np.int64]:
    """Return the tier of each score: the number of thresholds at or below it."""
    return np.searchsorted(thresholds, scores, side="right")


def _logsumexp(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    top = logits.max(axis=1, keepdims=True)
    return top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))


def _nll(gold: NDArray[np.int64], logits: NDArray[np.float64]) -> float:
    return float((_logsumexp(logits)[:, 0] - logits[np.arange(len(gold)), gold]).mean())
