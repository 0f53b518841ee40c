"""Decide by balanced error: a student whose rare classes are heard (logit adjustment, Menon et al., arXiv 2007.07314).

    python -m recipes.evaluate.adjust --model STUDENT --pairs runs/esci/pairs --labels esci --output ADJUSTED
    python -m recipes.evaluate.run --model ADJUSTED --pairs runs/esci/pairs --labels esci --output ADJUSTED/evaluation

A student trained by cross-entropy says p(class | pair), and the most probable class is the best guess for accuracy: a
class of 4 in 100 pairs is hardly ever it. Macro-F1 counts every class alike. With π the classes' shares of the
training pairs, p(class | pair) / π^τ renormalised is what the student would say were all classes equally frequent
(τ = 1): accuracy is given up, the rare classes are found. Nothing is trained: τ · log π is taken off the classifier's
bias, and the copy loads and serves as any student. Its probabilities are of that other world; calibrate it anew.

recipes.evaluate.compare and recipes.student.tables take `--logit_adjustment τ`, to compare systems decided like this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, command_line, parse, run
from recipes.record import sha256, weights_sha256
from recipes.schemas import LabelSchema, load_labels, make_folder, read_pairs
from recipes.student.saving import PERSPECTIVES, RECORD, save_student

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray


@dataclass
class AdjustArguments:
    """Options of `recipes.evaluate.adjust`."""

    model: str = field(metadata={"help": "Folder of the student; it stays as it is."})
    pairs: str = field(metadata={"help": "Folder of pairs; train.parquet gives the shares of the classes."})
    labels: str = field(metadata={"help": "Label schema: a name in recipes/labels or a YAML file."})
    output: str = field(metadata={"help": "New folder for the adjusted student."})
    tau: float = field(default=1.0, metadata={"help": "τ; 1: all classes alike, less: part of the way."})


def log_shares(pairs: str | Path, schema: LabelSchema) -> NDArray[np.float64]:
    """Return log π of the classes among the training pairs of a folder, `(classes,)`.

    Raises:
        UserError: The pairs break their contract, or a class has none.
    """
    import numpy as np

    file = Path(pairs, "train.parquet")
    labels = schema.canonical_column(read_pairs(pairs, ("train",))["train"]["label"], file)
    counts = labels.map(schema.label2id).value_counts().reindex(range(len(schema.names)), fill_value=0).to_numpy()
    if not counts.all():
        raise UserError(
            f"{file}: no pair of class {schema.names[int(counts.argmin())]!r}, whose share would be 0. Logit "
            "adjustment needs pairs of every class of the schema: take the class out of it, or do not adjust."
        )
    return np.log(counts / counts.sum())


def log_offsets(tau: float, pairs: str | Path, schema: LabelSchema) -> NDArray[np.float64]:
    """Return τ · log π, what is taken off the logits, `(classes,)`.

    Raises:
        UserError: τ is negative, or see `log_shares`.
    """
    if not 0 <= tau < float("inf"):
        raise UserError(f"τ {tau}: expected 0 or more, 1 being where all classes count alike.")
    return tau * log_shares(pairs, schema)


def adjust_predictions(
    predictions: pd.DataFrame, schema: LabelSchema, offsets: NDArray[np.float64], source: str = "predictions"
) -> pd.DataFrame:
    """Return predictions (contract `PREDICTIONS`) as if `offsets` had been taken off the logits.

    Args:
        predictions: Of any classifier.
        schema: Its classes.
        offsets: τ · log π, `(classes,)`.
        source: What an error calls the predictions.

    Raises:
        UserError: What they hold are no probabilities of these classes.
    """
    import numpy as np
    from scipy.special import softmax

    from recipes.evaluate.metrics import to_arrays

    _, _, probabilities = to_arrays(predictions, schema, source)
    smallest = np.finfo(np.float32).tiny  # what was rounded to 0 when it was written has some logarithm
    adjusted = softmax(np.log(np.maximum(probabilities, smallest)) - offsets, axis=1)
    names = np.array(schema.names)
    return predictions.assign(predicted_label=names[adjusted.argmax(axis=1)], probabilities=list(adjusted))


def adjust(arguments: AdjustArguments) -> dict[str, Any]:
    """Write the adjusted copy of a student, and return its training.json.

    Raises:
        UserError: τ is negative, the folder holds no student of these classes, a class has no training pair, or the
            output folder is not empty.
    """
    import torch
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer

    from modeling_lrkd import LRKDForSequenceClassification

    folder, output, schema = Path(arguments.model), Path(arguments.output), load_labels(arguments.labels)
    if not (folder / RECORD).is_file():
        raise UserError(
            f"--model {folder}: no {RECORD} there. Pass the folder of a student of recipes.student.distill."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is there already. Choose a new folder.")
    offsets = log_offsets(arguments.tau, arguments.pairs, schema)
    model = LRKDForSequenceClassification.from_pretrained(folder)
    if [model.config.id2label[index] for index in range(len(model.config.id2label))] != schema.names:
        raise UserError(
            f"{folder}/config.json: its classes are not those of {schema.name!r} in order. Pass its --labels."
        )
    with torch.no_grad():
        model.classifier.bias -= torch.from_numpy(offsets).to(model.classifier.bias)
    config = model.config  # what calibrate fitted belongs to the logits of before
    config.temperature, config.class_scales, config.class_biases, config.tier_thresholds = 1.0, None, None, None
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    record["logit_adjustment"] = {
        "tau": arguments.tau,
        "taken_off_logits": dict(zip(schema.names, offsets.round(6).tolist(), strict=True)),
        "of_weights_sha256": weights_sha256(folder),
        "train_sha256": sha256(Path(arguments.pairs, "train.parquet")),
        "command": command_line("recipes.evaluate.adjust", arguments),
    }
    perspectives = folder / PERSPECTIVES
    save_student(
        model,
        AutoTokenizer.from_pretrained(folder),
        record,
        make_folder(arguments.output),
        load_file(perspectives) if perspectives.is_file() else None,
    )
    return record


def main() -> None:
    """Adjust from the command line."""
    arguments = parse(AdjustArguments, __doc__)
    record = adjust(arguments)
    taken = record["logit_adjustment"]["taken_off_logits"]
    moved = ", ".join(f"{name} {-offset:+.2f}" for name, offset in taken.items())
    print(f"Added to the logits: {moved}.\nWrote {arguments.output}.")
    print(
        f"Next: python -m recipes.evaluate.run --model {arguments.output} --pairs {arguments.pairs} "
        f"--labels {arguments.labels} --output {arguments.output}/evaluation"
    )


if __name__ == "__main__":
    run(main)
