"""The student and the pairs of the speed benches: yours, or a quick one on the bazaar, which needs no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.record import weights_sha256
from recipes.serve.export import ExportArguments, export
from recipes.serve.plan import EXPORT

if TYPE_CHECKING:
    import pandas as pd

TRAIN_ROWS = 1536  # enough for a macro-F1 that a broken form would lose
TOLERANCE = 2.0  # points of macro-F1
BAZAAR_SIZE = 10_000  # so that validation and test have a thousand pairs each


def quick_student(folder: Path) -> tuple[Path, Path]:
    """Train LRKD-GAT for an epoch on a small bazaar, or find it there; return student and pairs."""
    from recipes.arguments import build, read_yaml
    from recipes.data.bazaar import make_bazaar
    from recipes.schemas import PAIRS, SPLITS, write
    from recipes.student.distill import DistillArguments, distill

    pairs, student = folder / "bazaar", folder / "student"
    if not all((pairs / f"{split}.parquet").is_file() for split in SPLITS):
        tables = make_bazaar(BAZAAR_SIZE, locales=["en"])
        for split in SPLITS:
            frame = tables[split]
            if split == "train":
                frame = frame.sample(min(TRAIN_ROWS, len(frame)), random_state=0)
            write(frame, pairs / f"{split}.parquet", PAIRS)
    recipe = read_yaml(DistillArguments, "recipes/configs/student/bazaar_minilm.yaml")
    recipe.pop("rationales", None)
    # Speed does not depend on guidance.
    changes = {"pairs": str(pairs), "output": str(student), "epochs": 1, "reasoning_dim": 384, "guidance_weight": 0.0}
    distill(build(DistillArguments, {**recipe, **changes}, "quick student"))
    return student, pairs


def prepare(model: str | None, pairs: str | None, labels: str, folder: str) -> tuple[Path, Path]:
    """Return the folder of an exported student, made if it is not there, and the pairs to time it on.

    Args:
        model: Folder of a student; None trains a quick one, and then `pairs` and `labels` are its own.
        pairs: Folder of pairs, or one parquet file with `query` and `product_title`; needed with `model`.
        labels: Label schema of `pairs`.
        folder: Where what is made is kept; the next bench finds it there.

    Raises:
        UserError: `model` without `pairs` or the other way round, or the export fails.
    """
    if (model is None) != (pairs is None):
        raise UserError("--model and --pairs go together: the student, and pairs of its marketplace.")
    if model is None or pairs is None:
        student, source = quick_student(Path(folder))
        labels = "aliexpress6"
    else:
        student, source = Path(model), Path(pairs)
    output = Path(folder, f"exported-{(weights_sha256(student) or 'hub')[:12]}")
    if not (output / EXPORT).is_file():
        guarded = str(source) if source.is_dir() else None
        if guarded is None:
            raise UserError(f"--pairs {pairs}: pass a folder of pairs to export {model}; int8 is calibrated on them.")
        where = {"model": str(student), "output": str(output), "pairs": guarded}
        # Wider than what is served: each form's loss stands beside its speed, the peers' int8 included.
        export(ExportArguments(**where, labels=labels, guard_split="test", tolerance=TOLERANCE))
    return output, source


def exported_drop(folder: Path) -> dict[str, float]:
    """Return the loss of macro-F1 in points, by form, as the export's guard measured it."""
    forms = json.loads((folder / EXPORT).read_text(encoding="utf-8"))["forms"]
    return {form: values["drop_points"] for form, values in forms.items() if values}  # empty: not guarded


def timed_pairs(source: Path, rows: int) -> pd.DataFrame:
    """Return the first `rows` pairs of the test split of a folder, or of a parquet or csv file.

    Raises:
        UserError: There is no such file, it has no rows, it lacks a column, or a cell holds no text.
    """
    import pandas as pd

    file = source / "test.parquet" if source.is_dir() else source
    if not file.is_file():
        raise UserError(f"{file}: no such file. Pass a folder of pairs, or a parquet or csv file of them.")
    try:
        frame = pd.read_csv(file) if file.suffix == ".csv" else pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable ({' '.join(str(error).split())}).") from None
    for column in ("query", "product_title"):
        if column not in frame:
            raise UserError(f"{file}: column {column!r} is missing; found {', '.join(map(str, frame))}.")
    if frame.empty:
        raise UserError(f"{file}: no rows. Pass pairs to score.")
    frame = frame.head(rows)
    for column in ("query", "product_title"):
        for row, text in enumerate(frame[column]):
            if not isinstance(text, str):
                raise UserError(f"{file}: row {row}, column {column!r}: is {text!r}; expected text. Correct it.")
    return frame
