import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForSequenceClassification

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification, LRKDModel
from tests.tiny import FAMILIES, random_batch, save_tiny_encoder, tiny_config

EXTRACTORS = ("mlp", "poly", "gat")
TYPES = (*EXTRACTORS, "none", "cls")
REASONING_DIM = 6


def build(extractor_type="gat", family="bert", seed=0, attn_implementation=None, **options):
    torch.manual_seed(seed)
    config = LRKDConfig(
        encoder_config=tiny_config(family, **options.pop("encoder", {})),
        extractor_type=extractor_type,
        reasoning_dim=REASONING_DIM,
        num_labels=options.pop("num_labels", 4),
        **options,
    )
    implementation = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    return LRKDForSequenceClassification._from_config(config, **implementation).eval()


def targets(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "labels": torch.arange(rows) % 4,
        "cot_embeddings": torch.randn(rows, REASONING_DIM, generator=generator),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extractor_type", TYPES)
def test_shapes(family, extractor_type):
    model = build(extractor_type, family)
    output = model(**random_batch(), **targets())
    assert output.logits.shape == (3, 4)
    if extractor_type == "none":
        assert output.latent_reasoning is output.projected_reasoning is output.guidance_loss is None
        assert model.reasoning_projection is model.extractor is None
        torch.testing.assert_close(output.loss, output.classification_loss)
    else:
        assert output.latent_reasoning.shape == (3, 16)
        assert output.projected_reasoning.shape == (3, REASONING_DIM)
        torch.testing.assert_close(output.loss, output.classification_loss + 0.1 * output.guidance_loss)


def test_the_ablation_without_extractor_uses_h_cls_for_both():
    model = build("cls")
    features = LRKDModel.forward(model, **random_batch())
    assert torch.equal(features.latent_reasoning, features.pooler_output)
    assert model.classifier.in_features == 16
    output = model(**random_batch())
    torch.testing.assert_close(output.logits, model.classifier(features.pooler_output))


@pytest.mark.parametrize(("fuse", "size"), [("raw", 32), ("projected", 16 + REASONING_DIM)])
def test_the_classifier_sees_h_cls_and_the_reasoning(fuse, size):
    model = build("gat", fuse=fuse)
    output, features = model(**random_batch()), LRKDModel.forward(model, **random_batch())
    reasoning = features.latent_reasoning if fuse == "raw" else features.projected_reasoning
    fused = torch.cat([features.pooler_output, reasoning], dim=1)
    assert model.classifier.in_features == fused.shape[1] == size
    torch.testing.assert_close(output.logits, fused @ model.classifier.weight.T + model.classifier.bias)


@pytest.mark.parametrize("extractor_type", EXTRACTORS)
def test_a_latent_of_its_own_size(extractor_type):
    output = build(extractor_type, extractor_dim=5)(**random_batch(), **targets())
    assert output.latent_reasoning.shape == (3, 5)
    assert output.projected_reasoning.shape == (3, REASONING_DIM)


def test_pooling():
    batch = random_batch()
    first, mean, own = (build("none", pooling=pooling) for pooling in ("cls", "mean", "pooler"))
    assert first.encoder.pooler is mean.encoder.pooler is None
    valid = batch["attention_mask"].unsqueeze(2).float()
    expected = {
        first: first.encoder(**batch).last_hidden_state[:, 0],
        mean: (mean.encoder(**batch).last_hidden_state * valid).sum(1) / valid.sum(1),
        own: own.encoder(**batch).pooler_output,
    }
    modern = build("none", "modernbert")  # has no pooler of its own: the first token stands in
    expected[modern] = modern.encoder(**batch).last_hidden_state[:, 0]
    for model, pooled in expected.items():
        torch.testing.assert_close(LRKDModel.forward(model, **batch).pooler_output, pooled)


# Guidance loss (eq. 8)


def project(model):
    return model(**random_batch()).projected_reasoning.detach()


@pytest.mark.parametrize("loss", ["mse", "cosine"])
def test_guidance_is_zero_where_the_latent_is_the_embedding(loss):
    model = build(guidance_loss=loss)
    guidance = model(**random_batch(), cot_embeddings=project(model)).guidance_loss
    assert abs(guidance.item()) < 1e-6


@pytest.mark.parametrize(("reduction", "expected"), [("sum", REASONING_DIM * 4.0), ("mean", 4.0)])
def test_squared_error_by_hand(reduction, expected):
    model = build(guidance_reduction=reduction)
    output = model(**random_batch(), cot_embeddings=project(model) + 2.0)
    assert output.guidance_loss.item() == pytest.approx(expected, rel=1e-5)
    assert output.loss.item() == pytest.approx(0.1 * expected, rel=1e-5)  # no labels: guidance alone


def test_cosine_by_hand():
    model = build(guidance_loss="cosine")
    assert model(**random_batch(), cot_embeddings=-3 * project(model)).guidance_loss.item() == pytest.approx(2.0)


def test_infonce_against_the_formula():
    model = build(guidance_loss="infonce", guidance_temperature=0.5)
    embeddings = targets()["cot_embeddings"]
    mask = torch.tensor([1, 0, 1])
    kept = [0, 2]
    projected = F.normalize(project(model)[kept], dim=1)
    scores = projected @ F.normalize(embeddings[kept], dim=1).T / 0.5
    expected = sum(torch.logsumexp(scores[row], 0) - scores[row, row] for row in range(2)) / 3
    guidance = model(**random_batch(), cot_embeddings=embeddings, cot_mask=mask).guidance_loss
    torch.testing.assert_close(guidance, expected)


@pytest.mark.parametrize("loss", ["mse", "cosine", "infonce"])
def test_masked_rows_add_nothing_whatever_they_hold(loss):
    model = build(guidance_loss=loss)
    embeddings = targets()["cot_embeddings"]
    spoiled = embeddings.clone()
    spoiled[1] = math.nan
    mask = torch.tensor([True, False, True])
    gradients = []
    for given in (embeddings, spoiled):
        model.zero_grad()
        guidance = model(**random_batch(), cot_embeddings=given, cot_mask=mask).guidance_loss
        guidance.backward()
        gradients.append((guidance.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
    for one, other in zip(*gradients):
        assert torch.isfinite(other).all()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("loss", ["mse", "cosine", "infonce"])
def test_a_batch_without_any_rationale_has_guidance_zero(loss):
    output = build(guidance_loss=loss)(**random_batch(), **targets(), cot_mask=torch.zeros(3))
    assert output.guidance_loss.item() == 0.0
    torch.testing.assert_close(output.loss, output.classification_loss)


def test_slices_of_a_batch_average_to_the_whole():
    """What gradient accumulation and data parallel training rest on, with masked rows too."""
    model, batch = build(), random_batch(rows=4, length=9)
    given = {**batch, **targets(4), "cot_mask": torch.tensor([1, 0, 0, 1])}
    whole = model(**given).loss
    halves = [model(**{name: value[rows] for name, value in given.items()}).loss for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2)


# Bad input


def test_a_mask_without_a_valid_token_is_refused():
    batch = random_batch()
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match="attention_mask: row 1 has no valid token"):
        build()(**batch)


def test_embeddings_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"expected shape \(3, 6\).*got \(3, 8\).*reasoning_dim"):
        build()(**random_batch(), cot_embeddings=torch.zeros(3, 8))


def test_nan_embeddings_are_refused():
    embeddings = torch.zeros(3, REASONING_DIM)
    embeddings[2, 0] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        build()(**random_batch(), cot_embeddings=embeddings)


def test_no_input_is_refused():
    with pytest.raises(ValueError, match="input_ids"):
        build()()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model\.safetensors is truncated or damaged.*save the model again"):
        LRKDForSequenceClassification.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    os.remove(tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        LRKDForSequenceClassification.from_pretrained(tmp_path)


# Laws


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extractor_type", TYPES)
def test_padding_changes_nothing(family, extractor_type):
    model = build(extractor_type, family)
    batch = random_batch(rows=1, length=7)
    padded = {name: F.pad(value, (0, 5)) for name, value in batch.items()}
    torch.testing.assert_close(model(**batch).logits, model(**padded).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extractor_type", TYPES)
def test_a_row_scores_the_same_alone_and_in_a_batch(extractor_type):
    model, batch = build(extractor_type), random_batch()
    whole = model(**batch).logits
    for row in range(3):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits
        torch.testing.assert_close(alone[0], whole[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_sdpa_equals_eager(family):
    logits = []
    for implementation in ("sdpa", "eager"):
        model = build("gat", family, attn_implementation=implementation)
        assert model.encoder.config._attn_implementation == implementation
        logits.append(model(**random_batch()).logits)
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("extractor_type", TYPES)
def test_bfloat16_is_finite_and_near(extractor_type):
    model = build(extractor_type)
    single = model(**random_batch(), **targets())
    half = model.to(torch.bfloat16)(**random_batch(), **targets())
    assert half.logits.dtype is torch.bfloat16
    assert torch.isfinite(half.loss)
    torch.testing.assert_close(half.logits.float(), single.logits, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extractor_type", TYPES)
def test_every_parameter_learns(family, extractor_type):
    encoder = {"pad_token_id": 0} if family == "bert" else {}
    model = build(extractor_type, family, encoder=encoder).train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(2):
        model(**random_batch(seed=seed), **targets(seed=seed)).loss.backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    # Attention over keys ignores a bias common to all keys; what has no gradient in the encoder alone is not ours.
    assert [name for name in still if not name.startswith("encoder.")] == []
    assert len(still) < len(before) / 4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(family):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if family != "modernbert" else {}
    model = build("gat", family, encoder=options, classifier_dropout=0.0).train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model.zero_grad()
        model(**random_batch(), **targets()).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("family", FAMILIES)
def test_token_embeddings_can_be_resized(family, tmp_path):
    model = build("gat", family)
    before = model(**random_batch()).logits
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 3)
    assert model.config.vocab_size == model.config.encoder_config.vocab_size == size + 3
    torch.testing.assert_close(model(**random_batch()).logits, before)
    model.save_pretrained(tmp_path)
    loaded = LRKDForSequenceClassification.from_pretrained(tmp_path)
    assert loaded.get_input_embeddings().num_embeddings == size + 3
    assert torch.isfinite(loaded(input_ids=torch.tensor([[size + 2, 5]])).logits).all()


def test_outputs_as_a_tuple_and_on_request():
    model = build("gat", attn_implementation="eager")
    output = model(**random_batch(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert output.attentions[0].shape == (3, 2, 9, 9)
    as_tuple = model(**random_batch(), return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def test_input_embeddings_instead_of_ids():
    model, batch = build(), random_batch()
    embedded = model.get_input_embeddings()(batch["input_ids"])
    torch.testing.assert_close(
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits, model(**batch).logits
    )


# Saving and loading


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extractor_type", TYPES)
def test_saved_and_loaded_it_is_the_same_model(family, extractor_type, tmp_path):
    model = build(extractor_type, family)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bank_lrkd.py",
        "config.json",
        "configuration_lrkd.py",
        "extractors_lrkd.py",
        "model.safetensors",
        "modeling_lrkd.py",
        "pipeline_lrkd.py",
        "separation_lrkd.py",
    ]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is LRKDForSequenceClassification
    torch.testing.assert_close(loaded(**random_batch()).logits, model(**random_batch()).logits)
    headless = AutoModel.from_pretrained(tmp_path)
    assert type(headless) is LRKDModel
    torch.testing.assert_close(
        headless(**random_batch()).pooler_output, LRKDModel.forward(model, **random_batch()).pooler_output
    )


def test_checkpoint_names(tmp_path):
    build("gat").save_pretrained(tmp_path)
    names = {name for name in load_file(tmp_path / "model.safetensors") if not name.startswith("encoder.")}
    assert names == {
        "extractor.attention",
        "extractor.projection.weight",
        "reasoning_projection.weight",
        "reasoning_projection.bias",
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_encoder_takes_the_pretrained_weights(family, pooling, tmp_path):
    folder = save_tiny_encoder(tmp_path / "encoder", family)
    encoder = AutoModel.from_pretrained(folder).eval()
    model = LRKDForSequenceClassification.from_encoder(
        str(folder), extractor_type="mlp", pooling=pooling, reasoning_dim=5, id2label={0: "Exact", 1: "Irrelevant"}
    )
    assert not model.training
    assert model.config.id2label == {0: "Exact", 1: "Irrelevant"}
    batch = random_batch()
    torch.testing.assert_close(LRKDModel.forward(model, **batch).last_hidden_state, encoder(**batch).last_hidden_state)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_from_encoder_takes_the_attention_asked_for(implementation, tmp_path):
    folder = save_tiny_encoder(tmp_path)
    model = LRKDForSequenceClassification.from_encoder(str(folder), attn_implementation=implementation)
    assert model.encoder.config._attn_implementation == implementation


def test_from_encoder_refuses_an_unknown_option(tmp_path):
    folder = save_tiny_encoder(tmp_path)
    with pytest.raises(TypeError, match=r"unknown option 'extractor'.*extractor_type"):
        LRKDForSequenceClassification.from_encoder(str(folder), extractor="gat")
