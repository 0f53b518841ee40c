"""What a training run takes from the teacher, read once and checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from recipes.arguments import UserError
from recipes.schemas import PERSPECTIVES, RATIONALES, LabelSchema, read

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from recipes.student.distill import DistillArguments


@dataclass(frozen=True)
class Guidance:
    """What the teacher says of the training pairs; None where this student does not hear it.

    Attributes:
        embeddings: `pair_id` -> the embedding that guides it, `(reasoning_dim,)`; with a latent for each perspective
            `(perspectives, reasoning_dim)`.
        means: Perspective -> mean embedding of its training rationales; None also where there is but one.
        perspectives: Those that have a latent each; None: a single latent.
        rationales: What a rival reads, contract `RATIONALES`, verdicts by class name.
        votes: `pair_id` -> votes for each class, `(labels,)`; see `recipes.student.votes`.
    """

    embeddings: dict[str, np.ndarray] | None = None
    means: dict[str, np.ndarray] | None = None
    perspectives: list[str] | None = None
    rationales: pd.DataFrame | None = None
    votes: dict[str, np.ndarray] | None = None


def read_guidance(arguments: DistillArguments, schema: LabelSchema, train: pd.DataFrame) -> Guidance:
    """Read what these options ask for.

    Args:
        arguments: Options of the run.
        schema: Classes of the pairs.
        train: Training pairs.

    Raises:
        UserError: A file breaks its contract, says nothing of the training pairs, or is not what the options need.
    """
    is_guided = arguments.extractor_type != "none" and arguments.guidance_weight > 0
    is_rival, by_perspective = arguments.rival != "none", arguments.latents == "per_perspective"
    if arguments.rationales is None and is_guided:
        raise UserError(
            f"extractor_type {arguments.extractor_type!r} with guidance_weight {arguments.guidance_weight} needs "
            "`rationales` (recipes.rationales.embed makes them). Without guidance: --guidance_weight 0."
        )
    # A student without guidance may name rationales, and never reads them.
    rationales = None
    if arguments.rationales is not None and (is_guided or is_rival or by_perspective):
        rationales = _read_rationales(arguments, train)
    perspectives = _perspectives(arguments, rationales, train) if by_perspective else None
    embeddings = means = None
    if is_guided and rationales is not None:
        embeddings, means = _embeddings(arguments, rationales, train, perspectives)
    verdicts = None
    if is_rival and rationales is not None:
        canonical = schema.canonical_column(rationales["predicted_label"], str(arguments.rationales))
        verdicts = rationales.assign(predicted_label=canonical)
    votes = None if arguments.votes is None else _read_votes(arguments, arguments.votes, schema, train)
    return Guidance(embeddings, means, perspectives, verdicts, votes)


def _read_rationales(arguments: DistillArguments, train: pd.DataFrame) -> pd.DataFrame:
    """Return the rationales of the chosen perspectives, of any split."""
    rationales = read(arguments.rationales, RATIONALES)
    if arguments.perspectives is not None:
        there = sorted(rationales["perspective"].unique())
        missing = [name for name in arguments.perspectives if name not in there]
        if missing or not arguments.perspectives:
            raise UserError(
                f"{arguments.rationales}: perspectives: {', '.join(missing) or 'none given'}; expected some of "
                f"{', '.join(there)}, which the file has. Leave `perspectives` out to use all."
            )
        rationales = rationales[rationales["perspective"].isin(arguments.perspectives)]
    if not rationales["pair_id"].isin(train["pair_id"]).any():
        raise UserError(f"{arguments.rationales}: none of its pair_ids is in {arguments.pairs}/train.parquet.")
    return rationales


def _perspectives(arguments: DistillArguments, rationales: pd.DataFrame | None, train: pd.DataFrame) -> list[str]:
    """Return the perspectives that have a latent each.

    They are those of the training pairs' rationales; without guidance too, so that it takes nothing else away. With no
    rationales they are the chosen ones, or the paper's three.
    """
    if rationales is None:
        names = list(arguments.perspectives or PERSPECTIVES)
    else:
        names = sorted(rationales[rationales["pair_id"].isin(train["pair_id"])]["perspective"].unique())
    if len(names) < 2:
        raise UserError(
            f"{arguments.rationales or 'perspectives'}: latents per_perspective need rationales of two perspectives or "
            f"more, found {names[0]!r} alone. Build them with --target mean, or leave `latents` out."
        )
    return names


def _embeddings(
    arguments: DistillArguments, rationales: pd.DataFrame, train: pd.DataFrame, perspectives: list[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Return the embedding that guides each pair, and the mean one of each perspective if there are several."""
    from recipes.student.dataset import mean_embeddings, perspective_embeddings, perspective_means

    if "cot_embedding" not in rationales:
        raise UserError(f"{arguments.rationales}: no column 'cot_embedding'; run recipes.rationales.embed on it first.")
    embeddings = mean_embeddings(rationales)
    size = next(iter(embeddings.values())).shape[-1]
    if arguments.reasoning_dim not in (None, size):
        raise UserError(
            f"{arguments.rationales}: column 'cot_embedding' holds vectors of {size} numbers, but reasoning_dim is "
            f"{arguments.reasoning_dim}. Leave reasoning_dim out, or embed with another encoder."
        )
    means = perspective_means(rationales[rationales["pair_id"].isin(train["pair_id"])])
    return embeddings if perspectives is None else perspective_embeddings(rationales, perspectives), means


def _read_votes(
    arguments: DistillArguments, file: str, schema: LabelSchema, train: pd.DataFrame
) -> dict[str, np.ndarray]:
    """Return the teacher's votes for each pair, of any split."""
    from recipes.student.votes import count_votes

    rationales = read(file, RATIONALES)
    rationales["predicted_label"] = schema.canonical_column(rationales["predicted_label"], file)
    votes = count_votes(rationales, schema.label2id)
    if not train["pair_id"].isin(list(votes)).any():
        raise UserError(
            f"{file}: no verdict (column predicted_label) about a pair of {arguments.pairs}/train.parquet. "
            "Make it of that folder's pairs: recipes.rationales.build --keep all."
        )
    return votes
