"""What a pair is about: the embeddings of its query and its title, and what they leave of a rationale's embedding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recipes.arguments import UserError
from recipes.data.text import normalise
from recipes.rationales.embed import EmbedArguments, Encoder, embed_texts

if TYPE_CHECKING:
    import pandas as pd

RIDGE_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
FOLDS = 5


def topic_embeddings(rows: pd.DataFrame, encoder: Encoder, work: Path, max_length: int = 256) -> np.ndarray:
    """Embed query and title, each on its own and each distinct text once.

    Args:
        rows: A table with `query` and `product_title`.
        encoder: What embeds them.
        work: Folder of the finished shards: killed and started again, the embedding goes on.
        max_length: Tokens a text.

    Returns:
        `[e(query) ; e(title)]` of each row, `(rows, 2 * size)`, float32.
    """
    texts = sorted({*rows["query"], *rows["product_title"]}, key=lambda text: (-len(text), text))
    settings = EmbedArguments(rationales="", encoder=encoder.name, output="", max_length=max_length)
    vectors = embed_texts(texts, encoder, work, settings)
    place = {text: number for number, text in enumerate(texts)}
    parts = [vectors[[place[text] for text in rows[column]]] for column in ("query", "product_title")]
    return np.concatenate(parts, axis=1)


def query_groups(rows: pd.DataFrame) -> np.ndarray:
    """Number the normalised query of each row, `(rows,)`: rows of one query belong on one side of a split."""
    return rows.groupby(rows["query"].map(normalise), sort=False).ngroup().to_numpy()


def residual(
    topics: np.ndarray, embeddings: np.ndarray, groups: np.ndarray, fitted: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    r"""Regress the embeddings on the topics by ridge, and return what remains.

    .. math:: \tilde e = e - (t W + b), \quad W, b = \arg\min \sum_{i\ \mathrm{fitted}} \|e_i - t_i W - b\|^2
              + \alpha \|W\|^2

    α is the one of `RIDGE_STRENGTHS` with the least squared error in cross-validation by query.

    Args:
        topics: t, `(rows, features)`.
        embeddings: e, `(rows, size)`.
        groups: Query of each row, `(rows,)`.
        fitted: Rows that the regression may see, `(rows,)`.

    Returns:
        The residuals of all rows, `(rows, size)` in float32, and what is recorded: `alpha`, and `explained`, the share
        of the embeddings' variance that the regression explains of queries it has not seen.

    Raises:
        UserError: Too few queries to choose α.
    """
    from sklearn.linear_model import Ridge, RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict

    queries = len(np.unique(groups[fitted]))
    if queries < FOLDS:
        raise UserError(f"rationales: {queries} queries to fit on; {FOLDS} or more are needed.")
    x, y, by_query = topics[fitted], embeddings[fitted], groups[fitted]
    folds = list(GroupKFold(FOLDS).split(x, y, by_query))
    model = RidgeCV(RIDGE_STRENGTHS, cv=folds, scoring="neg_mean_squared_error").fit(x, y)
    unseen = cross_val_predict(Ridge(model.alpha_), x, y, cv=folds).reshape(y.shape)
    explained = 1 - float(np.square(y - unseen).sum() / np.square(y - y.mean(axis=0)).sum())
    rest = embeddings - model.predict(topics).reshape(embeddings.shape)  # one column comes back flat
    return rest.astype(np.float32), {"alpha": float(model.alpha_), "explained": round(explained, 4)}
