"""Calibrate a student: probabilities that can be believed, and tiers that keep a stated target.

    python -m recipes.evaluate.run --model STUDENT --pairs PAIRS --split validation --output STUDENT/validation
    python -m recipes.evaluate.calibrate --model STUDENT --validation STUDENT/validation \
        --test STUDENT/evaluation-test --output STUDENT/evaluation-test
    python -m recipes.evaluate.calibrate ... --relevant_below 0.01 0.02 0.1 0.3 --method vector

Fits temperature or vector scaling on validation by likelihood; `auto` takes the one of the better likelihood on
queries that it was not fitted on (5 folds of validation). A tier boundary is the largest expected gain below which, at
`--confidence`, at most the stated share of relevant products lies: with the default targets, at most 2 % at tiers 0-1.
Test is only looked at. Writes `temperature`, `class_scales`, `class_biases` and `tier_thresholds` into the student's
config.json, what they were fitted on into its calibration.json, and reliability.png into `--output`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, command_line, parse, run
from recipes.record import sha256, weights_sha256, write_json
from recipes.schemas import PREDICTIONS, LabelSchema, load_labels, make_folder, read
from recipes.student.saving import update_code

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.evaluate.scaling import Scaling

MEASURES = ("nll", "brier", "ece", "classwise_ece", "accuracy")
KEPT_SCORES = 2_000  # of validation, for recipes.evaluate.drift


@dataclass
class CalibrateArguments:
    """Options of `recipes.evaluate.calibrate`."""

    model: str = field(metadata={"help": "Folder of the student; its config.json is written."})
    validation: str = field(metadata={"help": "Folder that recipes.evaluate.run wrote for the validation split."})
    test: str = field(metadata={"help": "The same for the test split."})
    output: str = field(metadata={"help": "Folder for reliability.png."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    method: Literal["auto", "temperature", "vector"] = field(default="auto", metadata={"help": "What to fit."})
    relevant_below: list[float] = field(
        default_factory=lambda: [0.01, 0.02, 0.1, 0.3],
        metadata={"help": "Share of relevant products allowed below boundary 1, 2...; tiers 0-1 lie below the second."},
    )
    confidence: float = field(
        default=0.95, metadata={"help": "Of the exact binomial bound that keeps the target (0: the plain share)."}
    )


def calibrate(arguments: CalibrateArguments) -> dict[str, Any]:
    """Fit, check, and write; return what calibration.json holds.

    Raises:
        UserError: The predictions are of other weights, a class is missing for vector scaling, the scores are
            constant, or a target cannot be met.
    """
    import numpy as np

    from recipes.evaluate.metrics import to_arrays
    from recipes.evaluate.scaling import fit, held_out_nll, tier_thresholds, tiers

    targets = arguments.relevant_below
    if not targets or sorted(set(targets)) != targets or not 0 < targets[0] <= targets[-1] < 1:
        raise UserError(f"--relevant_below {targets}: expected ascending shares between 0 and 1, each once.")
    if not 0 <= arguments.confidence < 1:
        raise UserError(f"--confidence {arguments.confidence}: expected 0 or more and less than 1.")
    folder = Path(arguments.model)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise UserError(f"--model {folder}: no config.json there. Pass a student's folder.")
    config = json.loads(config_file.read_text(encoding="utf-8"))
    schema = load_labels(arguments.labels)
    if [config["id2label"][str(index)] for index in range(len(schema.names))] != schema.names:
        raise UserError(f"{config_file}: its classes are not those of {schema.name!r} in order. Pass its --labels.")
    given = {"validation": arguments.validation, "test": arguments.test}
    files = {name: predictions_file(value, folder) for name, value in given.items()}
    tables = {name: read(file, PREDICTIONS) for name, file in files.items()}
    if files["validation"].resolve() == files["test"].resolve():
        raise UserError("--validation and --test are the same file: what was fitted on cannot show how well it holds.")
    arrays = {name: to_arrays(table, schema, str(files[name])) for name, table in tables.items()}
    output = make_folder(arguments.output)

    gold, _, probabilities = arrays["validation"]
    query = tables["validation"].groupby(["locale", "query"], sort=False).ngroup().to_numpy()
    absent = [name for index, name in enumerate(schema.names) if not (gold == index).any()]
    if absent and arguments.method == "vector":
        raise UserError(
            f"{files['validation']}: no pair of class {absent[0]}, whose scale and bias cannot be fitted. Pass "
            "--method temperature, or a validation split with every class."
        )
    chosen_by: dict[str, float | None] = {}
    method = arguments.method
    if method == "auto":
        chosen_by["temperature"] = held_out_nll(gold, probabilities, query, "temperature")
        try:
            chosen_by["vector"] = held_out_nll(gold, probabilities, query, "vector")
        except UserError:  # a class is absent, from all of validation or from what is left without one fold
            chosen_by["vector"] = None
        vector = chosen_by["vector"]
        method = "temperature" if vector is None or chosen_by["temperature"] <= vector else "vector"
    scaling = fit(gold, probabilities, method)
    scores = scaling.apply(probabilities) @ np.array(schema.gains)
    relevant = np.isin(gold, [schema.label2id[name] for name in schema.relevant])
    thresholds = tier_thresholds(scores, relevant, targets, arguments.confidence)

    record = {
        "method": method,
        "temperature": scaling.temperature,
        "class_scales": scaling.class_scales,
        "class_biases": scaling.class_biases,
        "held_out_nll": chosen_by or None,
        "absent_classes": absent,
        "tier_thresholds": thresholds,
        "relevant_below": targets,
        "confidence": arguments.confidence,
        "relevant": schema.relevant,
        "splits": {
            name: describe(table, arrays[name], scaling, thresholds, targets, schema) for name, table in tables.items()
        },
        "reference": {
            "tiers": np.bincount(tiers(scores, thresholds), minlength=len(targets) + 1).tolist(),
            "scores": [round(float(score), 6) for score in kept_scores(scores)],
        },
        "facts": {
            "weights_sha256": weights_sha256(folder),
            "predictions_sha256": {name: sha256(file) for name, file in files.items()},
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": command_line("recipes.evaluate.calibrate", arguments),
        },
    }
    plot_reliability(arrays["test"], scaling, output / "reliability.png")
    serving = {name: record[name] for name in ("temperature", "class_scales", "class_biases", "tier_thresholds")}
    if changed := update_code(folder):
        print(f"{folder}: its code did not know these settings; from this checkout now: {', '.join(changed)}")
    write_json(folder / "calibration.json", record)
    write_json(config_file, {**config, **serving})
    return record


def predictions_file(value: str, model: Path) -> Path:
    """Return the predictions of an evaluation, if it is of these weights.

    Raises:
        UserError: It is not there, or of another student.
    """
    folder = Path(value)
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        raise UserError(f"{metrics}: no such file. Make it: python -m recipes.evaluate.run --model {model} ...")
    found = json.loads(metrics.read_text(encoding="utf-8"))["facts"]["weights_sha256"]
    if found != weights_sha256(model):
        raise UserError(
            f"{folder}: an evaluation of other weights (sha256 {str(found)[:12]}...) than {model}. Evaluate this one: "
            f"python -m recipes.evaluate.run --model {model} ..."
        )
    return folder / "predictions.parquet"


def kept_scores(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores sorted, or as many evenly spaced quantiles of them as are kept."""
    import numpy as np

    if len(scores) <= KEPT_SCORES:
        return np.sort(scores)
    return np.quantile(scores, np.linspace(0, 1, KEPT_SCORES))


def describe(
    table: pd.DataFrame,
    arrays: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    scaling: Scaling,
    thresholds: list[float],
    targets: list[float],
    schema: LabelSchema,
) -> dict[str, Any]:
    """Measure a split before and after, and what its tiers hold.

    Returns:
        `rows`; `before` and `after` (measure -> value); `tiers`: share of all products and of the relevant ones in
        each; `boundaries`: share of the relevant below each with its exact 95 % interval, and of all products.
    """
    import numpy as np

    from recipes.evaluate.metrics import classification
    from recipes.evaluate.scaling import tiers
    from recipes.evaluate.significance import binomial_interval

    gold, predicted, probabilities = arrays
    scaled = scaling.apply(probabilities)
    scores = scaled @ np.array(schema.gains)
    relevant = np.isin(gold, [schema.label2id[name] for name in schema.relevant])
    tier = tiers(scores, thresholds)
    numbers = range(len(thresholds) + 1)
    before = classification(gold, predicted, probabilities, schema)
    after = classification(gold, scaled.argmax(axis=1), scaled, schema)
    total = int(relevant.sum())
    return {
        "rows": len(table),
        "before": {name: before[name] for name in MEASURES},
        "after": {name: after[name] for name in MEASURES},
        "tiers": [
            {
                "tier": number,
                "products": float((tier == number).mean()),
                "relevant": float((tier[relevant] == number).mean()) if total else None,
            }
            for number in numbers
        ],
        "boundaries": [
            {
                "target": target,
                "threshold": threshold,
                "relevant_below": float((scores[relevant] < threshold).mean()) if total else None,
                "interval": list(binomial_interval(int((scores[relevant] < threshold).sum()), total))
                if total
                else None,
                "others_below": float((scores[~relevant] < threshold).mean()) if total < len(table) else None,
            }
            for target, threshold in zip(targets, thresholds, strict=True)
        ],
    }


def plot_reliability(
    arrays: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]], scaling: Scaling, path: Path
) -> None:
    """Draw how often the top class is right by its probability, before and after; the area of a dot is its rows."""
    import numpy as np
    from matplotlib.figure import Figure

    from recipes.evaluate.metrics import ECE_BINS, expected_calibration_error

    figure = Figure(figsize=(7.6, 3.9), layout="constrained")
    gold, _, probabilities = arrays
    versions = (("before", probabilities), ("after", scaling.apply(probabilities)))
    for axes, (name, shown) in zip(figure.subplots(1, 2, sharey=True), versions, strict=True):
        confidence, right = shown.max(axis=1), shown.argmax(axis=1) == gold
        bins = np.ceil(np.round(confidence * ECE_BINS, 6)).astype(int)
        axes.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for number in np.unique(bins):
            rows = bins == number
            mean, share = confidence[rows].mean(), right[rows].mean()
            axes.vlines(mean, min(mean, share), max(mean, share), color="#dc2626", linewidth=1.2, alpha=0.6)
            axes.scatter(mean, share, s=12 + 500 * rows.mean(), color="#0f766e", alpha=0.8, linewidths=0)
        error = expected_calibration_error(gold, shown)
        axes.set_title(f"{name}: ECE {100 * error:.1f} %", fontsize=10)
        axes.set_xlabel("probability of the top class")
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel(f"share that is right ({len(gold):,} test pairs)")
    figure.savefig(path, dpi=150)


def format_record(record: dict[str, Any]) -> str:
    """Lay out what was fitted in 80 columns."""
    fitted = f"temperature {record['temperature']:.3f}"
    if record["class_scales"] is not None:
        scales, biases = (" ".join(f"{x:.2f}" for x in record[name]) for name in ("class_scales", "class_biases"))
        fitted = f"vector scaling, scales {scales}, biases {biases}"
    lines = [fitted, "", f"{'':12}{'':8}{'NLL':>8}{'Brier':>8}{'ECE':>8}{'cw ECE':>8}{'acc':>8}"]
    for split, values in record["splits"].items():
        for version in ("before", "after"):
            cells = "".join(f"{values[version][name]:8.4f}" for name in MEASURES)
            lines.append(f"{split:12}{version:8}{cells}")
    lines += [
        "",
        f"{'boundary':10}{'gain':>8}{'target':>9}   relevant below: validation, test [95 %]       others (test)",
    ]
    for number, (first, second) in enumerate(
        zip(record["splits"]["validation"]["boundaries"], record["splits"]["test"]["boundaries"], strict=True), start=1
    ):
        low, high = second["interval"] or (float("nan"),) * 2
        shares = f"{first['relevant_below']:8.2%}, {second['relevant_below'] or 0:.2%} [{low:.2%}, {high:.2%}]"
        lines.append(
            f"{f'{number - 1} | {number}':10}{first['threshold']:8.4f}{first['target']:9.2%}   {shares:44}"
            f"{second['others_below'] or 0:.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Calibrate from the command line."""
    arguments = parse(CalibrateArguments, __doc__)
    record = calibrate(arguments)
    print(format_record(record))
    if record["absent_classes"]:
        print(f"No pair of {', '.join(record['absent_classes'])} in validation: its probability is not calibrated.")
    print(f"\nWrote {arguments.model}/config.json and calibration.json, {arguments.output}/reliability.png.")
    print(f"Next: python -m recipes.evaluate.drift --model {arguments.model} --sample NEW.parquet")


if __name__ == "__main__":
    run(main)
