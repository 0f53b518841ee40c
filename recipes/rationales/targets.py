"""Make another target of guidance from embedded rationales: the residual, or a tuned embedding.

    # What remains of the embeddings after regressing out those of query and title
    python -m recipes.rationales.targets --target residual --rationales runs/esci/rationales_embedded.parquet \
        --pairs runs/esci/pairs --encoder minilm --output runs/esci/residual_embedded.parquet

    # Embeddings of an embedder tuned so that rationales of one verdict lie together
    python -m recipes.rationales.targets --target tuned --rationales runs/esci/all_embedded.parquet \
        --pairs runs/esci/pairs --encoder minilm --output runs/esci/tuned_embedded.parquet

    # Fitted on half of the queries, to be probed on the other half
    python -m recipes.rationales.targets --config recipes/configs/tiny/targets.yaml --fit_share 0.5

Reads: rationales with embeddings (recipes.rationales.embed), and pairs, because only rationales of the training pairs
are fitted on. Writes: the same rows with another `cot_embedding`, of unit norm unless --normalise false (so that eq. 8
weighs every target alike), `encoder`, `encoder_revision`, and `target_fitted`: whether the row was fitted on; beside it
the command (OUTPUT.report.json). The tuned embedder stands beside OUTPUT, its name ending in `_embedder`. Killed and
started again, it goes on where it was.

A rationale that is kept because it predicts the gold label (build --keep consistent) has the gold label as its verdict:
tuned on such, the target carries the label of the training pairs itself. On all rationales it carries the teacher's.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, command_line, parse, run, to_dict
from recipes.record import sha256, write_json
from recipes.schemas import RATIONALES, make_folder, read, read_pairs, write

TUNING = ("steps", "batch_size", "learning_rate", "margin", "precision", "seed")  # what only `tuned` looks at

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from recipes.rationales.embed import Encoder


@dataclass
class TargetsArguments:
    """What `recipes.rationales.targets` can be told."""

    rationales: str = field(metadata={"help": "Rationales with embeddings (parquet)."})
    pairs: str = field(metadata={"help": "Folder of pairs: rationales of train.parquet are fitted on, no others."})
    target: Literal["residual", "tuned"] = field(
        metadata={
            "help": "residual: less what query and title explain (ridge). tuned: of an embedder tuned on verdicts."
        }
    )
    encoder: str = field(
        metadata={"help": "residual: what embedded the rationales. tuned: what to begin with. Id, folder or `minilm`."}
    )
    output: str = field(metadata={"help": "Rationales with the other embeddings to write (parquet)."})
    revision: str | None = field(default=None, metadata={"help": "Commit, branch or tag of a Hub encoder."})
    normalise: bool = field(default=True, metadata={"help": "Unit norm."})
    fit_share: float = field(
        default=1.0, metadata={"help": "Share of the training queries to fit on; below 1 to probe on the others."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens a text."})
    steps: int = field(default=300, metadata={"help": "tuned: optimizer steps."})
    batch_size: int = field(default=32, metadata={"help": "tuned: rationales a step."})
    learning_rate: float = field(default=2e-5, metadata={"help": "tuned: falls to 0."})
    margin: float = field(default=0.5, metadata={"help": "tuned: cosine by which another verdict is to be farther."})
    precision: Literal["float32", "bfloat16"] = field(default="float32", metadata={"help": "tuned: autocast or not."})
    seed: int = field(default=0, metadata={"help": "Of the queries fitted on, and of the tuning."})


def main() -> None:
    """Run the verb."""
    make_targets(parse(TargetsArguments, __doc__))


def make_targets(arguments: TargetsArguments) -> None:
    """Read, fit, and write the other embeddings.

    Raises:
        UserError: Something that was given does not fit; the message says what.
    """
    from recipes.rationales.embed import already_made, find_encoder, with_embeddings
    from recipes.rationales.tuning import check_verdicts

    _check(arguments)
    rows = read(arguments.rationales, RATIONALES)
    if "cot_embedding" not in rows:
        raise UserError(f"{arguments.rationales}: no column 'cot_embedding'; run recipes.rationales.embed on it first.")
    train = read_pairs(arguments.pairs, ["train"])["train"]["pair_id"]
    rows = rows.assign(target_fitted=_fitted(rows, train, arguments))
    encoder = find_encoder(arguments.encoder, arguments.revision)
    if arguments.target == "residual":
        _check_same_encoder(rows, encoder, arguments.rationales)
    else:
        check_verdicts(rows[rows["target_fitted"]], arguments.batch_size)
    make_folder(Path(arguments.output).parent)
    options = {name: value for name, value in to_dict(arguments).items() if name not in ("output", "rationales")}
    settings = {"arguments": options, "data_sha256": {"rationales": sha256(arguments.rationales)}}
    mark = hashlib.sha256(json.dumps([settings, encoder.revision, int(rows["target_fitted"].sum())]).encode())
    if already_made(arguments.output, mark.hexdigest()):
        print(f"{arguments.output} already holds this target.")
        return

    work = Path(f"{arguments.output}.work")
    make = _residual if arguments.target == "residual" else _tuned
    vectors, name, revision, found = make(rows, encoder, work, settings, arguments)
    if arguments.normalise:
        vectors = normalised(vectors)
    path = write(with_embeddings(rows, vectors, name, revision, mark.hexdigest()), arguments.output, RATIONALES)
    command = command_line("recipes.rationales.targets", arguments)
    fitted = {"rationales": len(rows), "fitted": int(rows["target_fitted"].sum())}
    write_json(f"{path}.report.json", {"command": command, "arguments": to_dict(arguments), **fitted, **found})
    shutil.rmtree(work, ignore_errors=True)
    print(f"wrote {path}: {len(rows):,} embeddings of size {vectors.shape[1]}, fitted on {fitted['fitted']:,} of them")
    print(f"encoder {name}, revision {revision}; {found}")
    print(
        f"next: python -m recipes.rationales.probe --rationales {arguments.target}={path} --encoder NAME --output DIR"
    )


def _check(arguments: TargetsArguments) -> None:
    if not 0 < arguments.fit_share <= 1:
        raise UserError(f"fit_share: expected a share above 0 and at most 1, got {arguments.fit_share}.")
    for name in ("steps", "batch_size", "learning_rate", "margin", "max_length"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"{name}: expected more than 0, got {getattr(arguments, name)}.")


def _fitted(rows: pd.DataFrame, train: pd.Series, arguments: TargetsArguments) -> np.ndarray:
    """Choose the rows to fit on: those of training pairs, of a share of their queries."""
    import numpy as np

    from recipes.rationales.topic import query_groups

    in_training = rows["pair_id"].isin(train).to_numpy()
    if not in_training.any():
        raise UserError(f"{arguments.rationales}: none of its pair_ids is in {arguments.pairs}/train.parquet.")
    groups = query_groups(rows)
    queries = np.random.default_rng(arguments.seed).permutation(np.unique(groups[in_training]))
    return in_training & np.isin(groups, queries[: max(1, round(arguments.fit_share * len(queries)))])


def _check_same_encoder(rows: pd.DataFrame, encoder: Encoder, source: str) -> None:
    if "encoder" not in rows or "encoder_revision" not in rows:
        raise UserError(f"{source}: no columns 'encoder', 'encoder_revision'; embed it with recipes.rationales.embed.")
    found = rows[["encoder", "encoder_revision"]].drop_duplicates().to_numpy().tolist()
    if found != [[encoder.name, encoder.revision]]:
        made = " and ".join(f"{name} ({revision})" for name, revision in found)
        raise UserError(
            f"{source}: embedded by {made}, but encoder is {encoder.name} ({encoder.revision}). The residual is what "
            "the same encoder's embedding of query and title leaves: name that encoder."
        )


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Scale each row to unit norm; a row of zeros stays.

    >>> import numpy as np
    >>> normalised(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    import numpy as np

    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


def _residual(
    rows: pd.DataFrame, encoder: Encoder, work: Path, settings: dict[str, Any], arguments: TargetsArguments
) -> tuple[np.ndarray, str, str, dict[str, Any]]:
    import numpy as np

    from recipes.rationales.topic import query_groups, residual, topic_embeddings

    topics = topic_embeddings(rows, encoder, work, arguments.max_length)
    embeddings = np.stack(rows["cot_embedding"].to_numpy()).astype(np.float32)
    rest, found = residual(topics, embeddings, query_groups(rows), rows["target_fitted"].to_numpy())
    return rest, f"{encoder.name} (residual)", encoder.revision, found


def _tuned(
    rows: pd.DataFrame, encoder: Encoder, work: Path, settings: dict[str, Any], arguments: TargetsArguments
) -> tuple[np.ndarray, str, str, dict[str, Any]]:
    from recipes.rationales.embed import EmbedArguments, embed_texts, find_encoder
    from recipes.rationales.tuning import tune

    output = Path(arguments.output)
    folder = output.with_name(f"{output.stem}_embedder")
    options = {name: getattr(arguments, name) for name in TUNING}
    fitted = rows[rows["target_fitted"] & rows["predicted_label"].notna()]
    record = tune(fitted, encoder, folder, settings, max_length=arguments.max_length, **options)
    tuned = find_encoder(str(folder), None)
    texts = sorted(set(rows["rationale"]), key=lambda text: (-len(text), text))
    embedding = EmbedArguments(arguments.rationales, str(folder), arguments.output, max_length=arguments.max_length)
    vectors = embed_texts(texts, tuned, work, embedding)
    place = {text: number for number, text in enumerate(texts)}
    found = {"embedder": folder.name, "tuned_on": record["rationales_by_verdict"]}
    return vectors[[place[text] for text in rows["rationale"]]], tuned.name, tuned.revision, found


if __name__ == "__main__":
    run(main)
