"""One latent for each perspective: the equations written out, what is guided, and what is saved."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification, LRKDModel
from modeling_lrkd.extractors_lrkd import PerspectiveExtractors
from tests.modeling.test_extractors import literal_gat, literal_mlp, literal_poly
from tests.modeling.test_extractors import make as make_extractor
from tests.tiny import random_batch, tiny_config

NAMES = ["user_intent", "structured_analysis", "business_rule"]
SIZE = 6
LITERAL = {"mlp": literal_mlp, "poly": literal_poly, "gat": literal_gat}


def build(extractor_type="gat", perspectives=NAMES, seed=0, **options):
    torch.manual_seed(seed)
    config = LRKDConfig(
        encoder_config=tiny_config(),
        extractor_type=extractor_type,
        perspectives=perspectives,
        reasoning_dim=SIZE,
        num_labels=4,
        **options,
    )
    model = LRKDForSequenceClassification(config).eval()
    if perspectives is not None:
        torch.nn.init.normal_(model.perspective_gate.weight)  # a gate that has learnt to tell pairs apart
    return model


def embeddings(rows=3, perspectives=3, seed=0):
    return torch.randn(rows, perspectives, SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("latent_dim", [12, 5])
@pytest.mark.parametrize("kind", ["mlp", "poly", "gat"])
def test_together_they_are_the_equations_one_by_one(kind, latent_dim):
    extractors = []
    for seed in range(3):
        extractor, literal = make_extractor(kind, latent_dim)
        torch.manual_seed(seed)
        for parameter in extractor.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        extractors.append(extractor)
    hidden_states = torch.randn(2, 5, 12, requires_grad=True)
    mask = torch.tensor([[True] * 5, [True, False, True, True, False]])
    together = PerspectiveExtractors(extractors)
    direction = torch.randn(2, 3, latent_dim)
    results = []
    for latents in (
        together(hidden_states, mask),
        torch.stack([literal(extractor, hidden_states, mask) for extractor in extractors], dim=1),
    ):
        gradients = torch.autograd.grad((latents * direction).sum(), [hidden_states, *together.parameters()])
        results.append((latents.detach(), *gradients))
    for pooled, written_out in zip(*results):
        torch.testing.assert_close(pooled, written_out, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together(hidden_states, mask.long()), results[0][0])


@pytest.mark.parametrize("layers", [1, 3])
def test_mlps_of_any_depth(layers):
    model = build("mlp", num_extractor_layers=layers)
    output = LRKDModel.forward(model, **random_batch())
    mask = random_batch()["attention_mask"].bool()
    alone = [extractor(output.last_hidden_state, mask) for extractor in model.extractor]
    torch.testing.assert_close(output.perspective_latents, torch.stack(alone, dim=1))


@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat"])
def test_the_gate_and_the_sum_written_out(extractor_type):
    model = build(extractor_type)
    output, logits = LRKDModel.forward(model, **random_batch()), model(**random_batch()).logits
    mask = random_batch()["attention_mask"].bool()
    for row in range(3):
        scores = model.perspective_gate.weight @ output.pooler_output[row] + model.perspective_gate.bias
        weights = torch.exp(scores) / torch.exp(scores).sum()
        latents = [
            LITERAL[extractor_type](extractor, output.last_hidden_state[row : row + 1], mask[row : row + 1])[0]
            for extractor in model.extractor
        ]
        reasoning = sum(weight * latent for weight, latent in zip(weights, latents))
        fused = torch.cat([output.pooler_output[row], reasoning])
        close = {"atol": 1e-5, "rtol": 1e-4}
        torch.testing.assert_close(output.perspective_weights[row], weights, **close)
        torch.testing.assert_close(output.perspective_latents[row], torch.stack(latents), **close)
        torch.testing.assert_close(output.latent_reasoning[row], reasoning, **close)
        torch.testing.assert_close(logits[row], model.classifier(fused), **close)
        # Projecting the mixture is mixing the projections.
        mixed = sum(weight * model.reasoning_projection(latent) for weight, latent in zip(weights, latents))
        torch.testing.assert_close(output.projected_reasoning[row], mixed, **close)
    assert output.perspective_weights.std(dim=0).min() > 0  # pairs differ, or nothing was tested


def test_it_begins_as_the_mean_of_the_perspectives():
    torch.manual_seed(0)
    config = LRKDConfig(encoder_config=tiny_config(), perspectives=NAMES, reasoning_dim=SIZE)
    output = LRKDModel(config).eval()(**random_batch())
    torch.testing.assert_close(output.perspective_weights, torch.full((3, 3), 1 / 3))
    torch.testing.assert_close(output.latent_reasoning, output.perspective_latents.mean(dim=1))


@pytest.mark.parametrize("loss", ["mse", "cosine", "infonce"])
@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat"])
def test_one_perspective_is_the_single_vector(extractor_type, loss):
    single = build(extractor_type, None, guidance_loss=loss)
    one = build(extractor_type, ["unified"], guidance_loss=loss)
    state = {name.replace("extractor.", "extractor.0."): value for name, value in single.state_dict().items()}
    assert set(one.state_dict()) - set(state) == {"perspective_gate.weight", "perspective_gate.bias"}
    one.load_state_dict(state, strict=False)
    labels, given, mask = torch.tensor([0, 1, 2]), embeddings(perspectives=1), torch.tensor([1, 0, 1])
    alone = single(**random_batch(), labels=labels, cot_embeddings=given[:, 0], cot_mask=mask)
    output = one(**random_batch(), labels=labels, cot_embeddings=given, cot_mask=mask.unsqueeze(1))
    for name in ("loss", "logits", "latent_reasoning", "projected_reasoning", "guidance_loss"):
        torch.testing.assert_close(output[name], alone[name])
    assert torch.equal(output.perspective_weights, torch.ones(3, 1))
    assert alone.perspective_weights is alone.perspective_latents is None


def test_guidance_by_hand_is_averaged_over_pairs_and_perspectives():
    """Off by 2 in six dimensions: 24 for each of the 4 that are guided, of 3 x 3."""
    model = build()
    projected = model.reasoning_projection(model(**random_batch()).perspective_latents).detach()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1]])
    output = model(**random_batch(), cot_embeddings=projected + 2, cot_mask=mask)
    assert output.guidance_loss.item() == pytest.approx(4 * 24 / 9, rel=1e-5)
    assert model(**random_batch(), cot_embeddings=projected).guidance_loss.item() == pytest.approx(0, abs=1e-8)


def test_infonce_contrasts_pairs_within_a_perspective():
    model, given = build(guidance_loss="infonce", guidance_temperature=0.5), embeddings()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]])
    projected = F.normalize(model.reasoning_projection(model(**random_batch()).perspective_latents), dim=2)
    expected = 0.0
    for p in range(3):
        rows = mask[:, p].nonzero().squeeze(1)
        scores = projected[rows, p] @ F.normalize(given[rows, p], dim=1).T / 0.5
        expected += sum(torch.logsumexp(scores[n], 0) - scores[n, n] for n in range(len(rows))) / 9
    torch.testing.assert_close(model(**random_batch(), cot_embeddings=given, cot_mask=mask).guidance_loss, expected)


@pytest.mark.parametrize("loss", ["mse", "cosine", "infonce"])
def test_only_the_guided_perspectives_learn_and_masked_ones_are_not_looked_at(loss):
    model, given = build(guidance_loss=loss), embeddings()
    given[:, 1] = math.nan
    mask = torch.tensor([[1, 0, 1]] * 3)
    model(**random_batch(), cot_embeddings=given, cot_mask=mask).guidance_loss.backward()
    for position, extractor in enumerate(model.extractor):
        for name, parameter in extractor.named_parameters():
            moved = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
            assert moved == (position != 1), (position, name)
    assert torch.isfinite(model.reasoning_projection.weight.grad).all()
    assert model.perspective_gate.weight.grad is None  # the gate answers to the classification alone
    model(**random_batch(), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert model.perspective_gate.weight.grad.abs().sum() > 0


def test_slices_of_a_batch_average_to_the_whole():
    model, batch = build(), random_batch(rows=4)
    given = {"labels": torch.arange(4), "cot_embeddings": embeddings(4), "cot_mask": torch.eye(4, 3)}
    given |= batch
    halves = [model(**{name: value[rows] for name, value in given.items()}).loss for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(model(**given).loss, (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat"])
def test_padding_changes_nothing_and_bfloat16_is_near(extractor_type):
    model, batch = build(extractor_type), random_batch(rows=1, length=7)
    padded = {name: F.pad(value, (0, 5)) for name, value in batch.items()}
    whole = model(**batch)
    torch.testing.assert_close(whole.logits, model(**padded).logits, atol=1e-5, rtol=1e-5)
    half = model.to(torch.bfloat16)(**batch, labels=torch.tensor([1]), cot_embeddings=embeddings(1))
    assert torch.isfinite(half.loss)
    torch.testing.assert_close(half.logits.float(), whole.logits, atol=0.05, rtol=0.05)
    torch.testing.assert_close(half.perspective_weights, whole.perspective_weights, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat"])
def test_saved_and_loaded_it_is_the_same_model(extractor_type, tmp_path):
    model, batch = build(extractor_type), random_batch()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.config.perspectives == NAMES
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    torch.testing.assert_close(headless(**batch).perspective_weights, model(**batch).perspective_weights)
    added = {name for name in load_file(tmp_path / "model.safetensors") if name.startswith(("extractor", "persp"))}
    ours = {"gat": ("attention", "projection.weight"), "poly": ("codes",)}.get(extractor_type)
    ours = ours or [f"layers.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias")]
    gate = {"perspective_gate.weight", "perspective_gate.bias"}
    assert added == {f"extractor.{position}.{name}" for position in range(3) for name in ours} | gate


@pytest.mark.parametrize("extractor_type", ["mlp", "poly", "gat"])
def test_exported_it_gives_the_same_for_any_batch_and_length(extractor_type):
    model = build(extractor_type)
    batch, longer = random_batch(rows=2, length=6), random_batch(rows=3, length=9)
    rows, length = torch.export.Dim("batch"), torch.export.Dim("length", max=64)
    sizes = {name: {0: rows, 1: length} for name in batch}
    program = torch.export.export(model, (), kwargs=dict(batch), dynamic_shapes=sizes).module()
    torch.testing.assert_close(program(**longer).logits, model(**longer).logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(program(**longer).perspective_weights, model(**longer).perspective_weights)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"cot_embeddings": torch.zeros(3, SIZE)}, r"expected shape \(3, 3, 6\).*user_intent.*got \(3, 6\)"),
        ({"cot_embeddings": torch.zeros(3, 2, SIZE)}, r"expected shape \(3, 3, 6\).*got \(3, 2, 6\)"),
        (
            {"cot_embeddings": torch.zeros(3, 3, SIZE), "cot_mask": torch.ones(3)},
            r"cot_mask: expected shape \(3, 3\) \(batch, perspectives\), got \(3,\)",
        ),
        ({"cot_embeddings": torch.full((3, 3, SIZE), math.nan)}, "NaN or infinite"),
    ],
)
def test_bad_shapes_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        build()(**random_batch(), **given)


@pytest.mark.parametrize("perspectives", [[], ["a", "a"], ["a", " "], [1], "unified"])
def test_bad_names_are_refused(perspectives):
    with pytest.raises(ValueError, match="perspectives: expected a list of distinct names"):
        LRKDConfig(encoder_config=tiny_config(), perspectives=perspectives)


@pytest.mark.parametrize("extractor_type", ["none", "cls"])
def test_perspectives_need_an_extractor(extractor_type):
    with pytest.raises(ValueError, match=f"perspectives: need an extractor .*{extractor_type}"):
        LRKDConfig(encoder_config=tiny_config(), perspectives=NAMES, extractor_type=extractor_type)
