"""Check whether a student's tiers still hold on a new sample. The exit status tells: 0 they hold, 1 they do not.

    python -m recipes.evaluate.drift --model STUDENT --sample NEW/predictions.parquet --output drift.json
    python -m recipes.evaluate.drift --model STUDENT --sample scores_of_today.parquet

The sample is a parquet file with `probabilities` (as recipes.evaluate.run writes them, before calibration) or `score`
(the expected gain that the served model gives), and `label` where there are some. Compared with the validation pairs
that recipes.evaluate.calibrate fitted on:

- without labels: shares of the tiers (population stability index) and the scores (Kolmogorov-Smirnov). They drift when
  the index is above `--max_psi`, or when the KS distance is above `--max_ks` and its p-value below 0.01;
- with labels: the share of relevant products below each boundary, with an exact binomial interval. A target is missed
  when the whole interval lies above it. Then this decides, and the shares are only shown.

Rows of one query are not independent, which the binomial and KS figures take them to be: sample many queries.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, parse, run
from recipes.record import sha256, write_json
from recipes.schemas import Column, Contract, load_labels, read

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FEWEST_ROWS = 50
SAMPLE = Contract(
    name="a sample",
    made_by="recipes.evaluate.run",
    columns={
        "probabilities": Column("vector", required=False),
        "score": Column("number", required=False),
        "label": Column("string", required=False, nullable=True),
    },
    key=(),
)


@dataclass
class DriftArguments:
    """Options of `recipes.evaluate.drift`."""

    model: str = field(metadata={"help": "Folder of a student that recipes.evaluate.calibrate calibrated."})
    sample: str = field(metadata={"help": "New products (parquet): `probabilities` or `score`, and `label` if known."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    max_psi: float = field(default=0.2, metadata={"help": "Population stability index of the tiers that is drift."})
    max_ks: float = field(default=0.1, metadata={"help": "Kolmogorov-Smirnov distance of the scores that is drift."})
    output: str | None = field(default=None, metadata={"help": "JSON to write, if any."})


def check_drift(arguments: DriftArguments) -> dict[str, Any]:
    """Compare a sample with what the thresholds were fitted on.

    Returns:
        `holds`, `decided_by` (`labels` or `shares`), `rows`, `psi`, `ks` (`distance`, `p_value`), `tiers` (share now
        and then), and with labels `boundaries`.

    Raises:
        UserError: The student is not calibrated, or the sample too small or without scores.
    """
    import numpy as np
    from scipy.stats import ks_2samp

    from recipes.evaluate.scaling import Scaling, tiers
    from recipes.evaluate.significance import binomial_interval

    file = Path(arguments.model, "calibration.json")
    if not file.is_file():
        raise UserError(f"{file}: no such file; recipes.evaluate.calibrate writes it. Calibrate the student first.")
    record = json.loads(file.read_text(encoding="utf-8"))
    schema = load_labels(arguments.labels)
    sample = read(arguments.sample, SAMPLE)
    if len(sample) < FEWEST_ROWS:
        raise UserError(
            f"{arguments.sample}: {len(sample)} rows say nothing of shares; expected {FEWEST_ROWS} or more."
        )
    if "score" in sample:
        scores = sample["score"].to_numpy(float)
    elif "probabilities" in sample:
        given = np.stack(sample["probabilities"].to_numpy()).astype(float)
        if given.shape[1] != len(schema.names):
            raise UserError(
                f"{arguments.sample}: {given.shape[1]} probabilities a row; {schema.name!r} has another number."
            )
        scaling = Scaling(record["temperature"], record["class_scales"], record["class_biases"])
        scores = scaling.apply(given) @ np.array(schema.gains)
    else:
        raise UserError(f"{arguments.sample}: neither column 'score' nor 'probabilities'. {SAMPLE.made_by} writes one.")
    thresholds, reference = record["tier_thresholds"], record["reference"]
    then = np.array(reference["tiers"], dtype=float)
    now = np.bincount(tiers(scores, thresholds), minlength=len(then)).astype(float)
    psi = stability_index(then, now)
    ks = ks_2samp(scores, np.array(reference["scores"]))
    drifted = psi > arguments.max_psi or (ks.statistic > arguments.max_ks and ks.pvalue < 0.01)
    result: dict[str, Any] = {
        "holds": not drifted,
        "decided_by": "shares",
        "rows": len(sample),
        "psi": psi,
        "ks": {"distance": float(ks.statistic), "p_value": float(ks.pvalue)},
        "tiers": {"now": (now / now.sum()).tolist(), "then": (then / then.sum()).tolist()},
        "sample_sha256": sha256(arguments.sample),
    }
    if "label" in sample and sample["label"].notna().any():
        known = sample["label"].notna().to_numpy()
        labels = schema.canonical_column(sample["label"][known], arguments.sample)
        kept = scores[known][labels.isin(schema.relevant).to_numpy()]
        if not len(kept):
            raise UserError(
                f"{arguments.sample}: no relevant product among the labelled ones, so no target is checked."
            )
        result["boundaries"] = []
        for target, threshold in zip(record["relevant_below"], thresholds, strict=True):
            below = int((kept < threshold).sum())
            low, high = binomial_interval(below, len(kept))
            verdict = "missed" if low > target else "kept" if high <= target else "not shown to be missed"
            result["boundaries"].append(
                {"target": target, "relevant_below": below / len(kept), "interval": [low, high], "verdict": verdict}
            )
        result |= {"decided_by": "labels", "relevant": len(kept)}
        result["holds"] = all(boundary["verdict"] != "missed" for boundary in result["boundaries"])
    if arguments.output is not None:
        write_json(arguments.output, result)
    return result


def stability_index(then: NDArray[np.float64], now: NDArray[np.float64]) -> float:
    """Population stability index, Σ (p - q)·ln(p/q), of two vectors of counts; each cell counts half a row more.

    The half keeps an empty tier finite. Below 0.1 is commonly read as stable, above 0.25 as another population.

    >>> import numpy as np
    >>> stability_index(np.array([50.0, 50.0]), np.array([5.0, 5.0]))
    0.0
    """
    import numpy as np

    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (then, now))
    return float(((p - q) * np.log(p / q)).sum())


def main() -> None:
    """Check from the command line."""
    arguments = parse(DriftArguments, __doc__)
    result = check_drift(arguments)
    print(f"{result['rows']:,} rows: PSI {result['psi']:.3f}, KS distance {result['ks']['distance']:.3f}")
    shares = zip(result["tiers"]["now"], result["tiers"]["then"], strict=True)
    print(", ".join(f"tier {tier}: {now:.1%} (was {then:.1%})" for tier, (now, then) in enumerate(shares)))
    for number, boundary in enumerate(result.get("boundaries", []), start=1):
        low, high = boundary["interval"]
        print(
            f"boundary {number}: {boundary['relevant_below']:.2%} [{low:.2%}, {high:.2%}] of the relevant below, "
            f"target {boundary['target']:.2%}: {boundary['verdict']}"
        )
    if result["holds"]:
        print(f"The thresholds hold, by {result['decided_by']}.")
    else:
        print(
            f"The thresholds do not hold, by {result['decided_by']}. Next: label a sample, python -m "
            f"recipes.evaluate.calibrate --model {arguments.model} ..."
        )
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
