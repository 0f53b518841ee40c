"""An embedder of rationales tuned so that those of one verdict lie together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.record import environment
from recipes.student.saving import RECORD, claim_folder, explain_failed_writes, last_complete_checkpoint

if TYPE_CHECKING:
    import pandas as pd

    from recipes.rationales.embed import Encoder


def tune(
    rows: pd.DataFrame,
    encoder: Encoder,
    output: Path,
    settings: dict[str, Any],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    margin: float,
    precision: str,
    max_length: int,
    seed: int,
) -> dict[str, Any]:
    r"""Tune a sentence encoder by triplets of rationales: two of one verdict, one of another.

    The loss is sentence-transformers' `BatchAllTripletLoss`, the mean over the triplets of a batch that are not yet
    apart, d = 1 - cos:

    .. math:: \max(0,\ d(a, p) - d(a, n) + \mathrm{margin})

    Its batches are `group_by_label`'s: verdicts take turns, so the rare ones are seen as often as the frequent ones.
    Killed and started again, it goes on from the last checkpoint.

    Args:
        rows: Rationales to tune on: `rationale`, `predicted_label` (not null).
        encoder: The sentence encoder to begin with.
        output: Folder of the tuned one.
        settings: What decides the result (`arguments`, `data_sha256`): a folder of other settings is refused.
        steps: Optimizer steps.
        batch_size: Rationales a step, even.
        learning_rate: Falls linearly to 0, after a tenth of the steps to warm up.
        margin: By how much the other verdict is to be farther away.
        precision: `float32`, or `bfloat16` for autocast.
        max_length: Tokens a rationale.
        seed: Of the batches.

    Returns:
        The record written to `training.json`.

    Raises:
        UserError: Fewer than two verdicts with two rationales each, or `output` holds another embedder.
    """
    finished = claim_folder(output, settings, overwrite=False, what="tuned embedder")
    if finished is not None:
        print(f"{output} already holds this tuned embedder.")
        return finished

    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )

    verdicts = sorted(rows["predicted_label"].unique())
    dataset = Dataset.from_dict(
        {"sentence": rows["rationale"].tolist(), "label": rows["predicted_label"].map(verdicts.index).tolist()}
    )
    model = SentenceTransformer(encoder.path, revision=encoder.load_revision)
    model.max_seq_length = min(model.max_seq_length or max_length, max_length)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(output / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=learning_rate,
            warmup_steps=steps // 10,
            batch_sampler="group_by_label",
            save_steps=50,
            save_total_limit=1,
            logging_steps=10,
            bf16=precision == "bfloat16",
            seed=seed,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
        ),
        train_dataset=dataset,
        loss=losses.BatchAllTripletLoss(
            model, losses.BatchHardTripletLossDistanceFunction.cosine_distance, margin=margin
        ),
    )
    checkpoint = last_complete_checkpoint(output / "checkpoints")
    if checkpoint is not None:
        print(f"Going on from {checkpoint}.")
    with explain_failed_writes(output):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    record = {
        **settings,
        "encoder": encoder.name,
        "encoder_revision": encoder.revision,
        "rationales": len(rows),
        "rationales_by_verdict": rows["predicted_label"].value_counts().to_dict(),
        "train_seconds": round(result.metrics["train_runtime"], 1),
        "environment": environment(),
        "log": trainer.state.log_history,
    }
    _save(model, record, output)
    return record


def check_verdicts(rows: pd.DataFrame, batch_size: int) -> None:
    """Refuse what gives no triplet, before anything long begins."""
    counts = rows["predicted_label"].value_counts()
    if (counts >= 2).sum() < 2:
        found = ", ".join(f"{label} {count}" for label, count in counts.items()) or "none"
        raise UserError(
            f"rationales: tuning needs two verdicts with two rationales each, found {found}. Build them with "
            "--keep all, or from more pairs."
        )
    if batch_size < 4 or batch_size % 2:
        raise UserError(
            f"batch_size: expected an even number from 4 on (verdicts take turns by two), got {batch_size}."
        )


def _save(model: Any, record: dict[str, Any], output: Path) -> None:
    """Put the embedder in its folder, and the record last: a folder without it is not finished."""
    import shutil

    from recipes.record import write_json

    partial = output / ".saving"
    shutil.rmtree(partial, ignore_errors=True)
    with explain_failed_writes(output):
        model.save_pretrained(str(partial), create_model_card=False)
        for path in sorted(partial.iterdir()):
            target = output / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
        write_json(output / RECORD, record)
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)
