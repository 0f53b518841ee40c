"""Score one split with a checkpoint, ours or any other sequence classifier, and measure the predictions.

    python -m recipes.evaluate.run --config recipes/configs/evaluate/esci.yaml --model runs/esci/gat --output runs/eval
    python -m recipes.evaluate.run --model ORG/NAME --revision COMMIT --trust_remote_code True \
        --pairs data/pairs --split test --labels esci --output runs/eval --dtype bfloat16 --batch_size 256

Reads `<pairs>/<split>.parquet`; writes predictions.parquet, metrics.json and confusion.png into `--output`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.evaluate.predict import load, predict, schema_order
from recipes.record import environment, sha256, weights_sha256, write_json
from recipes.schemas import PREDICTIONS, load_labels, make_folder, read_pairs, write


@dataclass
class RunArguments:
    """Options of `recipes.evaluate.run`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub id of a sequence classifier."})
    pairs: str = field(metadata={"help": "Folder of pairs, one parquet file a split."})
    output: str = field(metadata={"help": "Folder to write predictions, metrics and the confusion matrix to."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder to score."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code that the checkpoint brings."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of query and title together (None: the checkpoint's own, 512 at most)."}
    )
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Precision of the model."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})


def evaluate(arguments: RunArguments) -> dict[str, Any]:
    """Load, check, predict, measure and write; return what metrics.json holds.

    Raises:
        UserError: The pairs break their contract, the model's classes are not those of the schema, or the output
            folder cannot be written.
    """
    from recipes.evaluate.metrics import evaluate_predictions
    from recipes.evaluate.report import plot_confusion
    from recipes.evaluate.significance import intervals

    for option, value in (("batch_size", arguments.batch_size), ("max_length", arguments.max_length)):
        if value is not None and value < 1:
            raise UserError(f"--{option} {value}: expected at least 1.")
    schema = load_labels(arguments.labels)
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    pairs_file = Path(arguments.pairs, f"{arguments.split}.parquet")
    if pairs.empty:
        raise UserError(f"{pairs_file}: no rows. Choose another split, or make the pairs again.")
    pairs["label"] = schema.canonical_column(pairs["label"], pairs_file)
    model, tokenizer = load(
        arguments.model,
        schema,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    max_length = arguments.max_length or min(tokenizer.model_max_length, 512)
    if max_length > tokenizer.model_max_length:
        raise UserError(
            f"--max_length {max_length}: {arguments.model} takes at most {tokenizer.model_max_length} tokens."
        )
    output = make_folder(Path(arguments.output))

    start = time.perf_counter()
    logits_of_schema = schema_order(model.config.id2label, schema, arguments.model)
    probabilities = predict(model, tokenizer, pairs, arguments.batch_size, max_length)[:, logits_of_schema]
    seconds = time.perf_counter() - start

    predictions = pairs[["pair_id", "query", "locale", "label"]].assign(
        predicted_label=[schema.names[index] for index in probabilities.argmax(axis=1)],
        probabilities=list(probabilities),
    )
    metrics = evaluate_predictions(predictions, schema, arguments.model)
    metrics["intervals"] = intervals(predictions, schema)
    metrics["facts"] = {
        "model": arguments.model,
        "revision": None if Path(arguments.model).is_dir() else model.config._commit_hash,
        "weights_sha256": weights_sha256(arguments.model),  # which student of that name it was
        "seed": training_seed(arguments.model),
        "pairs": str(pairs_file),
        "pairs_sha256": sha256(pairs_file),
        "split": arguments.split,
        "rows": len(predictions),
        "queries": metrics["overall"]["queries"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": round(seconds, 2),
        "pairs_per_second": round(len(predictions) / seconds, 1),
        "environment": environment(),
        "arguments": to_dict(arguments),
    }
    try:
        write(predictions, output / "predictions.parquet", PREDICTIONS)
        plot_confusion(metrics, output / "confusion.png")
        write_json(output / "metrics.json", metrics)
    except OSError as error:
        raise UserError(f"{output}: could not be written ({error}). Free space or choose another --output.") from None
    return metrics


def training_seed(model: str) -> int | None:
    """Return the seed in the training record of a checkpoint folder, None where there is none."""
    record = Path(model, "training.json")
    return json.loads(record.read_text(encoding="utf-8"))["arguments"]["seed"] if record.is_file() else None


def main() -> None:
    """Evaluate from the command line."""
    arguments = parse(RunArguments, __doc__)
    from recipes.evaluate.report import format_metrics

    print(format_metrics(evaluate(arguments)))
    output = arguments.output
    print(f"\nWrote {output}/predictions.parquet, metrics.json and confusion.png.")
    print(f"Next: python -m recipes.evaluate.compare --runs THIS={output} OTHER=DIR --baseline OTHER --output DIR")


if __name__ == "__main__":
    run(main)
