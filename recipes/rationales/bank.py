"""Build the rationale bank of a student: explanations by retrieval, without a language model at inference.

    python -m recipes.rationales.bank --model runs/esci/bench/gat-0 --rationales runs/esci/rationales_embedded.parquet
    python -m recipes.rationales.bank --model STUDENT --rationales MORE.parquet --trained_on EMBEDDED.parquet

Reads: a student's folder, and the embedded rationales that it was trained with; others, embedded by the same encoder,
with `--trained_on`. Writes rationale_bank.safetensors and rationale_bank.txt into the student's folder, bound to its
weights: another model refuses them. Rationales that a teacher left without a verdict are left out; of those that say
the same (`--near_duplicate`) in one perspective for one verdict, the first stays.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError, parse, run
from recipes.record import sha256
from recipes.schemas import RATIONALES, make_folder, read
from recipes.student.saving import update_code

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from modeling_lrkd.bank_lrkd import RationaleBank

ENTRIES_A_CELL = 45  # at 33,000 entries a perspective the search then reads as much of the centres as of the cells
BLOCK = 2048


@dataclass
class BankArguments:
    """Options of `recipes.rationales.bank`."""

    model: str = field(metadata={"help": "Folder of a student; the bank is written into it."})
    rationales: str = field(metadata={"help": "Embedded rationales (parquet) that the bank is to hold."})
    trained_on: str | None = field(
        default=None, metadata={"help": "Embedded rationales of the training, where the bank is to hold others."}
    )
    near_duplicate: float = field(
        default=0.98, metadata={"help": "Cosine of two rationales that say the same; above 1: only the same text."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the cells."})


def build(arguments: BankArguments) -> dict[str, Any]:
    """Check, deduplicate, find the cells and write.

    Returns:
        `entries`, `read`, `without_verdict`, `same_text`, `near_duplicates`, `cells`, `perspectives` (name ->
        entries), `bytes` (file -> size), `code` (modules brought up to date).

    Raises:
        UserError: No student with latent reasoning is there; the rationales are not embedded, by another encoder than
            those of its training, of another size, or none is left.
    """
    from modeling_lrkd.bank_lrkd import BANK_FILE, TEXTS_FILE

    if not 0 < arguments.near_duplicate <= 2:
        raise UserError(f"--near_duplicate {arguments.near_duplicate}: expected a cosine above 0 (above 1: off).")
    folder = make_folder(arguments.model) if Path(arguments.model).is_dir() else Path(arguments.model)
    config = read_student(folder)
    rationales = read_embedded(arguments.rationales)
    check_encoder(folder, rationales, arguments)
    size = len(rationales["cot_embedding"].iloc[0]) if len(rationales) else config["reasoning_dim"]
    if size != config["reasoning_dim"]:
        raise UserError(
            f"{arguments.rationales}: embeddings of {size} numbers; the reasoning_dim of {folder} is "
            f"{config['reasoning_dim']}. Embed them with the encoder that the student was trained with."
        )
    kept, record = select(rationales, arguments.near_duplicate)
    if kept.empty:
        raise UserError(f"{arguments.rationales}: no rationale with a verdict, so the bank would be empty.")
    partial = folder / ".bank"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        bank = make_bank(kept, partial / "lines.txt", arguments.seed)
        bank.save(partial, folder / "model.safetensors")
        for name in (TEXTS_FILE, BANK_FILE):
            (partial / name).replace(folder / name)
        changed = update_code(folder)
    except OSError as error:
        raise UserError(f"{folder}: could not be written ({error}). Free some space and run it again.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "entries": len(bank),
        **record,
        "code": changed,
        "cells": len(bank.centroids),
        "perspectives": kept["perspective"].value_counts().sort_index().to_dict(),
        "bytes": {name: (folder / name).stat().st_size for name in (BANK_FILE, TEXTS_FILE)},
    }


def read_student(folder: Path) -> dict[str, Any]:
    """Return the configuration of a student that has latent reasoning, its weights in one file.

    Raises:
        UserError: There is none.
    """
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        raise UserError(f"--model {folder}: no config.json with model.safetensors there. Pass a student's folder.")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "lrkd" or config["extractor_type"] == "none":
        raise UserError(f"--model {folder}: has no latent reasoning (extractor_type none), so it finds no rationale.")
    return config


def read_embedded(path: str) -> pd.DataFrame:
    """Read rationales with their embeddings.

    Raises:
        UserError: They are not embedded, or by several encoders.
    """
    rationales = read(path, RATIONALES)
    if missing := [name for name in ("cot_embedding", "encoder", "encoder_revision") if name not in rationales]:
        raise UserError(f"{path}: no column {missing[0]!r}; run recipes.rationales.embed on it first.")
    if len(encoders := rationales[["encoder", "encoder_revision"]].drop_duplicates()) > 1:
        raise UserError(f"{path}: embedded by {len(encoders)} encoders; run recipes.rationales.embed on all of it.")
    return rationales


def check_encoder(folder: Path, rationales: pd.DataFrame, arguments: BankArguments) -> None:
    """Refuse embeddings that do not lie in the space that the student's latent was drawn to.

    Raises:
        UserError: They are not those of its training, and by `--trained_on` neither by the same encoder.
    """
    record = folder / "training.json"
    if not record.is_file():
        raise UserError(f"{record}: no such file; without it nobody knows which embeddings guided the student.")
    guided_by = json.loads(record.read_text(encoding="utf-8"))["data_sha256"].get("rationales")
    if guided_by is None:
        raise UserError(f"{folder}: was trained without rationales, so its latent lies nowhere among them.")
    trained_on = arguments.trained_on or arguments.rationales
    if sha256(trained_on) != guided_by:
        raise UserError(
            f"{trained_on}: not the rationales that guided {folder} (sha256 {guided_by[:12]}...), so they may be of "
            "another encoder. Pass those with --trained_on; these may differ if the encoder is the same."
        )
    if arguments.trained_on is not None and len(rationales):
        known, given = (
            tuple(frame[["encoder", "encoder_revision"]].iloc[0])
            for frame in (read_embedded(arguments.trained_on), rationales)
        )
        if known != given:
            raise UserError(
                f"{arguments.rationales}: embedded by {' '.join(given)}; the student was guided by embeddings of "
                f"{' '.join(known)}. Embed them with that one."
            )


def select(rationales: pd.DataFrame, near_duplicate: float) -> tuple[pd.DataFrame, dict[str, int]]:
    """Keep what has a verdict, once; say what was left out."""
    import numpy as np
    from tqdm import tqdm

    with_verdict = rationales[rationales["predicted_label"].notna()]
    line = with_verdict["rationale"].str.split().str.join(" ")
    with_verdict = with_verdict.assign(rationale=line)
    keys = with_verdict.assign(folded=line.str.casefold())[["perspective", "predicted_label", "folded"]]
    distinct = with_verdict[~keys.duplicated()].sort_values(["perspective", "predicted_label"], kind="stable")
    keep = np.ones(len(distinct), dtype=bool)
    if near_duplicate <= 1:
        groups = distinct.groupby(["perspective", "predicted_label"], sort=False).indices
        with tqdm(total=len(distinct), desc="Duplicates", unit="rationale", disable=len(distinct) < 20_000) as bar:
            for rows in groups.values():
                units = _units(np.stack(distinct["cot_embedding"].to_numpy()[rows]))
                keep[rows] = distinct_rows(units, near_duplicate, bar.update)
    return distinct[keep], {
        "read": len(rationales),
        "without_verdict": len(rationales) - len(with_verdict),
        "same_text": len(with_verdict) - len(distinct),
        "near_duplicates": int((~keep).sum()),
    }


def distinct_rows(units: np.ndarray, threshold: float, progress: Any = lambda rows: None) -> np.ndarray:
    """Say which rows `(rows, size)` of unit length stay: those with no cosine of `threshold` to one that stays before.

    >>> import numpy as np
    >>> distinct_rows(np.array([[1.0, 0.0], [0.995, 0.0999], [0.0, 1.0]]), 0.98).tolist()
    [True, False, True]
    """
    import numpy as np

    keep = np.ones(len(units), dtype=bool)
    for start in range(0, len(units), BLOCK):
        block = units[start : start + BLOCK]
        near = block @ units[: start + len(block)].T >= threshold  # (block, rows so far)
        for row in np.flatnonzero(near.sum(axis=1) > 1):
            earlier = np.flatnonzero(near[row, : start + row])
            keep[start + row] = not keep[earlier].any()
        progress(len(block))
    return keep


def make_bank(rationales: pd.DataFrame, texts: Path, seed: int) -> RationaleBank:
    """Order rationales by perspective and cell, write their texts, and return the bank, of no weights yet.

    Args:
        rationales: At least one row, embedded, each with a verdict, none with a line break.
        texts: File for the texts.
        seed: Seed of k-means.
    """
    import numpy as np
    import torch

    from modeling_lrkd.bank_lrkd import RationaleBank, quantize

    ordered, units, centroids, sizes, cells, means = [], [], [], [], [0], []
    perspectives = sorted(rationales["perspective"].unique())
    for name in perspectives:
        part = rationales[rationales["perspective"] == name]
        embeddings = np.stack(part["cot_embedding"]).astype(np.float32)  # (rows, size)
        mean = embeddings.mean(axis=0)
        offsets = _units(embeddings - mean)
        cell, centres = k_means(offsets, max(1, len(part) // ENTRIES_A_CELL), seed)
        order = np.argsort(cell, kind="stable")
        ordered.append(part.iloc[order])
        units.append(offsets[order])
        centroids.append(centres)
        sizes.append(np.bincount(cell, minlength=len(centres)))
        cells.append(cells[-1] + len(centres))
        means.append(mean)
    import pandas as pd

    entries = pd.concat(ordered)
    lines = [f"{text}\n".encode() for text in entries["rationale"]]
    texts.write_bytes(b"".join(lines))
    labels = sorted(entries["predicted_label"].unique())
    vectors, scales = quantize(torch.from_numpy(np.concatenate(units)))
    return RationaleBank(
        vectors=vectors,
        scales=scales,
        centroids=torch.from_numpy(np.concatenate(centroids)),
        cell_starts=torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(sizes))])),
        perspective_cells=torch.tensor(cells),
        means=torch.from_numpy(np.stack(means)),
        verdicts=torch.tensor([labels.index(label) for label in entries["predicted_label"]], dtype=torch.uint8),
        text_starts=torch.from_numpy(np.concatenate([[0], np.cumsum([len(line) for line in lines])])),
        perspectives=perspectives,
        labels=labels,
        weights_sha256="",
        encoder=entries["encoder"].iloc[0],
        encoder_revision=entries["encoder_revision"].iloc[0],
        texts=texts,
    )


def k_means(units: np.ndarray, cells: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cell of each unit vector `(rows,)` and the cells' unit centres `(cells, size)`, none of them empty."""
    import numpy as np
    from sklearn.cluster import MiniBatchKMeans

    model = MiniBatchKMeans(cells, random_state=seed, n_init=1, batch_size=4096, max_iter=10).fit(units)
    centres = _units(model.cluster_centers_.astype(np.float32))
    cell = np.concatenate([(units[at : at + BLOCK] @ centres.T).argmax(axis=1) for at in range(0, len(units), BLOCK)])
    used, cell = np.unique(cell, return_inverse=True)
    return cell, centres[used]


def _units(rows: np.ndarray) -> np.ndarray:
    import numpy as np

    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def main() -> None:
    """Build from the command line."""
    arguments = parse(BankArguments, __doc__)
    record = build(arguments)
    left_out = ", ".join(
        f"{record[name]:,} {name.replace('_', ' ')}" for name in ("without_verdict", "same_text", "near_duplicates")
    )
    print(f"{record['entries']:,} of {record['read']:,} rationales ({left_out} left out), {record['cells']:,} cells")
    if record["code"]:
        print(f"the student's code knew of no bank; from this checkout now: {', '.join(record['code'])}")
    for name, size in record["bytes"].items():
        print(f"wrote {Path(arguments.model, name)}: {size / 1e6:.1f} MB")
    print(
        f"next: python -m recipes.evaluate.explanations --model {arguments.model} --rationales {arguments.rationales} "
        "--pairs DIR --output DIR"
    )


if __name__ == "__main__":
    run(main)
