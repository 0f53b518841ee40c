"""The teacher's votes: how its rationales of a pair, right and wrong, spread over the classes, as a soft label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    import pandas as pd

SMOOTHING = 0.5  # added to the votes of each class (Jeffreys' prior), so that no class has probability 0


def count_votes(rationales: pd.DataFrame, label2id: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Count the verdicts of each pair's rationales: `pair_id` -> float32 `(labels,)`; no entry for a pair with none.

    Args:
        rationales: Columns `pair_id` and `predicted_label`, class names or null.
        label2id: Class name -> position of its logit.
    """
    votes: dict[str, np.ndarray] = {}
    voted = rationales[rationales["predicted_label"].notna()]
    for pair_id, label in zip(voted["pair_id"], voted["predicted_label"], strict=True):
        votes.setdefault(pair_id, np.zeros(len(label2id), np.float32))[label2id[label]] += 1
    return votes


def vote_divergence(votes: Tensor, logits: Tensor) -> Tensor:
    """KL(p_T || p_S) of each row, p_T the smoothed share of the votes; 0 for a row without votes.

    Distillation from soft labels (Hinton et al., arXiv 1503.02531) at temperature 1. With p_T fixed it has the
    gradient of the cross-entropy to p_T.

    Args:
        votes: Of the teacher for each class, `(batch, labels)`.
        logits: Of the student, `(batch, labels)`.

    >>> vote_divergence(torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2))  # p_T = (7/8, 1/8)
    tensor([0.3164, 0.0000])
    """
    smoothed = votes + SMOOTHING
    teacher = smoothed / smoothed.sum(dim=1, keepdim=True)
    rows = F.kl_div(F.log_softmax(logits.float(), dim=1), teacher, reduction="none").sum(dim=1)
    return torch.where(votes.sum(dim=1) > 0, rows, 0.0)
