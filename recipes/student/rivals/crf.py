"""A linear-chain conditional random field (Lafferty et al., 2001).

Ours, because the PyTorch ones that can be installed have not been kept since 2019-2022. The tests check it against the
enumeration of every path.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LinearChainCRF(nn.Module):
    r"""Score of a path y of tags: start(y_1) + Σ_t emission(t, y_t) + Σ_t transition(y_t, y_{t+1}) + end(y_n).

    p(y | emissions) = exp(score(y)) / Σ_y' exp(score(y')), the sum over all paths as long as the row.

    Args:
        num_tags: Number of tags.

    Shape:
        emissions `(batch, length, tags)`, tags `(batch, length)`, mask `(batch, length)`: true for the first tokens of
        a row, at least one, false for the padding after them, where emissions and tags are not looked at.

    >>> crf = LinearChainCRF(2)
    >>> crf = crf.requires_grad_(False)
    >>> for weight in (crf.start, crf.end, crf.transitions): _ = weight.zero_()
    >>> crf(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 1]]), torch.ones(1, 3, dtype=torch.bool))  # log 8 paths
    tensor([2.0794])
    """

    def __init__(self, num_tags: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.end = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags).uniform_(-0.1, 0.1))  # (from, to)

    def forward(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Return −log p(tags | emissions) of each row, `(batch,)`, in float32."""
        emissions = emissions.float()
        return self.log_partition(emissions, mask) - self.score(emissions, tags, mask)

    def score(self, emissions: Tensor, tags: Tensor, mask: Tensor) -> Tensor:
        """Return the score of the given path of each row, `(batch,)`."""
        tags = tags.masked_fill(~mask, 0)
        emitted = emissions.gather(2, tags.unsqueeze(2)).squeeze(2).masked_fill(~mask, 0.0).sum(dim=1)
        moved = self.transitions[tags[:, :-1], tags[:, 1:]].masked_fill(~mask[:, 1:], 0.0).sum(dim=1)
        last = tags.gather(1, mask.sum(dim=1, keepdim=True) - 1).squeeze(1)
        return self.start[tags[:, 0]] + emitted + moved + self.end[last]

    def log_partition(self, emissions: Tensor, mask: Tensor) -> Tensor:
        """Return log Σ exp(score) over all paths of each row, `(batch,)`, by the forward algorithm."""
        alpha = self.start + emissions[:, 0]  # (batch, tags)
        for step in range(1, emissions.shape[1]):
            longer = torch.logsumexp(alpha.unsqueeze(2) + self.transitions, dim=1) + emissions[:, step]
            alpha = torch.where(mask[:, step, None], longer, alpha)
        return torch.logsumexp(alpha + self.end, dim=1)

    def decode(self, emissions: Tensor, mask: Tensor) -> list[list[int]]:
        """Return the best path of each row (Viterbi), as long as the row."""
        best = self.start + emissions[:, 0]
        came_from = []
        for step in range(1, emissions.shape[1]):
            longer, before = (best.unsqueeze(2) + self.transitions).max(dim=1)
            best = torch.where(mask[:, step, None], longer + emissions[:, step], best)
            came_from.append(before)
        paths = []
        for row, last in enumerate((best + self.end).argmax(dim=1).tolist()):
            path = [last]
            for before in reversed(came_from[: int(mask[row].sum()) - 1]):
                path.append(int(before[row, path[-1]]))
            paths.append(path[::-1])
        return paths
