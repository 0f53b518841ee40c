"""The pooled extractors against equations 10-16 written out token by token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from modeling_lrkd import LRKDConfig, LRKDModel
from modeling_lrkd.extractors_lrkd import GATExtractor, MLPExtractor, PolyExtractor
from tests.tiny import tiny_config

HIDDEN = 12


def literal_mlp(extractor, hidden_states, mask):
    """Eq. 10-11, one row at a time, over its valid tokens."""
    rows = []
    for tokens, valid in zip(hidden_states, mask):
        transformed = tokens
        for position, layer in enumerate(extractor.layers):
            transformed = transformed @ layer.weight.T + layer.bias
            if position < len(extractor.layers) - 1:
                transformed = F.gelu(transformed)
        rows.append((transformed * valid.float().unsqueeze(1)).sum(0) / valid.float().sum())
    return torch.stack(rows)


def literal_poly(extractor, hidden_states, mask):
    """Eq. 12-13."""
    rows = []
    for tokens, valid in zip(hidden_states, mask):
        nodes = tokens if extractor.projection is None else tokens @ extractor.projection.weight.T
        bias = torch.where(valid, 0.0, -torch.inf).unsqueeze(1)
        attention = torch.softmax(nodes @ extractor.codes.T / nodes.shape[1] ** 0.5 + bias, dim=0)  # (L, K)
        rows.append((attention.T @ nodes).mean(0))
    return torch.stack(rows)


def literal_gat(extractor, hidden_states, mask):
    """Eq. 14-16 over the graph of valid tokens."""
    rows = []
    for tokens, valid in zip(hidden_states, mask):
        nodes = tokens[valid] @ extractor.projection.weight.T  # W h
        new_nodes = []
        for i in range(len(nodes)):
            scores = [
                F.leaky_relu(extractor.attention @ torch.cat([nodes[i], nodes[j]]), extractor.negative_slope)
                for j in range(len(nodes))
            ]
            new_nodes.append(torch.softmax(torch.stack(scores), dim=0) @ nodes)
        rows.append(torch.stack(new_nodes).mean(0))
    return torch.stack(rows)


def make(kind, latent_dim=HIDDEN):
    torch.manual_seed(1)
    if kind == "mlp":
        extractor, literal = MLPExtractor(HIDDEN, latent_dim), literal_mlp
    elif kind == "poly":
        extractor, literal = PolyExtractor(HIDDEN, latent_dim, num_codes=5), literal_poly
    else:
        extractor, literal = GATExtractor(HIDDEN, latent_dim), literal_gat
    for parameter in extractor.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return extractor, literal


@st.composite
def masks(draw):
    """Any mask that keeps at least one token a row, holes and left padding included."""
    length = draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=length, max_size=length).filter(any)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=3)))


@pytest.mark.parametrize("latent_dim", [HIDDEN, 5])
@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
@given(mask=masks(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_pooled_equals_the_equations_and_so_do_the_gradients(kind, latent_dim, mask, seed):
    extractor, literal = make(kind, latent_dim)
    torch.manual_seed(seed)
    hidden_states = torch.randn(*mask.shape, HIDDEN, requires_grad=True)
    direction = torch.randn(len(mask), latent_dim)
    results = []
    for compute in (lambda: extractor(hidden_states, mask), lambda: literal(extractor, hidden_states, mask)):
        latent = compute()
        gradients = torch.autograd.grad((latent * direction).sum(), [hidden_states, *extractor.parameters()])
        results.append((latent.detach(), *gradients))
    for pooled, written_out in zip(*results):
        torch.testing.assert_close(pooled, written_out, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_at_the_size_of_bert(kind):
    torch.manual_seed(0)
    config = LRKDConfig(encoder_config=tiny_config(hidden_size=768, num_attention_heads=12), extractor_type=kind)
    extractor = LRKDModel(config).extractor
    hidden_states = torch.randn(2, 64, 768)
    mask = torch.arange(64) < torch.tensor([[64], [37]])
    literal = {"mlp": literal_mlp, "poly": literal_poly, "gat": literal_gat}[kind]
    with torch.no_grad():
        torch.testing.assert_close(
            extractor(hidden_states, mask), literal(extractor, hidden_states, mask), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_padding_changes_nothing(kind):
    extractor, _ = make(kind)
    hidden_states = torch.randn(2, 5, HIDDEN)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    padded = torch.cat([hidden_states, torch.full((2, 4, HIDDEN), 1e4)], dim=1)
    padded_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(extractor(hidden_states, mask), extractor(padded, padded_mask))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_a_mask_of_ones_and_zeros_is_a_mask(kind, dtype):
    extractor, _ = make(kind)
    hidden_states, mask = torch.randn(2, 5, HIDDEN), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert torch.equal(extractor(hidden_states, mask), extractor(hidden_states, mask.to(dtype)))


@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_token_order_does_not_matter(kind):
    extractor, _ = make(kind)
    hidden_states = torch.randn(1, 6, HIDDEN)
    mask = torch.tensor([[True] * 6])
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    torch.testing.assert_close(extractor(hidden_states, mask), extractor(hidden_states[:, order], mask))


def test_one_token_is_its_own_neighbourhood():
    extractor, _ = make("gat")
    token = torch.randn(1, 1, HIDDEN)
    torch.testing.assert_close(extractor(token, torch.tensor([[True]])), extractor.projection(token[:, 0]))


def test_parameter_names_and_shapes():
    shapes = {
        kind: {name: tuple(p.shape) for name, p in make(kind)[0].named_parameters()} for kind in ("mlp", "poly", "gat")
    }
    assert shapes == {
        "mlp": {
            "layers.0.weight": (12, 12),
            "layers.0.bias": (12,),
            "layers.1.weight": (12, 12),
            "layers.1.bias": (12,),
        },
        "poly": {"codes": (5, 12)},
        "gat": {"attention": (24,), "projection.weight": (12, 12)},
    }
