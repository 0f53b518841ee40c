import pytest
import torch
from transformers import AutoConfig, BertConfig

from modeling_lrkd import LRKDConfig, LRKDForSequenceClassification
from tests.tiny import FAMILIES, tiny_config

MBERT = {"vocab_size": 105879}  # bert-base-multilingual-uncased; the rest is BertConfig's default


def count(**options):
    with torch.device("meta"):
        model = LRKDForSequenceClassification(LRKDConfig(encoder_config=BertConfig(**MBERT), **options))
    return model.num_parameters()


@pytest.mark.parametrize(
    ("extractor_type", "parameters"),
    [("cls", 168_148_486), ("mlp", 169_334_278), ("poly", 168_177_670), ("gat", 168_744_454)],
)
def test_parameter_counts_are_those_of_table_2(extractor_type, parameters):
    assert count(extractor_type=extractor_type, num_labels=6) == parameters


def test_projected_fusion_is_the_other_reading_of_table_2():
    projected = count(extractor_type="gat", num_labels=4, fuse="projected")
    # The paper's own figures are rounded to 10,000: 168.74 M.
    assert round(projected / 1e6, 2) == 168.74


@pytest.mark.parametrize("family", FAMILIES)
def test_configuration_survives_saving(family, tmp_path):
    config = LRKDConfig(
        encoder_config=tiny_config(family),
        extractor_type="poly",
        num_codes=7,
        guidance_loss="cosine",
        id2label={0: "Exact", 1: "Irrelevant"},
        label2id={"Exact": 0, "Irrelevant": 1},
        label_gains=[1.0, 0.0],
        temperature=1.7,
        tier_thresholds=[0.1, 0.5],
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LRKDConfig
    assert type(loaded.encoder_config) is type(config.encoder_config)
    for name in ("num_codes", "guidance_loss", "id2label", "label_gains", "temperature", "tier_thresholds"):
        assert getattr(loaded, name) == getattr(config, name), name
    assert (loaded.hidden_size, loaded.vocab_size) == (config.hidden_size, config.vocab_size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extractor_type": "gnn"}, "extractor_type: expected one of mlp, poly, gat, none, cls, got 'gnn'"),
        ({"pooling": "max"}, "pooling: expected one of"),
        ({"fuse": "sum"}, "fuse: expected one of raw, projected"),
        ({"guidance_loss": "l1"}, "guidance_loss: expected one of"),
        ({"guidance_reduction": "none"}, "guidance_reduction: expected one of sum, mean"),
        ({"guidance_weight": -0.1}, "guidance_weight: expected λ >= 0"),
        ({"num_codes": 0}, "num_codes: expected a positive number, got 0"),
        ({"reasoning_dim": -4}, "reasoning_dim: expected a positive number"),
        ({"extractor_dim": 0}, "extractor_dim: expected a positive number"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"encoder_config": {"hidden_size": 8}}, "encoder_config: a dict needs `model_type`"),
        ({"num_labels": 3, "label_gains": [1.0]}, "label_gains: expected 3 gains"),
        ({"tier_thresholds": [0.5, 0.1]}, "tier_thresholds: expected ascending"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("[", r"\[")):
        LRKDConfig(**options)


def test_vocab_size_and_hidden_size_are_the_encoders():
    config = LRKDConfig(encoder_config=tiny_config())
    config.vocab_size = 321
    assert config.encoder_config.vocab_size == 321
    assert config.hidden_size == config.encoder_config.hidden_size == 16
    assert config.max_position_embeddings == 160
    behind_padding = tiny_config("xlm-roberta", pad_token_id=1)  # positions 0 and 1 are no token's
    assert LRKDConfig(encoder_config=behind_padding).max_position_embeddings == 158
