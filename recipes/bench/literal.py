"""The extractors as the paper's equations stand: every token transformed, then the mean over tokens.

What the pooled form of `modeling_lrkd.extractors_lrkd` is held against, in time by the bench and in value by the
tests. Each takes an extractor for its weights, H `(batch, length, hidden)` and a mask `(batch, length)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modeling_lrkd.extractors_lrkd import GATExtractor, MLPExtractor, PolyExtractor, masked_softmax


def masked_mean(vectors: Tensor, mask: Tensor) -> Tensor:
    """Average `(batch, length, size)` over the valid tokens."""
    valid = mask.to(vectors.dtype).unsqueeze(2)
    return (vectors * valid).sum(dim=1) / valid.sum(dim=1)


def literal_mlp(extractor: MLPExtractor, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Eq. 10-11: both layers on every token."""
    for layer in extractor.layers[:-1]:
        hidden_states = F.gelu(layer(hidden_states))
    return masked_mean(extractor.layers[-1](hidden_states), mask)


def literal_poly(extractor: PolyExtractor, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Eq. 12-13: one vector a code, then their mean."""
    nodes = hidden_states if extractor.projection is None else extractor.projection(hidden_states)
    scores = nodes @ extractor.codes.T / extractor.codes.shape[1] ** 0.5  # (batch, length, codes)
    attention = masked_softmax(scores, mask.unsqueeze(2), dim=1).to(nodes.dtype)
    return (attention.transpose(1, 2) @ nodes).mean(dim=1)


def literal_gat(extractor: GATExtractor, hidden_states: Tensor, mask: Tensor) -> Tensor:
    """Eq. 14-16: every node projected and attended to by every other, then the mean of the new nodes."""
    nodes = extractor.projection(hidden_states)  # (batch, length, latent)
    source, target = (nodes @ extractor.attention.view(2, -1).T).float().unbind(dim=2)
    scores = F.leaky_relu(source.unsqueeze(2) + target.unsqueeze(1), extractor.negative_slope)  # (batch, i, j)
    attention = masked_softmax(scores, mask.unsqueeze(1), dim=2).to(nodes.dtype)
    return masked_mean(attention @ nodes, mask)


LITERAL = {"mlp": literal_mlp, "poly": literal_poly, "gat": literal_gat}


class LiteralExtractor(nn.Module):
    """An extractor computed in its literal form, with the weights of the pooled one."""

    def __init__(self, extractor: nn.Module, kind: str) -> None:
        super().__init__()
        self.extractor = extractor
        self.literal = LITERAL[kind]

    def forward(self, hidden_states: Tensor, mask: Tensor) -> torch.Tensor:
        """Map `(batch, length, hidden)` and a mask `(batch, length)` to `(batch, latent_dim)`."""
        return self.literal(self.extractor, hidden_states, mask)
