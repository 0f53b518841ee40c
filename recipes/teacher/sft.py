"""Tune a teacher on chosen rationales: supervised fine-tuning with LoRA, on rationale and label (eq. 3).

    # The paper's: Qwen3-14B on 4 GPUs of 80 GB; a smaller one on one GPU
    accelerate launch --config_file recipes/configs/accelerate/four_gpus.yaml \
        -m recipes.teacher.sft --config recipes/configs/teacher/qwen3_14b/mpcot_sft.yaml
    python -m recipes.teacher.sft --config recipes/configs/teacher/one_gpu/mpcot_sft.yaml --model Qwen/Qwen3-0.6B
    # ProgressiveCoT: each stage goes on from the adapter of the stage before
    python -m recipes.teacher.sft --config recipes/configs/teacher/qwen3_14b/progressive_2.yaml
    # Tiny, on a CPU: every weight of a random model
    python -m recipes.teacher.sft --config recipes/configs/tiny/teacher_sft.yaml

The loss is on the completion alone, think tags included. Killed at any moment and started again with the same command,
it goes on from its last checkpoint. The output folder then holds adapter, tokenizer and `training.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.arguments import parse, run
from recipes.schemas import SFT
from recipes.student.saving import claim_folder
from recipes.teacher.tuning import (
    TuningArguments,
    base_of,
    check_conversations,
    check_numbers,
    commit_of,
    load_model,
    load_tokenizer,
    new_lora,
    read_dataset,
    settings,
    train,
    training_options,
    with_adapter,
)


@dataclass(kw_only=True)
class SftArguments(TuningArguments):
    """Options of `python -m recipes.teacher.sft`. Defaults are the paper's where it states them."""

    max_length: int = field(default=3072, metadata={"help": "Longest prompt with its answer, in tokens."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=8, metadata={"help": "Rows a device takes at once (the paper: 8, on 4 devices)."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches an optimizer step adds up."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of the steps (the paper states none)."})


def main() -> None:
    """Run the verb."""
    arguments = parse(SftArguments, __doc__)
    record = tune(arguments)
    losses = [line["loss"] for line in record["log"] if "loss" in line]
    if losses:
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {record['steps']:,} steps, {record['train_seconds']:.0f} s")
    print(f"wrote {arguments.output}")
    print("next: its passes with recipes.teacher.generate, then python -m recipes.teacher.preferences --help")


def tune(arguments: SftArguments) -> dict[str, Any]:
    """Train one adapter, or finish one that was interrupted; a finished one is left as it is.

    Returns:
        The record written to `training.json`.

    Raises:
        UserError: The data breaks its contract, sequences are too long, the chat template drops the reasoning, base and
            adapter do not fit, or the output folder holds another teacher.
    """
    check_numbers(arguments, "max_length", "learning_rate", "batch_size", "gradient_accumulation_steps")
    name, revision = base_of(arguments)
    files = {"train": arguments.data} | ({"validation": arguments.validation} if arguments.validation else {})
    data = {split: read_dataset(path, SFT, ["prompt", "completion"]) for split, path in files.items()}
    finished = claim_folder(Path(arguments.output), settings(arguments), arguments.overwrite, "teacher")
    if finished is not None:
        print(f"{arguments.output} already holds this teacher; --overwrite trains it again.")
        return finished
    tokenizer = load_tokenizer(name, revision, arguments.chat_template)
    for split, rows in data.items():
        conversations = list(zip(rows["prompt"], rows["completion"], strict=True))
        keep = check_conversations(tokenizer, conversations, arguments.max_length, arguments.too_long, files[split])
        data[split] = rows.select([row for row, kept in enumerate(keep) if kept])

    from trl import SFTConfig, SFTTrainer

    model = load_model(name, revision, arguments)
    base_commit = commit_of(model) or revision
    trainer = SFTTrainer(
        model if arguments.adapter is None else with_adapter(model, arguments.adapter),
        args=SFTConfig(**training_options(arguments), completion_only_loss=True),
        train_dataset=data["train"],
        eval_dataset=data.get("validation"),
        processing_class=tokenizer,
        peft_config=new_lora(arguments) if arguments.adapter is None else None,
    )
    facts = {"verb": "sft", "base_model": name, "base_revision": base_commit, "train_rows": len(data["train"])}
    return train(trainer, arguments, settings(arguments), facts)


if __name__ == "__main__":
    run(main)
