"""Tokenised pairs with their chain-of-thought embeddings, batches of them, and the order they are trained in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase


def mean_embeddings(rationales: pd.DataFrame) -> dict[str, np.ndarray]:
    """Average the embeddings of each pair's rationales: `pair_id` -> float32 `(reasoning_dim,)`.

    One row a pair (unified, one perspective, concatenation) is passed on as it is.
    """
    vectors = np.stack(rationales["cot_embedding"].to_numpy()).astype(np.float32)
    codes, pair_ids = rationales["pair_id"].factorize()
    sums = np.zeros((len(pair_ids), vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, codes, vectors)
    means = sums / np.bincount(codes)[:, None].astype(np.float32)
    return dict(zip(pair_ids, means, strict=True))


def perspective_means(rationales: pd.DataFrame) -> dict[str, np.ndarray] | None:
    """Average the embeddings of each perspective: name -> float32 `(reasoning_dim,)`; None if there is but one.

    The student's task `lrkd-relevance` reports how near its latent reasoning is to each of them.
    """
    if rationales["perspective"].nunique() < 2:
        return None
    return {
        str(name): np.stack(vectors.to_numpy()).mean(axis=0, dtype=np.float64).astype(np.float32)
        for name, vectors in rationales.groupby("perspective")["cot_embedding"]
    }


def perspective_embeddings(rationales: pd.DataFrame, perspectives: Sequence[str]) -> dict[str, np.ndarray]:
    """Stack the mean embeddings of each pair by perspective: `pair_id` -> float32 `(perspectives, reasoning_dim)`.

    In the order of `perspectives`; NaN where a pair has no rationale of one.
    """
    means = [mean_embeddings(rationales[rationales["perspective"] == name]) for name in perspectives]
    none = np.full_like(next(iter(means[0].values())), np.nan)
    pair_ids = dict.fromkeys(pair_id for of_one in means for pair_id in of_one)
    return {pair_id: np.stack([of_one.get(pair_id, none) for of_one in means]) for pair_id in pair_ids}


def positions_of(encoder: Any) -> int | None:
    """Return for how many tokens an encoder has positions, None where they are relative or rotary and have no end.

    The RoBERTa family begins to count after its padding token: of its 514 positions an input can have 512.
    """
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(positions, torch.nn.Embedding):
        return None
    return positions.num_embeddings - (0 if positions.padding_idx is None else positions.padding_idx + 1)


class PairDataset(Dataset[dict[str, Any]]):
    """Pairs, tokenised once without padding.

    Each item holds `input_ids` (and what else the tokenizer returns), `labels`, and, if `embeddings` are given,
    `cot_embeddings` `(reasoning_dim,)` and `cot_mask`: 0 and zeros for a pair that has none. With embeddings by
    perspective they are `(perspectives, reasoning_dim)` and `(perspectives,)`.

    Args:
        pairs: Contract `PAIRS`, labels by class name.
        tokenizer: Tokenizer of the encoder.
        label2id: Class name -> position of its logit.
        max_length: Longest input in tokens; the longer of query and title is cut first.
        embeddings: `pair_id` -> embedding of its chain of thought, see `mean_embeddings`; or its
            embeddings by perspective, NaN where it has none, see `perspective_embeddings`.
        sort_by_length: Longest pair first: less padding where the order does not matter.
        votes: `pair_id` -> the teacher's votes for each class, see `recipes.student.votes`; each item then has
            `teacher_votes` `(labels,)`, zeros for a pair that has none.
    """

    def __init__(
        self,
        pairs: pd.DataFrame,
        tokenizer: PreTrainedTokenizerBase,
        label2id: Mapping[str, int],
        max_length: int,
        embeddings: Mapping[str, np.ndarray] | None = None,
        sort_by_length: bool = False,
        votes: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        encoded = tokenizer(
            pairs["query"].tolist(),
            pairs["product_title"].tolist(),
            truncation="longest_first",
            max_length=max_length,
        )
        self.encoded = {name: values for name, values in encoded.items() if name != "attention_mask"}
        self.labels = pairs["label"].map(label2id).to_numpy()
        self.lengths = np.array([len(ids) for ids in self.encoded["input_ids"]])
        self.rows = np.argsort(-self.lengths, kind="stable") if sort_by_length else np.arange(len(pairs))
        self.cot_embeddings = self.cot_mask = None
        if embeddings is not None:
            none = np.full_like(next(iter(embeddings.values())), np.nan)
            vectors = np.stack([embeddings.get(pair_id, none) for pair_id in pairs["pair_id"]])
            self.cot_mask = np.isfinite(vectors).all(axis=-1)
            self.cot_embeddings = np.where(self.cot_mask[..., None], vectors, np.float32(0))
        self.teacher_votes = None
        if votes is not None:
            none = np.zeros(len(label2id), np.float32)
            self.teacher_votes = np.stack([votes.get(pair_id, none) for pair_id in pairs["pair_id"]])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        item: dict[str, Any] = {name: values[row] for name, values in self.encoded.items()}
        item["labels"] = int(self.labels[row])
        if self.cot_embeddings is not None and self.cot_mask is not None:
            item["cot_embeddings"] = self.cot_embeddings[row]
            item["cot_mask"] = self.cot_mask[row].astype(np.int64)
        if self.teacher_votes is not None:
            item["teacher_votes"] = self.teacher_votes[row]
        return item


class PairCollator:
    """Pad a list of `PairDataset` items to the longest of them.

    Two pairs of 3 and 2 tokens, the second without a rationale, reasoning_dim 2:

    ```
    {"input_ids":      [[101, 7, 102], [101, 102, 0]],
     "attention_mask": [[1, 1, 1], [1, 1, 0]],
     "labels":         [0, 3],
     "cot_embeddings": [[0.6, 0.8], [0.0, 0.0]],
     "cot_mask":       [1, 0]}
    ```
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return tensors of `(batch, length)`, `(batch,)`, of embeddings `(batch, ..., reasoning_dim)`, and votes."""
        extra = ("labels", "cot_embeddings", "cot_mask", "teacher_votes")
        batch = dict(
            self.tokenizer.pad(
                [{name: value for name, value in item.items() if name not in extra} for item in items],
                return_tensors="pt",
            )
        )
        for name in extra:
            if name in items[0]:
                batch[name] = torch.from_numpy(np.stack([item[name] for item in items]))
        return batch


class LengthBucketSampler(Sampler[int]):
    """Shuffle rows so that each batch holds rows of about one length.

    Every epoch the rows are shuffled, cut into pools of `pool_batches` batches, sorted by length within a pool, and
    the batches are shuffled. The rows that do not fill a last batch sit the epoch out, another few each time: so
    two processes that share the batches see exactly what one process with twice the batch sees.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows an optimizer step takes: over all processes and accumulation steps.
        seed: With the epoch, decides the order.
        pool_batches: Batches sorted together; more means less padding and less chance in who meets whom.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, pool_batches: int = 50) -> None:
        self.lengths = lengths
        self.batch_size = min(batch_size, len(lengths))
        self.seed = seed
        self.pool_batches = pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next; Trainer calls it, after a resume too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng([self.seed, self.epoch])
        rows = generator.permutation(len(self.lengths))[: len(self)]
        pool = self.batch_size * self.pool_batches
        ordered = [
            part[np.argsort(self.lengths[part], kind="stable")]
            for part in (rows[start : start + pool] for start in range(0, len(rows), pool))
        ]
        batches = np.concatenate(ordered).reshape(-1, self.batch_size)
        generator.shuffle(batches)
        return iter(batches.ravel().tolist())
