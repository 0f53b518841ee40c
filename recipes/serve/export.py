"""Export a student to ONNX and to int8, and keep only what scores as well as the plain model.

    python -m recipes.serve.export --model runs/demo/students/lrkd-gat-0 --pairs runs/demo/bazaar \
        --labels aliexpress6 --output runs/demo/exported
    python -m recipes.serve.export --model runs/demo/students/lrkd-gat-0 --output runs/demo/exported

The first writes the student, `onnx/model.onnx` (outputs: logits, latent_reasoning, and with a latent for each
perspective perspective_weights, in the order of `perspectives` in config.json; any batch and length),
`onnx/model_int8.onnx` and `openvino/openvino_model_int8.xml`, calibrated on `--calibration_split`. On `--guard_split`
each form's macro-F1 is held against the plain model's: a drop of more than `--tolerance` points is an error, and
nothing is written. A form whose precision this CPU does not multiply could not be held against anything: it is left
out, and named. The second, without pairs, exports float32 alone. `recipes.serve.scorer` serves the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import environment, weights_sha256, write_json
from recipes.schemas import load_labels, make_folder, read_pairs
from recipes.serve.graphs import quantise_onnx, quantise_openvino, save_float32
from recipes.serve.plan import EXPORT, FILES, cpu_flags, multiplied

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.schemas import LabelSchema
    from recipes.serve.scorer import Scorer


@dataclass
class ExportArguments:
    """Options of an export."""

    model: str = field(metadata={"help": "Folder of a student."})
    output: str = field(metadata={"help": "Folder to write to; an export that is there is replaced."})
    pairs: str | None = field(default=None, metadata={"help": "Folder of pairs, to calibrate int8 and to guard it."})
    labels: str = field(default="esci", metadata={"help": "Label schema of the pairs."})
    calibration_split: Literal["train", "validation"] = field(default="train", metadata={"help": "Calibrates int8."})
    calibration_size: int = field(default=512, metadata={"help": "Pairs of it that are used."})
    guard_split: Literal["validation", "test"] = field(default="validation", metadata={"help": "Holds the forms."})
    tolerance: float = field(default=0.3, metadata={"help": "Largest loss of macro-F1, in points (0 to 100)."})
    leave_out: bool = field(
        default=False, metadata={"help": "A form that loses more is left out and named; without it the export fails."}
    )
    seed: int = field(default=0, metadata={"help": "Of the choice of calibration pairs."})


def export(arguments: ExportArguments) -> dict[str, Any]:
    """Export, quantise, guard; return what export.json holds.

    Raises:
        UserError: The folder holds no student, the pairs are not there, an output differs from the plain forward, or
            a form loses more macro-F1 than allowed.
    """
    from recipes.serve.scorer import Scorer

    schema = load_labels(arguments.labels)
    calibration, guard = read_splits(arguments, schema)
    output = Path(arguments.output)
    if output.resolve() == Path(arguments.model).resolve():
        raise UserError(f"--output {output}: is the student itself. Choose another folder.")
    if output.exists() and any(output.iterdir()) and not (output / EXPORT).is_file():
        raise UserError(f"--output {output}: holds something else than an export. Choose another folder.")
    require_libraries()
    plain = Scorer(arguments.model, "torch")  # says what is wrong with the folder
    if plain.config.model_type != "lrkd":  # loaded as a student, most of it would be random
        raise UserError(f"{arguments.model}: a plain {plain.config.model_type}, no LRKD student. Train one around it.")
    partial = make_folder(output.parent) / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        print("Exporting to ONNX", flush=True)
        difference = save_float32(arguments.model, partial)
        forms = ["onnx-float32", "openvino-float32"]
        if calibration is not None:
            if "int8" in multiplied(cpu_flags()):
                batches = list(calibration_batches(plain, calibration))
                print(f"Quantising to int8 on {len(calibration)} pairs", flush=True)
                quantise_onnx(partial)
                quantise_openvino(partial, batches)
            forms += ["openvino-bfloat16", "onnx-int8", "openvino-int8"]
        record: dict[str, Any] = {"forms": {}, "largest_difference": difference, "tolerance": arguments.tolerance}
        # For the scorer, which is about to measure them.
        record["forms"] = {form: {} for form in forms}
        write_json(partial / EXPORT, record)
        if guard is not None:
            record["forms"], record["left_out"] = measure_forms(plain, partial, forms, guard, schema, arguments)
        record |= {
            "weights_sha256": weights_sha256(arguments.model),
            "arguments": to_dict(arguments),
            "environment": environment(),
        }
        write_json(partial / EXPORT, record)
        shutil.rmtree(output, ignore_errors=True)
        partial.replace(output)
    finally:
        plain.close()
        shutil.rmtree(partial, ignore_errors=True)
    return record


def read_splits(arguments: ExportArguments, schema: LabelSchema) -> tuple[pd.DataFrame | None, pd.DataFrame | None]:
    """Return the calibration pairs and the guard's, None without `--pairs`; checked before anything is made."""
    if arguments.calibration_size < 1:
        raise UserError(f"--calibration_size {arguments.calibration_size}: expected at least 1.")
    if arguments.pairs is None:
        return None, None
    splits = read_pairs(arguments.pairs, [arguments.calibration_split, arguments.guard_split])
    for split, frame in splits.items():
        file = Path(arguments.pairs, f"{split}.parquet")
        if frame.empty:
            raise UserError(f"{file}: no rows. Choose another split, or make the pairs again.")
        frame["label"] = schema.canonical_column(frame["label"], file)
    calibration = splits[arguments.calibration_split]
    calibration = calibration.sample(min(len(calibration), arguments.calibration_size), random_state=arguments.seed)
    return calibration, splits[arguments.guard_split]


def require_libraries() -> None:
    """Check that all libraries of the extra are there, before minutes of work."""
    import importlib.util

    for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: pip install -e '.[export]' -c constraints.txt")


def calibration_batches(scorer: Scorer, frame: pd.DataFrame) -> Iterator[dict[str, NDArray[np.int64]]]:
    """Yield the inputs of the calibration pairs as the scorer would batch them, little padding and all."""
    rows = list(zip(frame["query"], frame["product_title"], strict=True))
    for batch in scorer.prepare(rows):
        yield dict(batch.inputs)


def measure_forms(
    plain: Scorer,
    folder: Path,
    forms: list[str],
    guard: pd.DataFrame,
    schema: LabelSchema,
    arguments: ExportArguments,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return macro-F1 and its drop for each form, and why forms were left out.

    Raises:
        UserError: A form loses more than the tolerance, and is not to be left out.
    """
    from recipes.serve.scorer import Scorer

    reference = macro_f1(plain, guard, schema)
    able = multiplied(cpu_flags())
    measured: dict[str, Any] = {"torch-float32": {"macro_f1": reference, "drop_points": 0.0}}
    left_out = {}
    for form in forms:
        backend, precision = form.split("-")
        if precision not in able:
            left_out[form] = f"this CPU has no instructions for {precision}, so it could not be held against float32"
            print(f"{form} is left out: {left_out[form]}")
            continue
        with Scorer(folder, backend, precision=precision, max_length=plain.max_length) as scorer:  # type: ignore[arg-type]
            score = macro_f1(scorer, guard, schema)
        drop = 100 * (reference - score)
        if arguments.leave_out and not drop <= arguments.tolerance:
            left_out[form] = f"loses {drop:.2f} points of macro-F1; {arguments.tolerance} are allowed"
            print(f"{form} is left out: {left_out[form]}")
            if precision == "int8":  # the other forms share a file
                file = folder / FILES[form]
                for part in file.parent.glob(f"{file.stem}.*"):
                    part.unlink()
            continue
        measured[form] = {"macro_f1": score, "drop_points": drop}
    check_drops(measured, arguments.tolerance, len(guard))
    return measured, left_out


def check_drops(measured: dict[str, Any], tolerance: float, rows: int) -> None:
    """Refuse forms that lose too much.

    Raises:
        UserError: One does; says by how much.
    """
    for form, values in measured.items():
        if not values["drop_points"] <= tolerance:
            reference = 100 * measured["torch-float32"]["macro_f1"]
            raise UserError(
                f"{form}: macro-F1 falls from {reference:.2f} to {100 * values['macro_f1']:.2f} on {rows} pairs, by "
                f"{values['drop_points']:.2f} points; {tolerance} are allowed. Nothing was written. Calibrate on "
                "more or other pairs (--calibration_size, --seed), guard with more (on few, one pair is a point), or "
                "go on without it (--leave_out true)."
            )


def macro_f1(scorer: Scorer, frame: pd.DataFrame, schema: LabelSchema) -> float:
    """Return the macro-F1 (0 to 1) of a scorer over the classes that occur in `frame`."""
    import numpy as np
    from sklearn.metrics import f1_score

    from recipes.evaluate.predict import schema_order

    order = schema_order(dict(enumerate(scorer.labels)), schema, "the student")
    pairs = list(zip(frame["query"], frame["product_title"], strict=True))
    probabilities = np.stack(list(scorer.score(pairs, progress=True)))[:, order]
    gold = frame["label"].map(schema.label2id).to_numpy()
    return float(f1_score(gold, probabilities.argmax(axis=1), labels=np.unique(gold), average="macro", zero_division=0))


def main() -> None:
    """Export from the command line."""
    arguments = parse(ExportArguments, __doc__)
    record = export(arguments)
    for form, values in record["forms"].items():
        drop = (
            f"macro-F1 {100 * values['macro_f1']:.2f} (drop {values['drop_points']:.2f})" if values else "not guarded"
        )
        print(f"  {form:18} {drop}")
    print(f"Wrote {arguments.output}: the student, onnx/, openvino/ and {EXPORT}.")
    print(f"Next: python -m recipes.bench.latency --model {arguments.output}")


if __name__ == "__main__":
    run(main)
