"""What tuning a causal language model takes, whichever the loss: base, tokenizer, adapter, checks, record."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, to_dict
from recipes.record import environment, sha256
from recipes.schemas import Contract, read
from recipes.student.saving import RECORD, explain_failed_writes, last_complete_checkpoint, save_student

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

Messages = list[dict[str, str]]
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
THINK = re.compile(r"<think>\s*(.*?)\s*</think>", re.DOTALL)


@dataclass(kw_only=True)
class TuningArguments:
    """Options that SFT, DPO and pre-training share."""

    data: str = field(metadata={"help": "Training data (parquet)."})
    output: str = field(metadata={"help": "Folder of the finished adapter and, meanwhile, its checkpoints."})
    validation: str | None = field(default=None, metadata={"help": "Held-out data of the same kind (parquet)."})
    model: str | None = field(default=None, metadata={"help": "Base: Hub id or folder (None: the adapter's own base)."})
    model_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the base."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter to go on from (None: a new one)."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file to use in place of the tokenizer's chat template."}
    )
    too_long: Literal["refuse", "drop", "truncate"] = field(
        default="refuse", metadata={"help": "What becomes of sequences longer than max_length; never in silence."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapter (the paper states none)."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter is lora_alpha / lora_rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapter."})
    epochs: int = field(default=3, metadata={"help": "Passes over the data."})
    lr_scheduler: Literal["cosine", "linear", "constant_with_warmup"] = field(
        default="cosine", metadata={"help": "How the learning rate falls."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's (the paper states none)."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to it."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "Less memory, a third more time."})
    attn_implementation: str | None = field(default=None, metadata={"help": "e.g. sdpa, flash_attention_2."})
    seed: int = field(default=0, metadata={"help": "Of the adapter's weights, order and dropout."})
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "auto: a GPU where there is one."})
    save_steps: int = field(default=100, metadata={"help": "Optimizer steps between two checkpoints."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    report_to: Literal["none", "tensorboard"] = field(default="none", metadata={"help": "Where to follow it live."})
    overwrite: bool = field(default=False, metadata={"help": "Discard what the output folder holds."})


def check_numbers(arguments: TuningArguments, *more: str) -> None:
    """Refuse numbers that cannot be, before anything is read.

    Raises:
        UserError: Naming the option.
    """
    for name in ("epochs", "save_steps", "logging_steps", "max_grad_norm", "lora_alpha", *more):
        if getattr(arguments, name) <= 0:
            raise UserError(f"{name}: expected more than 0, got {getattr(arguments, name)}.")
    if arguments.lora_rank < 0 or not 0 <= arguments.lora_dropout < 1:
        raise UserError("lora_rank: expected 0 (every weight) or more; lora_dropout: a share below 1.")


def settings(arguments: TuningArguments) -> dict[str, Any]:
    """Return what decides the result: if any of it differs, it is another teacher."""
    options = to_dict(arguments)
    for name in ("output", "overwrite", "logging_steps", "save_steps", "device", "report_to"):
        options.pop(name)
    files = {"data": arguments.data, "validation": arguments.validation}
    if arguments.adapter is not None:
        files["adapter"] = str(Path(arguments.adapter, ADAPTER_WEIGHTS))
    return {"arguments": options, "data_sha256": {name: sha256(path) for name, path in files.items() if path}}


def read_dataset(path: str, contract: Contract, columns: Sequence[str]) -> Dataset:
    """Read a parquet file, check it, and keep the columns that the trainer takes."""
    from datasets import Dataset

    return Dataset.from_pandas(read(path, contract)[list(columns)], preserve_index=False)


def base_of(arguments: TuningArguments) -> tuple[str, str | None]:
    """Return name and revision of the base model: the one asked for, else the adapter's.

    Raises:
        UserError: Neither is given, the adapter is none, or it was made on another base than the one asked for.
    """
    if arguments.adapter is None:
        if arguments.model is None:
            raise UserError("model: expected a Hub id or a folder (or `adapter`, to go on from one).")
        return arguments.model, arguments.model_revision
    folder = Path(arguments.adapter)
    missing = [name for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise UserError(f"adapter: {folder}: no {missing[0]}. Expected a folder made by recipes.teacher.sft.")
    made_on = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    record = folder / RECORD
    facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    # Sizes alone tell nothing: Qwen3-4B and Qwen3-4B-Base have the same, and an adapter of one spoils the other.
    if arguments.model not in (None, made_on, facts.get("base_model")):
        raise UserError(
            f"adapter: {folder} was made on {made_on!r}, not on {arguments.model!r}: it fits its own base only. "
            "Leave `model` out, or train an adapter on that base."
        )
    return arguments.model or made_on, arguments.model_revision or facts.get("base_revision")


def load_tokenizer(name: str, revision: str | None = None, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad.

    Raises:
        UserError: It cannot be loaded, or has neither a padding nor an end-of-sequence token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"model {name!r} (revision {revision}) has no usable tokenizer: {_one_line(error)}") from None
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"chat_template: {chat_template}: not readable ({error.strerror}).") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model {name!r}: its tokenizer has neither a pad nor an eos token. Choose another base.")
        # Safe: padding is masked by position, so the model still learns to end its turn with the same token.
        tokenizer.pad_token = tokenizer.eos_token
        print(f"{name}: its tokenizer has no pad token; {tokenizer.eos_token!r}, its eos token, pads.")
    return tokenizer


def check_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Messages, Messages]],
    max_length: int,
    too_long: str,
    source: str,
) -> list[bool]:
    """Render prompts with their answers as they will be trained on, and say which rows to keep.

    Args:
        tokenizer: Whose chat template renders.
        conversations: (prompt, answer) of each row.
        max_length: Longest sequence, in tokens.
        too_long: `refuse`, `drop` or `truncate`.
        source: Named by the errors.

    Raises:
        UserError: There is no chat template; it loses the reasoning or renders the prompt otherwise when an answer
            follows; or sequences are too long and to be refused.
    """
    from tqdm import tqdm

    if tokenizer.chat_template is None:
        raise UserError("the tokenizer has no chat template: choose an instruct model, or pass --chat_template FILE.")
    texts = []
    for row, (prompt, answer) in enumerate(tqdm(conversations, desc="Rendering conversations", unit="row", delay=1)):
        before = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        thoughts = THINK.search(answer[-1]["content"])
        if thoughts and (thoughts[1] not in text or "</think>" not in text[len(before) :]):
            raise UserError(
                f"{source}: row {row}: the chat template drops the reasoning between <think> tags, so the "
                "teacher would learn bare labels. Pass --chat_template with one that keeps what the last turn thinks."
            )
        if not text.startswith(before):
            raise UserError(
                f"{source}: row {row}: the chat template renders a prompt otherwise when an answer follows, so the "
                "teacher would be trained on another prompt than it is asked with. Pass --chat_template."
            )
        texts.append(text)
    lengths: list[int] = []
    for start in tqdm(range(0, len(texts), 1000), desc="Counting tokens", unit="1000 rows", delay=1):
        batch = tokenizer(texts[start : start + 1000], add_special_tokens=False)["input_ids"]
        lengths += [len(ids) for ids in batch]
    keep = [length <= max_length for length in lengths]
    longer = keep.count(False)
    if longer:
        row = keep.index(False)
        found = (
            f"{source}: {longer:,} of {len(keep):,} sequences are longer than max_length {max_length} (row {row}: "
            f"{lengths[row]} tokens; longest: {max(lengths)})"
        )
        if too_long == "refuse" or (too_long == "drop" and longer == len(keep)):
            raise UserError(f"{found}. Raise max_length, or pass --too_long drop or truncate.")
        print(f"{found}: {'left out' if too_long == 'drop' else 'their ends are cut off, labels included'}.")
    return keep if too_long == "drop" else [True] * len(keep)


def load_model(name: str, revision: str | None, arguments: TuningArguments) -> PreTrainedModel:
    """Load the base: bfloat16 on a GPU, float32 elsewhere.

    Raises:
        UserError: It cannot be loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=False,
            dtype=torch.bfloat16 if on_gpu(arguments) else torch.float32,
            **({} if arguments.attn_implementation is None else {"attn_implementation": arguments.attn_implementation}),
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"model {name!r} (revision {revision}) cannot be loaded: {_one_line(error)}") from None


def commit_of(model: PreTrainedModel) -> str | None:
    """Return the commit on the Hub that a model was loaded from; a folder has none, nor the attribute."""
    return getattr(model.config, "_commit_hash", None)


def on_gpu(arguments: TuningArguments) -> bool:
    """Say whether a GPU will be used."""
    import torch

    return torch.cuda.is_available() and arguments.device != "cpu"


def with_adapter(model: PreTrainedModel, folder: str) -> PeftModel:
    """Put a saved adapter on its base, trainable.

    Raises:
        UserError: Its weights are not those that the base takes, or the base is not the size it was made on. (peft
            warns of missing weights and takes no notice of a deeper base.)
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    record = Path(folder, RECORD)
    if record.is_file():
        facts = json.loads(record.read_text(encoding="utf-8"))
        made_on = facts["parameters"] - facts["trainable_parameters"]
        if made_on != (size := sum(value.numel() for value in model.parameters())):
            raise UserError(
                f"adapter: {folder} does not fit its base {model.name_or_path}: it was made on {made_on:,} parameters "
                f"and finds {size:,}. Was another base saved under this name?"
            )
    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UserError(
            f"adapter: {folder} does not fit {config.base_model_name_or_path}: {_one_line(error)}"
        ) from None
    weights = load_peft_weights(folder, device="cpu")
    expected = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(adapted).items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    if found != expected:
        name = next(name for name in sorted({*found, *expected}) if found.get(name) != expected.get(name))
        raise UserError(
            f"adapter: {folder} does not fit its base {model.name_or_path}: {name} is {found.get(name, 'missing')} in "
            f"the adapter and {expected.get(name, 'missing')} in the base. Was another base saved under this name?"
        )
    set_peft_model_state_dict(adapted, weights)
    return adapted


def new_lora(arguments: TuningArguments) -> LoraConfig | None:
    """Return a new adapter on every linear layer (eq. 3 with LoRA), None where every weight is trained."""
    from peft import LoraConfig

    if arguments.lora_rank == 0:
        return None
    return LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def training_options(arguments: Any) -> dict[str, Any]:
    """Return what every TRL configuration here is given; `arguments` also has batch sizes and learning rate."""
    return {
        "output_dir": str(Path(arguments.output, "checkpoints")),
        "learning_rate": arguments.learning_rate,
        "per_device_train_batch_size": arguments.batch_size,
        "per_device_eval_batch_size": arguments.batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "num_train_epochs": arguments.epochs,
        "lr_scheduler_type": arguments.lr_scheduler,
        "warmup_steps": arguments.warmup_ratio,  # a share when below 1
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "max_length": arguments.max_length,
        "bf16": on_gpu(arguments),  # TRL's default is True, CPU or not
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "use_cpu": not on_gpu(arguments),
        "eval_strategy": "epoch" if arguments.validation else "no",
        "eval_on_start": arguments.validation is not None,
        "save_strategy": "steps",
        "save_steps": arguments.save_steps,
        "save_total_limit": 1,
        "logging_steps": arguments.logging_steps,
        "report_to": arguments.report_to,
        "seed": arguments.seed,
        "dataloader_pin_memory": on_gpu(arguments),
    }


def train(trainer: Trainer, arguments: TuningArguments, settings: dict[str, Any], facts: dict[str, Any]) -> dict:
    """Train, or go on from the last complete checkpoint; save the adapter (or the model) with its record.

    Args:
        trainer: With model, data and tokenizer.
        arguments: Of the verb.
        settings: From `settings`.
        facts: What the verb adds to the record.

    Returns:
        The record: base_model, base_revision, arguments, data_sha256, environment, train_seconds, log, and more.
    """
    from peft import PeftModel

    output = Path(arguments.output)
    checkpoint = last_complete_checkpoint(output / "checkpoints")
    if checkpoint is not None:
        print(f"Going on from {checkpoint}.")
    with explain_failed_writes(output):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    model = trainer.accelerator.unwrap_model(trainer.model)
    machine = environment()
    machine["packages"] |= {name: importlib.metadata.version(name) for name in ("trl", "peft")}
    evaluations = [line for line in trainer.state.log_history if any(name.startswith("eval_") for name in line)]
    stage = {"verb": facts["verb"], **settings}
    weights = [value for name, value in model.named_parameters() if ".ref." not in name]  # DPO's reference
    record = {
        **facts,
        **settings,
        "stages": [*_stages(arguments.adapter), stage],
        "parameters": sum(value.numel() for value in weights),
        "trainable_parameters": sum(value.numel() for value in weights if value.requires_grad),
        "validation": {"before": evaluations[0], "after": evaluations[-1]} if evaluations else None,
        "steps": trainer.state.global_step,
        "train_seconds": round(result.metrics["train_runtime"], 1),
        "processes": trainer.args.world_size,
        "environment": machine,
        "log": trainer.state.log_history,
    }
    if trainer.is_world_process_zero():
        # DPO's frozen reference is an adapter of the same model, and stays behind.
        options = {"selected_adapters": ["default"]} if isinstance(model, PeftModel) else {}
        save_student(model, trainer.processing_class, record, output, **options)
        (output / "README.md").unlink(missing_ok=True)  # peft's empty card; hub_cards renders one from the record
    trainer.accelerator.wait_for_everyone()
    return record


def _stages(adapter: str | None) -> list[dict[str, Any]]:
    """Return what an adapter has gone through before."""
    if adapter is None or not Path(adapter, RECORD).is_file():
        return []
    return json.loads(Path(adapter, RECORD).read_text(encoding="utf-8")).get("stages", [])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
