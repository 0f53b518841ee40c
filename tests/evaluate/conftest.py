"""A tiny random BERT classifier with a word-level tokenizer, and a few pairs whose words it knows."""

import pandas as pd
import pytest

from recipes.schemas import PAIRS, load_labels, write

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
WORDS = [
    *SPECIAL,
    "red",
    "blue",
    "shoe",
    "phone",
    "case",
    "lamp",
    "oak",
    "table",
    "cup",
    "for",
    "kids",
    "men",
    "wool",
    "hat",
]


@pytest.fixture(scope="session")
def schema():
    return load_labels("esci")


@pytest.fixture(scope="session")
def build_checkpoint(tmp_path_factory):
    """Save a tiny classifier with the given label names and return its folder."""

    def build(labels, poison=False):
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers, processors
        from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

        folder = tmp_path_factory.mktemp("checkpoint")
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="[PAD]",
            unk_token="[UNK]",
            cls_token="[CLS]",
            sep_token="[SEP]",
            model_max_length=64,
            model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        ).save_pretrained(folder)
        torch.manual_seed(0)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(WORDS),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=64,
                initializer_range=0.5,
                id2label=dict(enumerate(labels)),
                label2id={label: index for index, label in enumerate(labels)},
            )
        )
        if poison:
            model.classifier.weight.data.fill_(float("nan"))
        model.save_pretrained(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def checkpoint(build_checkpoint, schema):
    return build_checkpoint(schema.names)


@pytest.fixture(scope="session")
def pairs():
    """Titles of very different lengths, so that batching by length reorders the rows."""
    titles = ["oak table", "red shoe for men", "lamp " * 30, "cup", "hat for kids red blue", "phone case", "hat"]
    queries = ["table", "shoe", "lamp", "table", "hat", "phone", "hat"]
    return pd.DataFrame(
        {
            "pair_id": [f"p{row}" for row in range(len(titles))],
            "query": queries,
            "product_title": titles,
            "locale": ["us", "us", "us", "us", "es", "es", "es"],
            "label": ["E", "Exact", "exact", "I", "Substitute", "C", "E"],
        }
    )


@pytest.fixture(scope="session")
def pairs_folder(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write(pairs, folder / "test.parquet", PAIRS)
    return folder
