"""Measure a teacher's completions against the gold labels: each perspective, their oracle, their vote.

    python -m recipes.teacher.evaluate --config recipes/configs/teacher/evaluate_esci.yaml \
        --completions completions.parquet --output runs/esci/teacher
    python -m recipes.teacher.evaluate --pairs runs/bazaar --completions runs/bazaar/completions.parquet \
        --labels aliexpress6 --output runs/bazaar/teacher
    python -m recipes.teacher.evaluate --pairs runs/esci/pairs --completions runs/esci/tuned.parquet \
        --adapter runs/esci/teacher_dpo --output runs/esci/teacher_dpo/evaluation

Reads one split of pairs and any number of files of completions; writes metrics.json, table.md and perspectives.png.
What is measured, and what one sample a perspective does not allow, stands in metrics.json (`conventions`, `undefined`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import environment, sha256, write_json
from recipes.schemas import PERSPECTIVES, load_labels, make_folder, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

    from recipes.schemas import LabelSchema


@dataclass
class EvaluateArguments:
    """Options of `recipes.teacher.evaluate`."""

    pairs: str = field(metadata={"help": "Folder of pairs, one parquet a split."})
    completions: list[str] = field(metadata={"help": "Completions (parquet); several files are joined."})
    output: str = field(metadata={"help": "Folder to write metrics.json, table.md and perspectives.png to."})
    split: str = field(default="test", metadata={"help": "Which file of the pairs folder."})
    labels: str = field(default="esci", metadata={"help": "Label schema: a name in recipes/labels/, or a YAML file."})
    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder of the LoRA adapter that wrote the completions: its digest is recorded, and its card "
                          "shows only what was measured of it."},
    )  # fmt: skip
    missing: Literal["error", "drop"] = field(
        default="error",
        metadata={"help": "Pairs that some perspective has no completion of: stop, or leave them out and say so."},
    )
    draws: int = field(default=10_000, metadata={"help": "Bootstrap draws of queries."})
    seed: int = field(default=0, metadata={"help": "Of the bootstrap."})


def evaluate(arguments: EvaluateArguments) -> dict[str, Any]:
    """Read, align, measure and write; return what metrics.json holds.

    Raises:
        UserError: A file breaks its contract, no completion belongs to the pairs, or pairs lack completions.
    """
    from tqdm import tqdm

    from recipes.rationales.build import read_completions
    from recipes.teacher.measures import CONVENTIONS
    from recipes.teacher.pilot import evaluate_answers
    from recipes.teacher.report import plot, table

    if arguments.draws < 1:
        raise UserError(f"--draws {arguments.draws}: expected at least 1.")
    adapter = None if arguments.adapter is None else Path(arguments.adapter, "adapter_model.safetensors")
    if adapter is not None and not adapter.is_file():
        raise UserError(f"{adapter}: no such file. Pass --adapter the folder that recipes.teacher.sft or dpo wrote.")
    schema = load_labels(arguments.labels)
    pairs_file = Path(arguments.pairs, f"{arguments.split}.parquet")
    pairs = read_pairs(arguments.pairs, [arguments.split])[arguments.split]
    if pairs.empty:
        raise UserError(f"{pairs_file}: no rows. Choose another split, or make the pairs again.")
    pairs["label"] = schema.canonical_column(pairs["label"], pairs_file)
    completions = read_completions(arguments.completions, schema)
    pairs, completions = _align(pairs, completions, arguments)
    answers = to_answers(pairs, completions, schema)
    output = make_folder(arguments.output)

    slices: dict[str, Any] = {}
    locales = pairs["locale"].to_numpy()
    for name in tqdm(["overall", *sorted(set(locales))], desc="Bootstrap", unit="slice", delay=2):
        rows = (locales == name) | (name == "overall")
        part = pairs[rows]
        slices[name] = evaluate_answers(
            {perspective: values[:, rows] for perspective, values in answers.items()},
            part["label"].map(schema.label2id).to_numpy("int64"),
            part.groupby(["locale", "query"], sort=False).ngroup().to_numpy(),
            schema,
            arguments.draws,
            arguments.seed,
        )
    metrics = {
        "schema": schema.name,
        "labels": schema.names,
        "conventions": CONVENTIONS,
        "parse_errors": _parse_errors(completions),
        "overall": slices.pop("overall"),
        "locales": slices,
        "facts": {
            "pairs": str(pairs_file),
            "pairs_sha256": sha256(pairs_file),
            "completions": {file: sha256(file) for file in arguments.completions},
            "adapter_sha256": None if adapter is None else sha256(adapter),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "environment": environment(),
            "arguments": to_dict(arguments),
        },
    }
    (output / "table.md").write_text(table(metrics), encoding="utf-8")
    plot(metrics, output / "perspectives.png")
    write_json(output / "metrics.json", metrics)
    return metrics


def _align(
    pairs: pd.DataFrame, completions: pd.DataFrame, arguments: EvaluateArguments
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep the pairs that every perspective has completions of, and their completions."""
    files = ", ".join(arguments.completions)
    completions = completions[completions["pair_id"].isin(pairs["pair_id"])]
    if completions.empty:
        raise UserError(
            f"{files}: no completion has a pair_id of {arguments.pairs} ({arguments.split}), such as "
            f"{pairs['pair_id'].iloc[0]!r}. Were they made from other pairs, or another split?"
        )
    found = completions.groupby("perspective")["pair_id"].nunique()
    if (found < len(pairs)).any():
        perspectives = completions.groupby("pair_id")["perspective"].nunique()
        # Filled, or a pair without any completion would be neither equal nor unequal: pandas' NA.
        has = pairs["pair_id"].map(perspectives).fillna(0) == len(found)
        counts = ", ".join(f"{name} {number:,}" for name, number in found.items())
        message = (
            f"{files}: {int((~has).sum()):,} of {len(pairs):,} pairs lack a completion of some perspective, the first "
            f"being {pairs['pair_id'][~has].iloc[0]!r}; pairs by perspective: {counts}."
        )
        if arguments.missing == "error":
            raise UserError(f"{message} Finish recipes.teacher.generate, or pass --missing drop.")
        if not has.any():
            raise UserError(f"{message} None is left; evaluate the perspectives one by one.")
        print(f"left out: {message}")
        pairs = pairs[has].reset_index(drop=True)
        completions = completions[completions["pair_id"].isin(pairs["pair_id"])]
    return pairs, completions


def to_answers(pairs: pd.DataFrame, completions: pd.DataFrame, schema: LabelSchema) -> dict[str, NDArray[np.int64]]:
    """Lay out class indices `(samples, pairs)` by perspective; unread answers are one class more than the schema has.

    Where pairs have different numbers of samples, the first ones of each are taken, as many as the poorest pair has.
    """
    import numpy as np

    order = [name for name in (*PERSPECTIVES, "unified") if (completions["perspective"] == name).any()]
    order += sorted(set(completions["perspective"]) - set(order))
    row_of = {pair_id: row for row, pair_id in enumerate(pairs["pair_id"])}
    answers = {}
    for name in order:
        part = completions[completions["perspective"] == name].sort_values(["pair_id", "sample_index"])
        rank = part.groupby("pair_id").cumcount()
        samples = int(part.groupby("pair_id").size().min())
        part, rank = part[rank < samples], rank[rank < samples]
        values = np.full((samples, len(pairs)), len(schema.names), dtype=np.int64)
        label = part["predicted_label"].map(schema.label2id).fillna(len(schema.names)).astype(np.int64)
        values[rank.to_numpy(), part["pair_id"].map(row_of).to_numpy()] = label.to_numpy()
        answers[name] = values
    return answers


def _parse_errors(completions: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Count unread answers by perspective and reason code; files of other tools may give no reason."""
    from recipes.teacher.parse import reason_code

    unread = completions[completions["predicted_label"].isna()]
    codes = unread["parse_error"].map(lambda error: reason_code(error) if isinstance(error, str) else "no reason given")
    return {name: part.value_counts().to_dict() for name, part in codes.groupby(unread["perspective"])}


def main() -> None:
    """Evaluate from the command line."""
    arguments = parse(EvaluateArguments, __doc__)
    from recipes.teacher.report import table

    print(table(evaluate(arguments)))
    output = arguments.output
    print(f"Wrote {output}/metrics.json, table.md and perspectives.png.")
    print(
        f"Next: python -m recipes.rationales.build --pairs {arguments.pairs} --labels {arguments.labels} "
        f"--completions {' '.join(arguments.completions)} --output RATIONALES.parquet"
    )


if __name__ == "__main__":
    run(main)
