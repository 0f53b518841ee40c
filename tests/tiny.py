"""Tiny random encoders and a tokenizer, built in a moment and without a download."""

from __future__ import annotations

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = [*string.ascii_lowercase, *string.digits, *string.punctuation]
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL, *LETTERS, *(f"##{c}" for c in LETTERS)])}
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 160,
}
FAMILIES = ("bert", "xlm-roberta", "modernbert", "deberta-v2")


def tiny_config(family: str = "bert", **options: object) -> PretrainedConfig:
    if family == "bert":
        return BertConfig(**{**SIZES, **options})
    if family == "xlm-roberta":
        return XLMRobertaConfig(**{**SIZES, "pad_token_id": 0, **options})
    if family == "modernbert":
        special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        return ModernBertConfig(**{**SIZES, **special, "local_attention": 8, **options})
    if family == "deberta-v2":
        relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
        return DebertaV2Config(**{**SIZES, **relative, "type_vocab_size": 0, **options})
    raise ValueError(family)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """WordPiece over single characters: anything in ASCII is in its vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(VOCABULARY, unk_token="[UNK]", max_input_chars_per_word=200))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def save_tiny_encoder(folder: Path, family: str = "bert", **options: object) -> Path:
    """Save a random encoder with its tokenizer, as a pretrained one would lie on disk."""
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(family, **options)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_batch(rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids with a different number of valid tokens in each row: `length`, `length - 1`, ..."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(len(SPECIAL), len(VOCABULARY), (rows, length), generator=generator)
    valid = length - torch.arange(rows)
    attention_mask = (torch.arange(length) < valid.unsqueeze(1)).long()
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}


def save_tiny_embedder(folder: Path) -> Path:
    """Save a random sentence-transformers model: the mean of the tiny encoder's tokens, 16 numbers."""
    from sentence_transformers import SentenceTransformer, models

    encoder = save_tiny_encoder(folder.with_name(f"{folder.name}_encoder"))
    SentenceTransformer(modules=[models.Transformer(str(encoder)), models.Pooling(16)], device="cpu").save(str(folder))
    return folder
