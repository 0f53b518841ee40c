"""Read what a published dataset is made of, and refuse it before anything is written if a row is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.data.bazaar_rules import STRUCTURES
from recipes.data.splits import overlap
from recipes.data.text import normalise
from recipes.schemas import COMPLETIONS, PAIRS, PERSPECTIVES, RATIONALES, SPLITS, LabelSchema, read, read_pairs

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

# What a rationale repeats of its pair.
REPEATED = ("query", "product_title", "locale", "label")


@dataclass(frozen=True)
class Source:
    """The checked inputs of a dataset, every table with its `split`.

    Attributes:
        pairs: Contract pairs, splits in their order, labels as class names.
        rationales: Contract rationales without the embeddings, with `rationale_index`: 0, 1, ... within a pair and
            perspective.
        vectors: One embedding a row of `rationales`, `(rationales, size)` in float32.
        completions: Contract completions of these pairs, with each pair's `label`.
        structures: Contract structures, or None.
    """

    pairs: pd.DataFrame
    rationales: pd.DataFrame
    vectors: np.ndarray
    completions: pd.DataFrame
    structures: pd.DataFrame | None


def read_source(
    pairs: Path, completions: list[str], rationales: list[str], structures: Path | None, labels: LabelSchema
) -> Source:
    """Read and check everything.

    Raises:
        UserError: A file is missing or breaks its contract, a split is empty, a query or title crosses splits, a
            label is outside the schema, or the files do not belong together.
    """
    judged = read_judged(pairs, labels)
    rows, vectors = read_rationales(rationales, judged, labels)
    made = read_completions(completions, judged, labels)
    _check_origin(rows, made, completions)
    rows["rationale_index"] = rows.groupby(["pair_id", "perspective"]).cumcount()
    return Source(judged, rows, vectors, made, read_structures(structures, judged) if structures else None)


def read_judged(folder: Path, labels: LabelSchema) -> pd.DataFrame:
    """Read pairs: no split empty, no pair, query or title in two of them.

    Raises:
        UserError: See above.
    """
    import pandas as pd

    splits = read_pairs(folder)
    for split, rows in splits.items():
        file = folder / f"{split}.parquet"
        if rows.empty:
            raise UserError(f"{file}: the split is empty; a published split has at least one pair.")
        rows["label"] = labels.canonical_column(rows["label"], file)
        for name in ("query", "product_title"):
            keys = {text: normalise(text) for text in rows[name].unique()}
            rows[f"{'query' if name == 'query' else 'title'}_key"] = rows[name].map(keys)
    _check_splits(folder, splits)
    joined = pd.concat([rows.assign(split=split) for split, rows in splits.items()], ignore_index=True)
    kept = [name for name in PAIRS.columns if name in joined]
    return joined[[*kept, "split"]]


def _check_splits(folder: Path, splits: Mapping[str, pd.DataFrame]) -> None:
    for position, one in enumerate(SPLITS):
        for other in SPLITS[position + 1 :]:
            shared = {
                "pair_id": splits[one]["pair_id"].isin(splits[other]["pair_id"]),
                **overlap(splits[one], splits[other]),
            }
            for name, mask in shared.items():
                if mask.any():
                    column = {"title": "product_title"}.get(name, name)
                    row = int(mask.to_numpy().argmax())
                    raise UserError(
                        f"{folder / one}.parquet: row {row}, column {column!r}: "
                        f"{splits[one][column].iloc[row]!r} is in {other} too ({int(mask.sum())} such rows); a "
                        "published dataset has no query and no title on both sides of a split. "
                        "recipes.data.prepare --leakage drop removes them."
                    )


def read_rationales(files: list[str], pairs: pd.DataFrame, labels: LabelSchema) -> tuple[pd.DataFrame, np.ndarray]:
    """Read rationales and their embeddings: of these pairs, agreeing with them, by one encoder.

    Returns:
        The rationales, with the `split` of their pair, and the embeddings, `(rationales, size)` in float32.

    Raises:
        UserError: See above, or a split has no rationale of one of the three perspectives.
    """
    import numpy as np
    import pandas as pd

    frames = []
    for file in files:
        frame = read(file, RATIONALES)
        for name in ("cot_embedding", "encoder", "encoder_revision"):
            if name not in frame or frame[name].isna().any():
                raise UserError(
                    f"{file}: column {name!r} is missing or has nulls; make it with recipes.rationales.embed."
                )
        for name in ("label", "predicted_label"):
            frame[name] = labels.canonical_column(frame[name].astype(object), file)
        _check_pairs(frame, pairs, file)
        frames.append(frame.assign(file=file))
    sizes = {file: len(frame["cot_embedding"].iloc[0]) for file, frame in zip(files, frames, strict=True) if len(frame)}
    if len(set(sizes.values())) > 1:
        raise UserError(f"cot_embedding has other sizes in other files: {sizes}. Embed them with one encoder.")
    rows = pd.concat(frames, ignore_index=True)
    encoders = rows[["encoder", "encoder_revision"]].drop_duplicates()
    if len(encoders) > 1:
        raise UserError(
            f"{', '.join(files)}: embeddings of several encoders: {encoders.to_dict('records')}. Embed all with one."
        )
    repeated = rows.duplicated(list(RATIONALES.key))
    if repeated.any():
        first = rows[repeated].iloc[0]
        raise UserError(
            f"{first['file']}: pair_id {first['pair_id']!r}, perspective {first['perspective']!r}: the rationale is in "
            "an earlier file too. Leave one file out."
        )
    rows["split"] = rows["pair_id"].map(pairs.set_index("pair_id")["split"])
    for split in SPLITS:
        for perspective in PERSPECTIVES:
            if not ((rows["split"] == split) & (rows["perspective"] == perspective)).any():
                raise UserError(
                    f"{', '.join(files)}: no {perspective} rationale of a {split} pair, so that split would be empty. "
                    f"Make them with recipes.rationales.build --splits {' '.join(SPLITS)} --keep all --target mean."
                )
    order = pd.Series(range(len(pairs)), index=pairs["pair_id"])
    rows = rows.assign(_place=rows["pair_id"].map(order)).sort_values("_place", kind="stable", ignore_index=True)
    vectors = np.stack(rows["cot_embedding"].to_numpy()).astype(np.float32, copy=False)
    return rows.drop(columns=["cot_embedding", "file", "_place"]), vectors


def _check_pairs(rationales: pd.DataFrame, pairs: pd.DataFrame, file: str) -> None:
    """Refuse a rationale of an unknown perspective or pair, or one that says something else of its pair."""

    def refuse(row: int, column: str, why: str) -> UserError:
        return UserError(f"{file}: row {row}, column {column!r}: {rationales[column].iloc[row]!r} {why}")

    other = ~rationales["perspective"].isin(PERSPECTIVES)
    if other.any():
        raise refuse(int(other.to_numpy().argmax()), "perspective", f"is not one of {', '.join(PERSPECTIVES)}.")
    stranger = ~rationales["pair_id"].isin(pairs["pair_id"])
    if stranger.any():
        raise refuse(
            int(stranger.to_numpy().argmax()), "pair_id", "is not among the pairs. Give the ones it was made of."
        )
    of_pair = pairs.set_index("pair_id").loc[rationales["pair_id"]]
    for name in REPEATED:
        differs = rationales[name].to_numpy() != of_pair[name].to_numpy()
        if differs.any():
            row = int(differs.argmax())
            raise refuse(
                row, name, f"is {of_pair[name].iloc[row]!r} in the pairs. Make the rationales from these pairs."
            )


def read_completions(files: list[str], pairs: pd.DataFrame, labels: LabelSchema) -> pd.DataFrame:
    """Read the completions of these pairs, which say who the teacher is.

    Raises:
        UserError: The contract is broken, a label is outside the schema, the model is not recorded, or no pair has a
            completion from all three perspectives.
    """
    import pandas as pd

    frames = []
    for file in files:
        frame = read(file, COMPLETIONS)
        if "model" not in frame or frame["model"].isna().any():
            raise UserError(f"{file}: column 'model' is missing or has nulls: the card has to name the teacher.")
        frame["predicted_label"] = labels.canonical_column(frame["predicted_label"].astype(object), file)
        frames.append(frame)
    rows = pd.concat(frames, ignore_index=True)
    rows = rows[rows["perspective"].isin(PERSPECTIVES)].merge(pairs[["pair_id", "label", "split"]], on="pair_id")
    if not (rows.groupby("pair_id")["perspective"].nunique() == len(PERSPECTIVES)).any():
        raise UserError(f"{', '.join(files)}: no pair has completions from {', '.join(PERSPECTIVES)}.")
    return rows.sort_values(["pair_id", "perspective", "sample_index"], ignore_index=True)


def _check_origin(rationales: pd.DataFrame, completions: pd.DataFrame, files: list[str]) -> None:
    """Each rationale's verdict has to be one that the teacher gave."""
    given = set(_verdicts(completions))
    for row in _verdicts(rationales):
        if row not in given:
            raise UserError(
                f"pair_id {row[0]!r}, perspective {row[1]!r}: a rationale predicts {row[2]!r}, which no completion of "
                f"{', '.join(files)} does. Give the completions that the rationales were made of."
            )


def _verdicts(rows: pd.DataFrame) -> list[tuple[str, str, str]]:
    verdicts = rows["predicted_label"].astype(object).where(rows["predicted_label"].notna(), "")
    return list(zip(rows["pair_id"], rows["perspective"], verdicts, strict=True))


def read_structures(file: Path, pairs: pd.DataFrame) -> pd.DataFrame:
    """Read the structures behind a bazaar: one row a pair, in the order of the pairs.

    Raises:
        UserError: The contract is broken, or pairs or splits differ.
    """
    structures = read(file, STRUCTURES)
    splits = pairs.set_index("pair_id")["split"]
    wrong = structures["pair_id"].map(splits).to_numpy() != structures["split"].to_numpy()
    if wrong.any():
        row = int(wrong.argmax())
        raise UserError(
            f"{file}: row {row}: pair_id {structures['pair_id'].iloc[row]!r} is not in {structures['split'].iloc[row]} "
            "of the pairs. Give the structures that were made with them."
        )
    missing = ~pairs["pair_id"].isin(structures["pair_id"])
    if missing.any():
        raise UserError(f"{file}: no row of pair_id {pairs['pair_id'][missing].iloc[0]!r}; expected one a pair.")
    return structures.set_index("pair_id").loc[pairs["pair_id"]].reset_index()
