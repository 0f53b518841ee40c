"""A tiny random Qwen3 with a chat tokenizer of its own, and a LoRA adapter for it, built in a moment."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
RECIPES = Path(__file__).parents[1] / "recipes"


def lines() -> list[str]:
    """Texts to learn the merges from: the prompts' own, which so become short."""
    return [path.read_text() for path in (*RECIPES.glob("prompts/*.jinja"), *RECIPES.glob("labels/*.yaml"))]


def tiny_chat_tokenizer(
    chat_template: str | None = CHAT_TEMPLATE, pad_token: str | None = "<|endoftext|>"
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's: any text can be written in it; think tags are tokens, but no special ones."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines(), trainer)
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token=pad_token, chat_template=chat_template
    )


def save_tiny_chat(folder: Path, seed: int = 0, hidden_size: int = 16, layers: int = 2, **tokenizer: object) -> Path:
    """Save a random Qwen3 with its tokenizer, as a pretrained one would lie on disk."""
    torch.manual_seed(seed)
    own = tiny_chat_tokenizer(**tokenizer)
    config = Qwen3Config(
        vocab_size=len(own),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=8192,
        eos_token_id=own.eos_token_id,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def save_tiny_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """Save a LoRA adapter of a tiny chat model whose weights are random, so that it changes what is said."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # By name, as adapters of real sizes have it (peft writes `all-linear` of a few layers out layer by layer).
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(Qwen3ForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder
