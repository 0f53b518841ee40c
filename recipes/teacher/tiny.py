"""Make a tiny base model: a random Qwen3 of a few million parameters, with a tokenizer of its own.

    # The base of the tiny teacher: seconds on one core
    python -m recipes.teacher.tiny --data runs/bazaar/teacher/mpcot.parquet --output runs/bazaar/teacher/base
    python -m recipes.teacher.tiny --config recipes/configs/tiny/teacher_base.yaml

It knows nothing: recipes.teacher.sft (with `lora_rank: 0`, every weight) teaches it. The tokenizer is a byte-level BPE
learnt from SFT data, prompts and answers, with Qwen3's chat markup and think tags as single tokens, so that
every command that takes a Qwen3 from the Hub takes this one. The same input and seed give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import sha256, write_json
from recipes.schemas import SFT, make_folder, read
from recipes.student.saving import save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
THINK = ("<think>", "</think>")
# ChatML as Qwen3 writes it; what an assistant thinks stays in the text, which is what the teacher learns from.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class TinyArguments:
    """Options of `python -m recipes.teacher.tiny`."""

    data: str = field(metadata={"help": "SFT data (parquet) that the tokenizer learns from."})
    output: str = field(metadata={"help": "Folder of the model and its tokenizer."})
    vocab_size: int = field(default=3072, metadata={"help": "Tokens, at least 300."})
    hidden_size: int = field(default=256, metadata={"help": "Width; a multiple of 32."})
    layers: int = field(default=4, metadata={"help": "Depth."})
    max_length: int = field(default=1024, metadata={"help": "Longest sequence, in tokens."})
    seed: int = field(default=0, metadata={"help": "Of the weights."})


def train_tokenizer(texts: Iterator[str], vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE with Qwen3's special tokens.

    Args:
        texts: What to learn from; the order does not matter.
        vocab_size: Tokens at most, special ones included.
        max_length: Recorded as the longest input.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    # Digits one by one, as Qwen does: 128 and 256 share no token that would have to be told apart.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(THINK),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # Not special, as in Qwen3: decoding with skip_special_tokens keeps them, and the parser needs them.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in THINK])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
    )


def random_model(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int = 256, layers: int = 4, seed: int = 0
) -> Qwen3ForCausalLM:
    """Draw the weights of a Qwen3 with heads of 32 dimensions, two queries a key, and tied embeddings."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    heads = hidden_size // 32
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=32,
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen3ForCausalLM(config)


def main() -> None:
    """Build and save the model."""
    arguments = parse(TinyArguments, __doc__)
    if arguments.vocab_size < 300 or arguments.hidden_size < 32 or arguments.hidden_size % 32 or arguments.layers < 1:
        raise UserError(
            f"vocab_size {arguments.vocab_size}, hidden_size {arguments.hidden_size}, layers {arguments.layers}: "
            "expected at least 300, a multiple of 32, and at least 1."
        )
    output = make_folder(arguments.output)
    frame = read(arguments.data, SFT)
    texts = (message["content"] for name in ("prompt", "completion") for turns in frame[name] for message in turns)
    tokenizer = train_tokenizer(texts, arguments.vocab_size, arguments.max_length)
    model = random_model(tokenizer, arguments.hidden_size, arguments.layers, arguments.seed)
    model.save_pretrained(output)
    save_tokenizer(tokenizer, output)
    write_json(output / "base.json", {"arguments": to_dict(arguments), "data_sha256": {"data": sha256(arguments.data)}})
    print(f"wrote {output}: {model.num_parameters():,} random parameters, {len(tokenizer):,} tokens")
    print(f"next: python -m recipes.teacher.sft --model {output} --lora_rank 0 --data {arguments.data} --output DIR")


if __name__ == "__main__":
    run(main)
