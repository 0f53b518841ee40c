"""What the repository of a teacher's LoRA adapter holds, and the facts of its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.arguments import UserError
from recipes.publish.folder import read_record, read_statement, to_json
from recipes.publish.sources import base_model_id, folders, public_metrics, require, tokenizer_files
from recipes.record import sha256

if TYPE_CHECKING:
    from hub_cards.facts import BaseModel, Evaluation, Statement
    from recipes.publish.package import Files, PackageArguments

TRAIN = "recipes.teacher.sft or recipes.teacher.dpo"
EVALUATE = "recipes.teacher.evaluate"
WEIGHTS = "adapter_model.safetensors"
LORA = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target modules"}
FIGURES = {"perspectives.png": "Accuracy of each perspective, of their oracle and of their vote"}


def package_adapter(arguments: PackageArguments) -> Files:
    """Collect adapter, tokenizer, metrics and card.

    Raises:
        UserError: A file is missing, its base is not on the Hub, or the evaluation is of another adapter.
        CardError: A fact is missing or cannot be.
    """
    from hub_cards.facts import AdapterFacts, Hardware, need
    from hub_cards.render import adapter_card

    statement = read_statement(arguments.facts, "adapter")
    messages = _messages(arguments.messages)
    source, evaluation = folders(arguments, TRAIN, EVALUATE)
    config_file, training_file = source / "adapter_config.json", source / "training.json"
    metrics_file = evaluation / "metrics.json"
    config, training = read_record(config_file, TRAIN), read_record(training_file, TRAIN)
    metrics = read_record(metrics_file, EVALUATE)
    require(source / WEIGHTS, TRAIN)
    evaluated = need(metrics, "facts.adapter_sha256", metrics_file, f"{EVALUATE} --adapter {source}")
    if evaluated != sha256(source / WEIGHTS):
        raise UserError(f"{metrics_file}: is of other weights (sha256 {evaluated[:12]}...) than {source / WEIGHTS}.")

    figures = {f"figures/{name}": shown for name, shown in FIGURES.items() if (evaluation / name).is_file()}
    base = _base_model(config, config_file, training, training_file, statement)
    # The id that a person gave for a local folder has to stand where peft reads it.
    public_config = {**config, "base_model_name_or_path": base.id, "revision": base.revision}
    facts = AdapterFacts(
        repo_id=arguments.repo_id,
        statement=statement,
        base=base,
        data_sha256=need(training, "data_sha256", training_file, TRAIN),
        settings={
            name: public_value(value) for name, value in need(training, "arguments", training_file, TRAIN).items()
        },
        code_commit=need(training, "environment.code_commit", training_file, f"{TRAIN}, in a git checkout,"),
        hardware=Hardware.read(training["environment"], training_file, TRAIN),
        train_seconds=need(training, "train_seconds", training_file, TRAIN),
        evaluation=_evaluation(metrics, metrics_file, figures),
        lora={title: _plain(need(config, name, config_file, TRAIN)) for name, title in LORA.items()},
        messages=messages,
    )
    return {
        "adapter_config.json": to_json(public_config),
        WEIGHTS: source / WEIGHTS,
        **tokenizer_files(source, TRAIN),
        **{name: evaluation / Path(name).name for name in figures},
        "metrics.json": to_json(public_metrics(metrics, arguments.repo_id)),
        "README.md": adapter_card(facts).encode(),
    }


def public_value(value: Any) -> Any:
    """Return an option's value, of a file or folder of this machine only the name."""
    if isinstance(value, str) and (Path(value).is_absolute() or Path(value).suffix or Path(value).exists()):
        return Path(value).name
    return value


def _messages(path: str | None) -> list[dict[str, str]]:
    if path is None:
        raise UserError("--messages: an adapter needs it: a JSON list of chat messages as it was trained on.")
    try:
        messages = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--messages {path}: not readable JSON ({error}).") from None
    right = isinstance(messages, list) and all(
        isinstance(message, dict) and set(message) == {"role", "content"} for message in messages
    )
    if not right or not messages:
        raise UserError(f'--messages {path}: expected [{{"role": "user", "content": "..."}}, ...].')
    return messages


def _base_model(
    config: Mapping[str, Any], config_file: Path, training: Mapping[str, Any], file: Path, statement: Statement
) -> BaseModel:
    from hub_cards.facts import REPO_ID, BaseModel, need

    named = need(config, "base_model_name_or_path", config_file, TRAIN)
    recorded = need(training, "base_model", file, TRAIN)
    if REPO_ID.fullmatch(named) and REPO_ID.fullmatch(recorded) and named != recorded:
        raise UserError(f"{config_file}: the base is {named!r}, but {file} records {recorded!r}: not one training's.")
    # A folder of this machine has no commit: then a person says which one it is a copy of.
    revision = statement.base_revision or need(
        training, "base_revision", file, f"{TRAIN}, or 'base_revision' in --facts,"
    )
    return BaseModel(base_model_id(recorded, statement, file), revision, None)


def _plain(value: Any) -> Any:
    return ", ".join(sorted(value)) if isinstance(value, list) else value


def _evaluation(metrics: Mapping[str, Any], file: Path, figures: Mapping[str, str]) -> Evaluation:
    from hub_cards.facts import Evaluation, Score, Slice, need

    rows = need(metrics, "overall.pairs", file, EVALUATE)
    slices = []
    for name in need(metrics, "overall.perspectives", file, EVALUATE):
        scores = {}
        for metric in ("accuracy", "macro_f1"):
            value = need(metrics, f"overall.perspectives.{name}.{metric}.value", file, EVALUATE)
            ends = need(metrics, f"overall.perspectives.{name}.{metric}.interval", file, EVALUATE)
            scores[metric] = Score(value, tuple(ends))
        slices.append(Slice(name, rows, scores))
    # The perspective-free prompt is what the adapter was trained on: its scores stand first, and in the metadata.
    slices.sort(key=lambda part: part.name != "unified")
    return Evaluation(
        split=need(metrics, "facts.arguments.split", file, EVALUATE),
        pairs_sha256=need(metrics, "facts.pairs_sha256", file, EVALUATE),
        date=need(metrics, "facts.date", file, EVALUATE),
        slices=slices,
        conventions=need(metrics, "conventions", file, EVALUATE),
        draws=need(metrics, "facts.arguments.draws", file, EVALUATE),
        seed=need(metrics, "facts.arguments.seed", file, EVALUATE),
        figures=figures,
    )
