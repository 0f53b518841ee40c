"""Score pairs of one label schema with a student of another, both read in a third that they share.

    # The bazaar's student on ESCI, in ESCI's four classes
    python -m recipes.evaluate.transfer --model runs/demo/students/lrkd-gat-0 --model_labels aliexpress6 \
        --pairs runs/esci/pairs --labels esci --to esci --output runs/transfer/bazaar_on_esci
    # And back: ESCI's student on the bazaar, whose labels are read as ESCI's
    python -m recipes.evaluate.transfer --model runs/esci/bench/gat-0 --model_labels esci \
        --pairs runs/demo/bazaar --labels aliexpress6 --to esci --output runs/transfer/esci_on_bazaar

Which class stands for which is data: recipes/labels/transfer/FROM_to_TO.yaml, or the files of `--maps`. Probabilities
of classes that become one are added up, and the largest sum is the prediction. Writes predictions.parquet,
metrics.json and confusion.png in the schema `--to`, as recipes.evaluate.run does, for compare and slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.evaluate.predict import load, predict, schema_order
from recipes.record import environment, sha256, weights_sha256, write_json
from recipes.schemas import LABELS_FOLDER, PREDICTIONS, LabelSchema, load_labels, make_folder, read_pairs, write

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass
class TransferArguments:
    """Options of `recipes.evaluate.transfer`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub id of a sequence classifier."})
    model_labels: str = field(metadata={"help": "Label schema it was trained with."})
    pairs: str = field(metadata={"help": "Folder of pairs, one parquet file a split."})
    labels: str = field(metadata={"help": "Label schema of the pairs."})
    to: str = field(
        metadata={"help": "Schema that both are read in: a name in recipes/labels, or transfer/binary.yaml there."}
    )
    output: str = field(metadata={"help": "Folder to write predictions, metrics and the confusion matrix to."})
    maps: list[str] = field(
        default_factory=list, metadata={"help": "Mapping files to look through before recipes/labels/transfer/."}
    )
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder to score."})
    limit: int | None = field(default=None, metadata={"help": "Only the first so many pairs."})
    batch_size: int = field(default=64, metadata={"help": "Pairs a batch."})
    max_length: int = field(default=128, metadata={"help": "Tokens of query and title together."})
    device: str = field(default="auto", metadata={"help": "auto (cuda if there is one), cpu, cuda:1, mps."})


def read_map(one: LabelSchema, other: LabelSchema, files: list[str]) -> dict[str, str]:
    """Return class of `one` -> class of `other`; a schema stands for itself.

    Args:
        one: Whose classes are mapped.
        other: What they are mapped to.
        files: Mapping files to look through before `recipes/labels/transfer/ONE_to_OTHER.yaml`.

    Raises:
        UserError: There is no file for these two, or it leaves a class out or names one that is not there.
    """
    if one.name == other.name:
        return {name: name for name in one.names}
    default = LABELS_FOLDER / "transfer" / f"{one.name}_to_{other.name}.yaml"
    for path in (*map(Path, files), default):  # the files of --maps win
        if not path.is_file():
            raise UserError(
                f"{path}: no such file. It should say which class of {one.name!r} stands for which of {other.name!r}; "
                "copy recipes/labels/transfer/aliexpress6_to_esci.yaml and pass it with --maps."
            )
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or set(content) != {"from", "to", "map"}:
            raise UserError(f"{path}: expected the keys `from`, `to` and `map`.")
        if (content["from"], content["to"]) == (one.name, other.name):
            mapping = content["map"]
            break
    else:
        raise UserError(f"{default}: maps {content['from']!r} to {content['to']!r}, not what its name says.")
    canonical = {one.canonical(str(name)): name for name in mapping}
    if missing := [name for name in one.names if name not in canonical]:
        raise UserError(
            f"{path}: {missing[0]!r} of {one.name!r} is not mapped; say which class of {other.name!r} it is."
        )
    if None in canonical:
        raise UserError(f"{path}: {canonical[None]!r} is not a class of {one.name!r}: {', '.join(one.names)}.")
    result = {name: other.canonical(str(mapping[canonical[name]])) for name in one.names}
    if unknown := [name for name, target in result.items() if target is None]:
        target = mapping[canonical[unknown[0]]]
        raise UserError(f"{path}: {unknown[0]!r} is mapped to {target!r}, which is not in {other.name!r}.")
    return result


def merge(probabilities: NDArray[np.float32], mapping: Mapping[str, str], shared: LabelSchema) -> NDArray[np.float32]:
    """Add up the probabilities of classes that become one: `(pairs, classes)` -> `(pairs, shared classes)`.

    Args:
        probabilities: Columns in the order of `mapping`.
        mapping: Class -> class of `shared`.
        shared: The schema of the result.
    """
    import numpy as np

    adds = np.array([[target == name for name in shared.names] for target in mapping.values()], dtype=np.float32)
    return probabilities @ adds


def transfer(arguments: TransferArguments) -> dict[str, Any]:
    """Load, map, predict, measure and write; return what metrics.json holds.

    Raises:
        UserError: A schema or mapping is missing or incomplete, the pairs break their contract, or the model's classes
            are not those of its schema.
    """
    from recipes.evaluate.metrics import evaluate_predictions
    from recipes.evaluate.report import plot_confusion
    from recipes.evaluate.significance import intervals

    own, gold, shared = (load_labels(name) for name in (arguments.model_labels, arguments.labels, arguments.to))
    of_model, of_pairs = (read_map(schema, shared, arguments.maps) for schema in (own, gold))
    file = Path(arguments.pairs, f"{arguments.split}.parquet")
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split].head(arguments.limit)
    if pairs.empty:
        raise UserError(f"{file}: no rows. Choose another split, or make the pairs again.")
    pairs["label"] = gold.canonical_column(pairs["label"], file).map(of_pairs)
    model, tokenizer = load(arguments.model, own, device=arguments.device)
    output = make_folder(arguments.output)

    order = schema_order(model.config.id2label, own, arguments.model)
    probabilities = predict(model, tokenizer, pairs, arguments.batch_size, arguments.max_length)[:, order]
    probabilities = merge(probabilities, of_model, shared)
    predictions = pairs[["pair_id", "query", "locale", "label"]].assign(
        predicted_label=[shared.names[index] for index in probabilities.argmax(axis=1)],
        probabilities=list(probabilities),
    )
    metrics = evaluate_predictions(predictions, shared, arguments.model)
    metrics["intervals"] = intervals(predictions, shared)
    metrics["transfer"] = {"model": of_model, "pairs": of_pairs}
    metrics["facts"] = {
        "model": arguments.model,
        "weights_sha256": weights_sha256(arguments.model),
        "pairs_sha256": sha256(file),
        "command": command_line("recipes.evaluate.transfer", arguments),
        "environment": environment(),
        "arguments": to_dict(arguments),
    }
    write(predictions, output / "predictions.parquet", PREDICTIONS)
    plot_confusion(metrics, output / "confusion.png")
    write_json(output / "metrics.json", metrics)
    return metrics


def main() -> None:
    """Measure a transfer from the command line."""
    arguments = parse(TransferArguments, __doc__)
    from recipes.evaluate.report import format_metrics

    print(format_metrics(transfer(arguments)))
    output = arguments.output
    print(f"\nWrote {output}/predictions.parquet, metrics.json and confusion.png, in the classes of {arguments.to}.")
    print(f"Next: python -m recipes.evaluate.compare --runs THIS={output} OTHER=DIR --baseline OTHER --output DIR")


if __name__ == "__main__":
    run(main)
