"""The latent reasoning extractors: token vectors in, one latent reasoning vector out (arXiv 2601.21611, appendix A).

Each is computed in pooled form. The paper transforms every token and then averages over the tokens; averaging commutes
with every linear map that follows the last non-linearity, so those maps are applied to one vector instead of to
`length` of them. The values are the same up to rounding (the tests hold them against the equations written out);
the work is not.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def weighted_sum(weights: Tensor, vectors: Tensor) -> Tensor:
    """Sum token vectors with one weight a token.

    Args:
        weights: `(batch, length)`.
        vectors: `(batch, length, size)`.

    Returns:
        `(batch, size)`.

    >>> weighted_sum(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[[1.0], [3.0], [9.0]]]))
    tensor([[2.]])
    """
    return torch.bmm(weights.to(vectors.dtype).unsqueeze(1), vectors).squeeze(1)


def mean_weights(mask: Tensor) -> Tensor:
    """Turn a mask `(batch, length)` into the weights of a mean over its valid tokens, in float32.

    >>> mean_weights(torch.tensor([[True, True, False, False]]))
    tensor([[0.5000, 0.5000, 0.0000, 0.0000]])
    """
    valid = mask.bool().float()
    return valid / valid.sum(dim=1, keepdim=True)


def masked_softmax(scores: Tensor, mask: Tensor, dim: int) -> Tensor:
    """Softmax in float32 over the valid positions of `dim`; `mask` broadcasts against `scores`.

    >>> masked_softmax(torch.tensor([[2.0, 2.0, 7.0]]), torch.tensor([[True, True, False]]), dim=1)
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    scores = scores.float()
    return scores.masked_fill(~mask.bool(), torch.finfo(scores.dtype).min).softmax(dim=dim)


class MLPExtractor(nn.Module):
    r"""Token-wise MLP and masked mean (eq. 10-11).

    .. math:: r = \frac{1}{|V|} \sum_{i \in V} \mathrm{MLP}(h_i)

    The last linear layer is applied after the mean. GELU stands between the layers (the paper names no activation).

    Args:
        hidden_size: Size of the token vectors.
        latent_dim: Size of the result.
        num_layers: Linear layers.
    """

    def __init__(self, hidden_size: int, latent_dim: int, num_layers: int = 2) -> None:
        super().__init__()
        sizes = [hidden_size] + [latent_dim] * num_layers
        self.layers = nn.ModuleList(nn.Linear(size, following) for size, following in pairwise(sizes))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Map `(batch, length, hidden)` and a mask `(batch, length)` to `(batch, latent_dim)`."""
        for layer in self.layers[:-1]:
            hidden_states = F.gelu(layer(hidden_states))
        pooled: Tensor = self.layers[-1](weighted_sum(mean_weights(mask), hidden_states))
        return pooled

    @staticmethod
    def together(extractors: list[MLPExtractor], hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Apply several to the same tokens, their first layers as one product: `(batch, extractors, latent_dim)`."""
        weights = mean_weights(mask)
        first: list[Any] = [extractor.layers[0] for extractor in extractors]
        if len(extractors[0].layers) == 1:
            pooled = weighted_sum(weights, hidden_states)
            return torch.stack([layer(pooled) for layer in first], dim=1)
        joined: list[Any] = [torch.cat([layer.weight for layer in first]), torch.cat([layer.bias for layer in first])]
        parts = F.gelu(F.linear(hidden_states, *joined)).chunk(len(extractors), dim=2)  # (batch, length, latent) each
        latents = []
        for extractor, part in zip(extractors, parts, strict=True):
            tokens = part
            for layer in extractor.layers[1:-1]:
                tokens = F.gelu(layer(tokens))
            latents.append(extractor.layers[-1](weighted_sum(weights, tokens)))
        return torch.stack(latents, dim=1)


class PolyExtractor(nn.Module):
    r"""Learned context codes that attend over the tokens (eq. 12-13, after Poly-encoders).

    .. math:: A = \mathrm{softmax}_i(H U^\top / \sqrt{d} + B), \quad r = \frac{1}{K} \sum_k (A^\top H)_k

    The mean over the codes is taken of the weights: r = Σ_i (mean_k A_ik) h_i. With a `latent_dim` of its own the
    tokens are first projected, folded into the codes for the scores and applied to the pooled vector for the result.

    Args:
        hidden_size: Size of the token vectors.
        latent_dim: Size of the codes and of the result.
        num_codes: K.
    """

    def __init__(self, hidden_size: int, latent_dim: int, num_codes: int = 32) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.empty(num_codes, latent_dim))
        self.projection = None if latent_dim == hidden_size else nn.Linear(hidden_size, latent_dim, bias=False)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Map `(batch, length, hidden)` and a mask `(batch, length)` to `(batch, latent_dim)`."""
        codes = self.codes if self.projection is None else self.codes @ self.projection.weight  # (codes, hidden)
        scores = F.linear(hidden_states, codes) / self.codes.shape[1] ** 0.5  # (batch, length, codes)
        attention = masked_softmax(scores, mask.unsqueeze(2), dim=1)  # over tokens: the mask removes token rows
        pooled = weighted_sum(attention.mean(dim=2), hidden_states)
        if self.projection is not None:
            pooled = self.projection(pooled)
        return pooled

    @staticmethod
    def together(extractors: list[PolyExtractor], hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Apply several to the same tokens, all codes as one product: `(batch, extractors, latent_dim)`."""
        codes = torch.cat([e.codes if e.projection is None else e.codes @ e.projection.weight for e in extractors])
        scores = F.linear(hidden_states, codes) / extractors[0].codes.shape[1] ** 0.5  # (batch, length, all codes)
        attention = masked_softmax(scores, mask.unsqueeze(2), dim=1)
        weights = attention.unflatten(2, (len(extractors), -1)).mean(dim=3)  # (batch, length, extractors)
        pooled = torch.bmm(
            weights.transpose(1, 2).to(hidden_states.dtype), hidden_states
        )  # (batch, extractors, hidden)
        rows = [
            part if extractor.projection is None else extractor.projection(part)
            for extractor, part in zip(extractors, pooled.unbind(dim=1), strict=True)
        ]
        return torch.stack(rows, dim=1)


class GATExtractor(nn.Module):
    r"""One graph attention layer over the complete graph of valid tokens, and the mean of its nodes (eq. 14-16).

    .. math:: \alpha_{ij} = \mathrm{LeakyReLU}(a^\top [W h_i \| W h_j]), \quad
              r = \frac{1}{|V|} \sum_{i \in V} \sum_{j \in V} \mathrm{softmax}_j(\alpha_{ij}) W h_j

    In pooled form r = W Σ_j c_j h_j, with c_j the mean over i of softmax_j(α_ij). The scores need only two scalars a
    token, (Wᵀa₁)·h_i + (Wᵀa₂)·h_j, so W meets one vector a row.

    Args:
        hidden_size: Size of the token vectors.
        latent_dim: Size of the result.
        negative_slope: Slope of the LeakyReLU.
    """

    def __init__(self, hidden_size: int, latent_dim: int, negative_slope: float = 0.2) -> None:
        super().__init__()
        self.projection = nn.Linear(hidden_size, latent_dim, bias=False)
        self.attention = nn.Parameter(torch.empty(2 * latent_dim))  # first half for i, second for j
        self.negative_slope = negative_slope

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Map `(batch, length, hidden)` and a mask `(batch, length)` to `(batch, latent_dim)`."""
        directions = self.attention.view(2, -1) @ self.projection.weight  # (2, hidden)
        source, target = F.linear(hidden_states, directions).float().unbind(dim=2)  # (batch, length) each
        scores = F.leaky_relu(source.unsqueeze(2) + target.unsqueeze(1), self.negative_slope)  # (batch, i, j)
        attention = masked_softmax(scores, mask.unsqueeze(1), dim=2)
        weights = weighted_sum(mean_weights(mask), attention)  # (batch, j)
        latent: Tensor = self.projection(weighted_sum(weights, hidden_states))
        return latent

    @staticmethod
    def together(extractors: list[GATExtractor], hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Apply several to the same tokens, all scores as one product: `(batch, extractors, latent_dim)`."""
        directions = torch.cat([e.attention.view(2, -1) @ e.projection.weight for e in extractors])  # (2 each, hidden)
        scalars = F.linear(hidden_states, directions).float().unflatten(2, (len(extractors), 2)).transpose(1, 2)
        source, target = scalars.unbind(dim=3)  # (batch, extractors, length) each
        scores = F.leaky_relu(source.unsqueeze(3) + target.unsqueeze(2), extractors[0].negative_slope)
        attention = masked_softmax(scores, mask[:, None, None, :], dim=3)  # (batch, extractors, i, j)
        weights = (attention * mean_weights(mask)[:, None, :, None]).sum(dim=2)  # (batch, extractors, j)
        pooled = torch.bmm(weights.to(hidden_states.dtype), hidden_states)  # (batch, extractors, hidden)
        rows = [e.projection(part) for e, part in zip(extractors, pooled.unbind(dim=1), strict=True)]
        return torch.stack(rows, dim=1)


class PerspectiveExtractors(nn.ModuleList):
    r"""One extractor for each perspective, over the same tokens (ours; the paper keeps a single vector).

    .. math:: r_p = R_p(H, M), \quad p = 1 \ldots P

    The values are those of the extractors one by one; what does not depend on the perspective is computed once.
    Parameters are named by position: `0.projection.weight`, ...

    Args:
        extractors: P extractors of one class and size.
    """

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Map `(batch, length, hidden)` and a mask `(batch, length)` to `(batch, perspectives, latent_dim)`."""
        extractors: list[Any] = list(self)
        latents: Tensor = extractors[0].together(extractors, hidden_states, mask)
        return latents


class PerspectiveGate(nn.Linear):
    r"""How much each perspective's latent counts for a pair (ours).

    .. math:: w = \mathrm{softmax}(G\, h_{cls} + b) \in \mathbb{R}^P, \quad r_{qp} = \sum_p w_p\, r_p

    G and b begin at zero, so r_qp begins as the mean of the perspectives' latents.

    Args:
        in_features: Size of h_cls.
        out_features: P.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map h_cls `(batch, hidden)` to weights `(batch, perspectives)` that sum to 1, in float32."""
        return super().forward(input).float().softmax(dim=1)
