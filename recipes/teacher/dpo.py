"""Tune a teacher further on preferences: DPO from its SFT adapter, whose frozen copy is the reference policy.

    # The paper's: Qwen3-14B on 4 GPUs of 80 GB; a smaller one on one GPU
    accelerate launch --config_file recipes/configs/accelerate/four_gpus.yaml \
        -m recipes.teacher.dpo --config recipes/configs/teacher/qwen3_14b/mpcot_dpo.yaml
    python -m recipes.teacher.dpo --config recipes/configs/teacher/one_gpu/mpcot_dpo.yaml --beta 0.3
    # Eq. 5 to the letter
    python -m recipes.teacher.dpo --config recipes/configs/teacher/qwen3_14b/mpcot_dpo_eq5.yaml
    # Tiny, on a CPU
    python -m recipes.teacher.dpo --config recipes/configs/tiny/teacher_dpo.yaml

The paper calls its loss standard DPO and prints eq. 5 without reference policy and beta. `loss: dpo` is the standard,

    -log sigmoid(beta * ([log p(c|x) - log p_ref(c|x)] - [log p(r|x) - log p_ref(r|x)])),

with TRL's DPOTrainer; `loss: eq5` is -log sigmoid(log p(c|x) - log p(r|x)), with TRL's CPOTrainer at cpo_alpha 0 and
beta 1. Its sums run over tokens, so the shorter answer starts ahead: an ablation, for pairs of balanced length.

Without `adapter`, `model` itself is the reference, under a new adapter. Resumes, and records, as recipes.teacher.sft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from recipes.arguments import UserError, parse, run
from recipes.schemas import PREFERENCES
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
class DpoArguments(TuningArguments):
    """Options of `python -m recipes.teacher.dpo`. Defaults are the paper's where it states them."""

    loss: Literal["dpo", "eq5"] = field(default="dpo", metadata={"help": "dpo: the standard. eq5: as printed."})
    beta: float = field(default=0.1, metadata={"help": "Pull towards the reference (the paper states none); not eq5."})
    max_length: int = field(default=3072, metadata={"help": "Longest prompt with its answer, in tokens."})
    learning_rate: float = field(default=5e-6, metadata={"help": "Peak learning rate."})
    batch_size: int = field(default=1, metadata={"help": "Preference pairs a device takes at once."})
    gradient_accumulation_steps: int = field(
        default=16, metadata={"help": "Batches an optimizer step adds up (the paper: 1 x 16, on 4 devices)."}
    )
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of the steps."})


def main() -> None:
    """Run the verb."""
    arguments = parse(DpoArguments, __doc__)
    record = tune(arguments)
    if record["validation"]:
        before, after = (record["validation"][when]["eval_rewards/margins"] for when in ("before", "after"))
        accuracy = record["validation"]["after"]["eval_rewards/accuracies"]
        print(f"held-out pairs: margin {before:.4f} -> {after:.4f}, chosen above rejected in {accuracy:.1%}")
    print(f"wrote {arguments.output}")
    print("next: python -m recipes.teacher.generate --help, recipes.teacher.evaluate, or recipes.teacher.merge")


def tune(arguments: DpoArguments) -> dict[str, Any]:
    """Train one adapter, or finish one that was interrupted; a finished one is left as it is.

    Returns:
        The record written to `training.json`; its `validation` holds the margins before and after.

    Raises:
        UserError: As `recipes.teacher.sft.tune`, or eq. 5 is given a beta.
    """
    trainer, facts = prepare(arguments)
    return facts if trainer is None else train(trainer, arguments, settings(arguments), facts)


def prepare(arguments: DpoArguments) -> tuple[Any, dict[str, Any]]:
    """Check everything and build the trainer; None, with the record, where the folder is finished."""
    check_numbers(arguments, "max_length", "learning_rate", "batch_size", "gradient_accumulation_steps", "beta")
    if arguments.loss == "eq5" and arguments.beta != DpoArguments.beta:
        raise UserError("beta: eq. 5 has none. Leave it out, or take --loss dpo.")
    if arguments.adapter is None and arguments.lora_rank == 0:
        raise UserError(
            "lora_rank: DPO trains an adapter, and its reference is the model without it; expected 1 or more."
        )
    name, revision = base_of(arguments)
    files = {"train": arguments.data} | ({"validation": arguments.validation} if arguments.validation else {})
    columns = ["prompt", "chosen", "rejected"]
    data = {split: read_dataset(path, PREFERENCES, columns) for split, path in files.items()}
    finished = claim_folder(Path(arguments.output), settings(arguments), arguments.overwrite, "teacher")
    if finished is not None:
        print(f"{arguments.output} already holds this teacher; --overwrite trains it again.")
        return None, finished
    tokenizer = load_tokenizer(name, revision, arguments.chat_template)
    for split, rows in data.items():
        both = [
            check_conversations(
                tokenizer,
                list(zip(rows["prompt"], rows[side], strict=True)),
                arguments.max_length - (arguments.loss == "eq5"),  # CPOTrainer adds an eos token of its own
                arguments.too_long,
                f"{files[split]} ({side})",
            )
            for side in ("chosen", "rejected")
        ]
        data[split] = rows.select([row for row, kept in enumerate(zip(*both, strict=True)) if all(kept)])

    model = load_model(name, revision, arguments)
    base_commit = commit_of(model) or revision
    options = {
        "args": _configuration(arguments),
        "train_dataset": data["train"],
        "eval_dataset": data.get("validation"),
        "processing_class": tokenizer,
        "peft_config": new_lora(arguments) if arguments.adapter is None else None,
    }
    model = model if arguments.adapter is None else with_adapter(model, arguments.adapter)
    if arguments.loss == "eq5":
        from trl.experimental.cpo import CPOTrainer

        trainer = CPOTrainer(model, **options)
    else:
        from trl import DPOTrainer

        trainer = DPOTrainer(model, **options)
    facts = {"verb": "dpo", "base_model": name, "base_revision": base_commit, "train_rows": len(data["train"])}
    return trainer, facts


def _configuration(arguments: DpoArguments) -> Any:
    options = training_options(arguments)
    if arguments.loss == "eq5":
        from trl.experimental.cpo import CPOConfig

        return CPOConfig(**options, loss_type="sigmoid", cpo_alpha=0.0, beta=1.0)
    from trl import DPOConfig

    return DPOConfig(**options, beta=arguments.beta, loss_type=["sigmoid"])


if __name__ == "__main__":
    run(main)
