"""Average the probabilities of several students (Avg. Ensemble, arXiv 2601.21611, appendix D.2), and measure that.

    python -m recipes.evaluate.ensemble --predictions runs/rivals/ensemble/*/evaluation --labels esci \
        --output runs/rivals/ensemble/evaluation

Members are joined by pair_id, and each was scored on the same split with recipes.evaluate.run. Writes
predictions.parquet, metrics.json and confusion.png into `--output`, as recipes.evaluate.run does.

The paper trains one BERT a perspective and averages their final predictions; how a perspective enters a BERT it leaves
open. Our reading: the ablation `cls`, a plain encoder and one linear layer, guided by that perspective's rationale
alone (`--extractor_type cls --perspectives user_intent`). Members that are plain BERTs of other seeds, or LRKD students
of one perspective each, are averaged by the same command.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from recipes.arguments import UserError, parse, run
from recipes.evaluate.runs import Run, read_aligned
from recipes.record import environment, sha256, write_json
from recipes.schemas import PREDICTIONS, load_labels, make_folder, write

PREDICTIONS_FILE = "predictions.parquet"


@dataclass
class EnsembleArguments:
    """Options of `recipes.evaluate.ensemble`."""

    predictions: list[str] = field(
        metadata={"help": "Predictions of the members: files, or folders with predictions.parquet."}
    )
    output: str = field(metadata={"help": "Folder to write predictions, metrics and the confusion matrix to."})
    labels: str | None = field(
        default=None,
        metadata={"help": "Label schema: a name in recipes/labels or a YAML file (None: the first member's)."},
    )


def average(predictions: Sequence[Path | str], output: Path | str, labels: str | None = None) -> dict[str, Any]:
    """Average the members' probabilities, all with the same weight; return what metrics.json holds.

    Args:
        predictions: A file, or a folder with predictions.parquet, of each member.
        output: Folder to write to.
        labels: Label schema; None: the one that the first member's metrics.json names.

    Raises:
        UserError: There are fewer than two members or one twice, one was scored on other pairs or labels than the
            first, or the output folder cannot be written.
    """
    import numpy as np

    from recipes.evaluate.metrics import evaluate_predictions, to_arrays
    from recipes.evaluate.report import plot_confusion
    from recipes.evaluate.significance import intervals

    files = [path / PREDICTIONS_FILE if path.is_dir() else path for path in map(Path, predictions)]
    if len(files) < 2 or len({file.resolve() for file in files}) < len(files):
        raise UserError(f"predictions: expected two members or more, each once; got {', '.join(map(str, files))}.")
    facts = [_facts(file) for file in files]
    labels = labels or facts[0].get("arguments", {}).get("labels")
    if labels is None:
        raise UserError(f"{files[0]}: no metrics.json beside it says what its label schema is; pass --labels.")
    schema = load_labels(labels)
    # Beside each other, before anything is written: rows in the order of the first member.
    tables = read_aligned([Run("member", number, file) for number, file in enumerate(files)], schema)
    members = [to_arrays(table, schema, str(file))[2] for table, file in zip(tables, files, strict=True)]
    output = make_folder(output)

    probabilities = np.mean(members, axis=0).astype(np.float32)  # (rows, classes)
    averaged = tables[0][["pair_id", "query", "locale", "label"]].assign(
        predicted_label=[schema.names[index] for index in probabilities.argmax(axis=1)],
        probabilities=list(probabilities),
    )
    metrics = evaluate_predictions(averaged, schema, str(output))
    metrics["intervals"] = intervals(averaged, schema)
    seconds = [fact.get("wall_seconds") for fact in facts]
    total = None if None in seconds else round(sum(seconds), 2)
    metrics["facts"] = {
        "model": f"average of {len(files)} members",
        "revision": None,
        "weights_sha256": None,
        "members": [
            {"predictions": str(file), "sha256": sha256(file)}
            | {name: fact.get(name) for name in ("model", "weights_sha256", "seed")}
            for file, fact in zip(files, facts, strict=True)
        ],
        "seed": _shared(facts, "seed"),
        **{name: _shared(facts, name) for name in ("pairs", "pairs_sha256", "split")},
        "rows": len(averaged),
        "queries": metrics["overall"]["queries"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": total,  # of the members together: all of them have to be asked
        "pairs_per_second": round(len(averaged) / total, 1) if total else None,
        "environment": environment(),
        "arguments": {"predictions": [str(file) for file in files], "output": str(output), "labels": labels},
    }
    try:
        write(averaged, output / PREDICTIONS_FILE, PREDICTIONS)
        plot_confusion(metrics, output / "confusion.png")
        write_json(output / "metrics.json", metrics)
    except OSError as error:
        raise UserError(f"{output}: could not be written ({error}). Free space or choose another --output.") from None
    return metrics


def _facts(predictions: Path) -> dict[str, Any]:
    """Return what recipes.evaluate.run recorded beside a file of predictions, nothing where it did not."""
    record = predictions.with_name("metrics.json")
    return json.loads(record.read_text(encoding="utf-8")).get("facts", {}) if record.is_file() else {}


def _shared(facts: Sequence[dict[str, Any]], name: str) -> Any:
    """Return the fact that all members have in common, None if they do not."""
    first = facts[0].get(name)
    return first if all(fact.get(name) == first for fact in facts) else None


def main() -> None:
    """Average from the command line."""
    arguments = parse(EnsembleArguments, __doc__)
    from recipes.evaluate.report import format_metrics

    print(format_metrics(average(arguments.predictions, arguments.output, arguments.labels)))
    output = arguments.output
    print(f"\nWrote {output}/predictions.parquet, metrics.json and confusion.png.")
    print(f"Next: python -m recipes.evaluate.compare --runs THIS={output} OTHER=DIR --baseline OTHER --output DIR")


if __name__ == "__main__":
    run(main)
