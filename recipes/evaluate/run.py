"""Score one split with a checkpoint, ours or any other sequence classifier, and measure the predictions.

    python -m recipes.evaluate.run --config recipes/configs/evaluate/esci.yaml --model runs/esci/gat --output runs/eval
    python -m recipes.evaluate.run --model ORG/NAME --revision COMMIT --trust_remote_code True \
        --pairs data/pairs --split test --labels esci --output runs/eval --dtype bfloat16 --batch_size 256

Reads `<pairs>/<split>.parquet`; writes predictions.parquet, metrics.json and confusion.png into `--output`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.evaluate.predict import load, predict, schema_order


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
    max_length: int = field(default=128, metadata={"help": "Tokens of query and title together."})
    dtype: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "Precision of the model."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})


def main() -> None:
    """Load, check, predict, measure, write."""
    arguments = parse(RunArguments, __doc__)
    from recipes.evaluate.metrics import evaluate_predictions
    from recipes.evaluate.report import format_metrics, plot_confusion
    from recipes.schemas import PREDICTIONS, load_labels, read_pairs, write

    for option in ("batch_size", "max_length"):
        if to_dict(arguments)[option] < 1:
            raise UserError(f"--{option} {to_dict(arguments)[option]}: expected at least 1.")
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
    if arguments.max_length > tokenizer.model_max_length:
        raise UserError(
            f"--max_length {arguments.max_length}: {arguments.model} takes at most {tokenizer.model_max_length} tokens."
        )
    output = Path(arguments.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output}: not a folder that can be written to ({error}).") from None

    start = time.perf_counter()
    logits_of_schema = schema_order(model.config.id2label, schema, arguments.model)
    probabilities = predict(model, tokenizer, pairs, arguments.batch_size, arguments.max_length)[:, logits_of_schema]
    seconds = time.perf_counter() - start

    predictions = pairs[["pair_id", "query", "locale", "label"]].assign(
        predicted_label=[schema.names[index] for index in probabilities.argmax(axis=1)],
        probabilities=list(probabilities),
    )
    metrics = evaluate_predictions(predictions, schema, arguments.model)
    metrics["facts"] = {
        "model": arguments.model,
        "revision": None if Path(arguments.model).is_dir() else model.config._commit_hash,
        "seed": training_seed(arguments.model),
        "pairs": str(pairs_file),
        "pairs_sha256": hashlib.sha256(pairs_file.read_bytes()).hexdigest(),
        "split": arguments.split,
        "rows": len(predictions),
        "queries": metrics["overall"]["queries"],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "wall_seconds": round(seconds, 2),
        "pairs_per_second": round(len(predictions) / seconds, 1),
        "hardware": hardware(model.device.type),
        "versions": versions(),
        "arguments": to_dict(arguments),
    }
    try:
        write(predictions, output / "predictions.parquet", PREDICTIONS)
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        plot_confusion(metrics, output / "confusion.png")
    except OSError as error:
        raise UserError(
            f"{output}: could not be written to ({error}). Free space or choose another --output."
        ) from None
    print(format_metrics(metrics))
    print(f"\nWrote {output}/predictions.parquet, metrics.json and confusion.png.")
    print(f"Next: python -m recipes.evaluate.compare --runs THIS={output} OTHER=DIR --baseline OTHER --output DIR")


def training_seed(model: str) -> int | None:
    """Return `seed` of the training record `training.json` in a checkpoint folder, None where there is none."""
    record = Path(model, "training.json")
    return json.loads(record.read_text(encoding="utf-8")).get("seed") if record.is_file() else None


def hardware(device: str) -> str:
    """Name what the pairs were scored on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{device}: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    from importlib.metadata import version

    packages = ("torch", "transformers", "tokenizers", "scikit-learn", "ir-measures")
    return {"python": platform.python_version(), **{package: version(package) for package in packages}}


if __name__ == "__main__":
    run(main)
